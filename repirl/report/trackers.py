"""Trackers beside metrics.jsonl: W&B, MLflow and trackio, through accelerate's classes for them.

metrics.jsonl stays what counts. A tracker that fails is left out from then on, with one warning; it never ends a run.
Which server and account, or none, is up to each tracker's own settings (`WANDB_MODE`, `MLFLOW_TRACKING_URI`, ...).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from repirl.config import Config, first_line

logger = logging.getLogger(__name__)

# Ids of a run's trackers, by which a resumed run goes on in the same places.
NAME = "trackers.json"
# Of a row of samples.jsonl, and the mean of its tokens' rewards.
SAMPLE_COLUMNS = ("step", "kind", "index", "prompt", "response", "outcome", "length", "end_reason", "mean_reward")


class _PlainLogger(logging.LoggerAdapter):
    """For accelerate's trackers, whose own one asks for a state of accelerate. To set that up would choose devices and
    threads of this process."""

    def warning_once(self, message: str, *arguments: Any) -> None:
        """accelerate's name for a warning that it gives at the start."""
        self.warning(message, *arguments)


class Trackers:
    """The trackers of one run. Only the main process has them.

    Args:
        config: the run's; `log.trackers` names them.
        record: how the run was started (the last entry of run.json): version, revision, machine, packages, command.
        start_step: the number of finished steps of a resumed run; 0 for a new one.
    """

    def __init__(self, config: Config, record: Mapping[str, Any], start_step: int) -> None:
        self._folder = Path(config.output_dir)
        self._trackers: dict[str, Any] = {}
        ids = self._read_ids() if start_step else {}
        values = _flat({"config": config.model_dump(mode="json"), "run": _without_configuration(record)})
        for name in config.log.trackers:
            if name == "tensorboard":
                # `log.MetricsLogger` writes it.
                continue
            if find_spec(name) is None:
                logger.warning(
                    "log.trackers: %s is not installed (pip install %s): the run goes on without it", name, name
                )
                continue
            self._attempt(name, partial(self._open, name, config, ids, values))
        self._write_ids(ids)

    def _open(self, name: str, config: Config, ids: dict[str, str], values: dict[str, Any]) -> None:
        from accelerate import tracking

        tracking.logger = _PlainLogger(logging.getLogger(tracking.__name__))
        tracker = tracking.LOGGER_TYPE_TO_CLASS[name](config.log.project, **_options(name, self._folder, ids.get(name)))
        # This is the main process; accelerate does not have to find out by setting up a state of its own.
        tracker.main_process_only = False
        tracker.start()
        self._trackers[name] = tracker
        ids[name] = _id_of(name, tracker, self._folder)
        tracker.store_init_configuration(values)

    def log(self, step: int, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]] = ()) -> None:
        """Hand over a step.

        Args:
            step: the number of finished steps.
            metrics: by name; those that are not finite are left out.
            samples: rows of samples.jsonl.
        """
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        for name in list(self._trackers):
            self._attempt(name, partial(self._log, name, step, finite, samples))

    def _log(self, name: str, step: int, metrics: dict[str, float], samples: Sequence[Mapping[str, Any]]) -> None:
        tracker = self._trackers[name]
        tracker.log(metrics, step=step)
        if samples:
            _log_table(name, tracker, step, [_row(row) for row in samples])

    def close(self) -> None:
        """End all trackers, which may still send what they hold."""
        for name in list(self._trackers):
            self._attempt(name, self._trackers[name].finish)
        self._trackers.clear()

    def _attempt(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        # SystemExit: of an initialisation that would ask for a key.
        except (Exception, SystemExit) as error:
            self._trackers.pop(name, None)
            logger.warning(
                "%s fails (%s: %s): the run goes on without it, metrics.jsonl has all",
                name,
                type(error).__name__,
                first_line(error),
            )

    def _read_ids(self) -> dict[str, str]:
        try:
            ids = json.loads((self._folder / NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {k: v for k, v in ids.items() if isinstance(v, str)} if isinstance(ids, dict) else {}

    def _write_ids(self, ids: dict[str, str]) -> None:
        if not ids:
            return
        try:
            (self._folder / NAME).write_text(json.dumps(ids) + "\n", encoding="utf-8")
        except OSError as error:
            logger.warning("%s cannot be written (%s): a resumed run will begin anew in its trackers", NAME, error)


def _options(name: str, folder: Path, run_id: str | None) -> dict[str, Any]:
    """How a tracker begins a run, or goes on with one."""
    if name == "wandb":
        return {"name": folder.name, "dir": str(folder), "id": run_id, "resume": "allow" if run_id else None}
    if name == "mlflow":
        return {"run_id": run_id} if run_id else {"run_name": folder.name}
    return {"name": run_id or folder.name, "resume": "allow" if run_id else "never"}


def _id_of(name: str, tracker: Any, folder: Path) -> str:
    run = tracker.tracker
    if name == "wandb":
        return str(run.id)
    if name == "mlflow":
        return str(run.info.run_id)
    return str(getattr(run, "name", None) or folder.name)


def _log_table(name: str, tracker: Any, step: int, rows: list[list[Any]]) -> None:
    if name == "wandb":
        tracker.log_table("samples", columns=[*SAMPLE_COLUMNS], data=rows, step=step)
    elif name == "mlflow":
        import mlflow

        columns = {column: [row[i] for row in rows] for i, column in enumerate(SAMPLE_COLUMNS)}
        mlflow.log_table(columns, "samples.json")
    elif name == "trackio":
        import pandas
        import trackio

        table = trackio.Table(dataframe=pandas.DataFrame(rows, columns=[*SAMPLE_COLUMNS]))
        tracker.log({"samples": table}, step=step)


def _row(sample: Mapping[str, Any]) -> list[Any]:
    rewards = [r for r in sample.get("token_rewards") or () if r is not None]
    values = {**sample, "mean_reward": sum(rewards) / len(rewards) if rewards else None}
    return [values.get(column) for column in SAMPLE_COLUMNS]


def _without_configuration(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "configuration"}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by names with dots; lists as JSON."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = json.dumps(value) if isinstance(value, list | tuple) else value
    return flat
