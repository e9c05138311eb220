"""What a run will need, phase by phase, before anything is loaded.

Everything is derived from the configuration and the model's `config.json`: numbers of parameters from the model on the
meta device (activations.py), what each learner holds of them (sides.py), activations from what autograd saves of each
operation of a decoder layer, the rest from what the trainer allocates and when it frees it (phases.py). Lengths are
taken at their limits: every prompt, expert and response is as long as the configuration allows. Of each phase the
moment counts at which most is held.

On a CPU the sum is the resident memory of one process, on a GPU what PyTorch's allocator hands out; `fit.usable` says
how much of a device that may fill.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from repirl.config import Config
from repirl.defaults import set_defaults, this_machine
from repirl.plan.activations import load_shape
from repirl.plan.phases import Phase, Planner, Rows
from repirl.plan.sides import base_weights, build_sides, place
from repirl.run import learner_names

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What one process needs. host: what lies in host memory beside it, where the device is a GPU."""

    device: str
    ranks: int
    phases: list[Phase]
    host: Rows = field(default_factory=dict)

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.total)


def plan(config: Config, ranks: int = 1, device: str | None = None) -> Plan:
    """Predict the memory of a run.

    Args:
        config: the run's.
        ranks: processes that share it.
        device: "cuda" or "cpu"; by default the configuration's, and a GPU where that is left open.

    Raises:
        ConfigError: where a model's `config.json` cannot be read or is not understood, or `ranks` does not fit.
    """
    device = device or ("cuda" if config.device == "auto" else config.device)
    planner = make_planner(config, ranks, device)
    return Plan(device, ranks, planner.phases(), planner.host())


def make_planner(config: Config, ranks: int, device: str) -> Planner:
    """The learners of a run and what is planned of them. Arguments and errors: as of `plan`, device is not optional."""
    config, _ = set_defaults(config, this_machine(device))
    placement = place(config, ranks, device)
    shapes = {name: _load_shape(*config.start_of(name)) for name in learner_names(config)}
    return Planner(config, placement, build_sides(config, placement, shapes), base_weights(config, placement, shapes))


_load_shape = functools.cache(load_shape)
