"""Held-out accuracy: of the policy on prompts, of a PRM on labelled steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from repirl.checkpoint.load import load_weights
from repirl.checkpoint.manifest import resolve_checkpoint
from repirl.config import Config, ConfigError
from repirl.data.prompts import PromptSet, load_prompts
from repirl.data.steps import LabelledResponse, load_steps, pack_steps
from repirl.distributed.world import join_world
from repirl.learner import Learner
from repirl.models import load_tokenizer
from repirl.objectives.steps import step_logits
from repirl.record import Judged, record_answers
from repirl.report.reporter import Reporter
from repirl.rollout.choose import make_engine
from repirl.rollout.engine import sequence_seed
from repirl.rollout.sampler import Sampler
from repirl.run import Run, build_learners, set_up_process
from repirl.verify.choose import make_verifier
from repirl.work import PhaseTimer


def evaluate_run(run: Run, step: int, reporter: Reporter) -> dict[str, float]:
    """The figures of what a run holds out after `step` turns: labelled steps for a PRM, else prompts for the policy,
    some of whose answers the reporter gets."""
    if run.data.eval_steps is not None:
        with run.timer("eval"):
            return evaluate_steps(run.learners["prm"], run.data.eval_steps, run.config)
    assert run.sampler is not None
    assert run.held_out is not None
    with run.timer("eval"):
        judged = ask_held_out(run.sampler, run.held_out, run.config)
    record_answers(run, step, judged, reporter)
    return {"eval/accuracy": accuracy(judged)}


def accuracy(judged: Sequence[Judged]) -> float:
    """The share of right answers; judged: what `ask_held_out` returned."""
    return sum(outcome or 0.0 for _, outcome in judged) / len(judged)


def ask_held_out(sampler: Sampler, held_out: PromptSet, config: Config) -> list[Judged]:
    """The policy's answers to held-out prompts, in order, with their verdicts.

    Args:
        sampler: samples and judges the answers.
        held_out: the prompts, of which the first `eval.num_prompts` are used.
        config: the run's configuration. `eval.temperature` 0 means greedy decoding. `eval.verifier` judges, if it is
            set, else `verifier`.
    """
    prompts = held_out.prompts[: config.eval.num_prompts]
    seeds = [sequence_seed(config.seed, "eval", i) for i in range(len(prompts))]
    return sampler.ask(prompts, seeds, config.eval.temperature, sampler.held_out_verifier)


def evaluate_steps(prm: Learner, held_out: list[LabelledResponse], config: Config) -> dict[str, float]:
    """What a PRM says of held-out steps, beside their labels.

    Args:
        prm: the PRM, read by its one output.
        held_out: the responses, of which the first `eval.num_prompts` are used.
        config: the run's configuration.

    Returns:
        `eval/accuracy`, the share of labelled steps whose chance to be right is taken for above or below one half as
        the label is; `eval/loss`, the mean cross-entropy in nats; `eval/auroc`, the chance that a right step scores
        above a wrong one, where there are both.
    """
    batch = pack_steps(held_out[: config.eval.num_prompts])
    logits, labels = step_logits(prm.score(batch)["value"], batch)
    right = labels >= 0.5
    metrics = {
        "eval/accuracy": float(((logits > 0) == right).double().mean()),
        "eval/loss": float(binary_cross_entropy_with_logits(logits.double(), labels.double())),
    }
    if 0 < int(right.sum()) < right.numel():
        metrics["eval/auroc"] = auroc(logits[right], logits[~right])
    return metrics


def auroc(right: Tensor, wrong: Tensor) -> float:
    """The chance that a score of `right` [n] is above one of `wrong` [m], a tie counted half (Mann-Whitney)."""
    scores = torch.sort(wrong.double()).values
    below, up_to = (torch.searchsorted(scores, right.double(), right=side) for side in (False, True))
    return float((below + up_to).double().mean() / (2 * len(wrong)))


def evaluate_prm_checkpoint(config: Config, checkpoint: str | None) -> tuple[dict[str, float], int]:
    """Evaluate the PRM of a checkpoint on held-out labelled steps.

    Args:
        config: the run's configuration, with `data.eval_steps`.
        checkpoint: the checkpoint's folder; None evaluates `prm.model`.

    Returns:
        The figures of `evaluate_steps`, and the number of responses.

    Raises:
        ConfigError: the checkpoint does not exist, or there is neither one nor `prm.model`.
    """
    if checkpoint is None and config.prm.model is None:
        raise ConfigError("a PRM whose head is new says 0 of everything: give --checkpoint, or prm.model")
    path = resolve_checkpoint(checkpoint) if checkpoint is not None else None
    config = set_up_process(config)
    world, timer = join_world(config), PhaseTimer()
    tokenizer = load_tokenizer(config.policy.model, config.policy.gguf_file)
    held_out = load_steps(config.data, tokenizer, "eval")
    prm = build_learners(config, world, timer.work, ("prm",))["prm"]
    try:
        if path is not None:
            load_weights(path, "prm", prm)
        figures = evaluate_steps(prm, held_out, config)
    finally:
        if prm.residency is not None:
            prm.residency.close()
    return figures, len(held_out[: config.eval.num_prompts])


def evaluate_checkpoint(config: Config, checkpoint: str | None) -> tuple[float, int]:
    """Evaluate the policy of a checkpoint on the held-out prompts.

    Args:
        config: the run's configuration.
        checkpoint: the checkpoint's folder; None evaluates `policy.model` as it is.

    Returns:
        The accuracy, and the number of prompts.

    Raises:
        ConfigError: `data.eval` is not set, or the checkpoint does not exist.
    """
    if config.data.eval is None:
        raise ConfigError("data.eval is not set: there are no held-out prompts to evaluate on")
    path = resolve_checkpoint(checkpoint) if checkpoint is not None else None
    config = set_up_process(config)
    world, timer = join_world(config), PhaseTimer()
    tokenizer = load_tokenizer(config.policy.model, config.policy.gguf_file)
    held_out = load_prompts(config.data, tokenizer, "eval")
    policy = build_learners(config, world, timer.work, ("policy",))["policy"]
    engine, verifier = make_engine(config, policy, tokenizer), make_verifier(config.verifier)
    sampler = Sampler(config, policy, tokenizer, engine, verifier, None, timer)
    try:
        if path is not None:
            load_weights(path, "policy", policy)
        judged = ask_held_out(sampler, held_out, config)
    finally:
        sampler.close()
        if policy.residency is not None:
            policy.residency.close()
    return accuracy(judged), len(judged)
