"""What a run keeps of the responses that it samples: some to read (report/samples.py), figures of all of them
(report/history.py).

Every process holds all responses, so the main one writes them without asking the others. Only the PRM's passes are
shared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from repirl.batch import PackedBatch, pack
from repirl.data.prompts import Prompt
from repirl.report.history import history_rows
from repirl.report.reporter import Reporter
from repirl.report.samples import Kind, Scored, sample_row
from repirl.rewards import read_rewards
from repirl.rollout.engine import Response
from repirl.rollout.filter import Group
from repirl.run import Run
from repirl.streams import Scores

Judged = tuple[Response, float | None]


def record_turn(run: Run, step: int, reporter: Reporter) -> None:
    """Keep what the turn that is just done has sampled; nothing where it has sampled nothing.

    Prompts that a filter dropped have no rewards.
    """
    log, sampled = run.config.log, None if run.sampler is None else run.sampler.sampled
    if sampled is None or not (log.history or log.samples_per_turn):
        return
    rewards = _turn_rewards(run, sampled.batch)
    if not run.world.is_main:
        return
    assert run.sampler is not None
    assert run.sampler.prompts is not None
    prompts = [run.sampler.prompts[group.row] for group in (*sampled.kept, *sampled.dropped)]
    kept = list(_scored(sampled.kept, rewards))
    everything = [*kept, *_scored(sampled.dropped, None)]
    if log.history:
        by_index: dict[int, list[Scored]] = {}
        for prompt, scored in zip(prompts, everything, strict=True):
            by_index.setdefault(prompt.index, []).extend(scored)
        reporter.history += history_rows(step, by_index)
    _keep_samples(run, step, "train", list(zip(prompts, everything, strict=True)), reporter)


def record_answers(run: Run, step: int, judged: Sequence[Judged], reporter: Reporter) -> None:
    """Keep some answers to the held-out prompts; judged: what `Sampler.ask` returned for them."""
    assert run.held_out is not None
    count = min(run.config.log.samples_per_turn, len(judged))
    if count == 0:
        return
    prompts, some = run.held_out.prompts[:count], judged[:count]
    rewards = _answer_rewards(run, prompts, [response for response, _ in some])
    if run.world.is_main:
        nan = float("nan")
        scored = [
            [Scored(response, nan if outcome is None else outcome, None if rewards is None else rewards[i].tolist())]
            for i, (response, outcome) in enumerate(some)
        ]
        _keep_samples(run, step, "eval", list(zip(prompts, scored, strict=True)), reporter)


def _keep_samples(
    run: Run, step: int, kind: Kind, prompts: Sequence[tuple[Prompt, list[Scored]]], reporter: Reporter
) -> None:
    """The first response to each of the first prompts; if there are too few prompts, further responses to them."""
    longest = max((len(scored) for _, scored in prompts), default=0)
    order = [(prompt, scored[i]) for i in range(longest) for prompt, scored in prompts if i < len(scored)]
    for prompt, one in order[: run.config.log.samples_per_turn]:
        reporter.samples.append(sample_row(step, kind, prompt, one, run.tokenizer))


def _scored(groups: Sequence[Group], rewards: Sequence[Tensor] | None) -> Iterator[list[Scored]]:
    """The responses to each prompt; rewards: of all responses, one after the other."""
    number = 0
    for group in groups:
        scored = []
        for response, outcome in zip(group.responses, group.outcomes, strict=True):
            scored.append(Scored(response, outcome, None if rewards is None else rewards[number].tolist()))
            number += 1
        yield scored


def _turn_rewards(run: Run, batch: PackedBatch | None) -> Sequence[Tensor] | None:
    """The rewards that the policy's update has read. Where it has read none, the PRM scores the rollouts now, if the
    history is kept."""
    if batch is None or "prm" not in run.learners:
        return None
    if "prm_reward" not in batch.streams:
        if not run.config.log.history:
            return None
        Scores(run.config, run.learners, "policy", run.timer).write(batch, ("prm",))
    return _by_response(batch, batch.read("prm_reward"))


def _answer_rewards(run: Run, prompts: Sequence[Prompt], responses: Sequence[Response]) -> Sequence[Tensor] | None:
    """What the present PRM says of responses that no update uses."""
    if "prm" not in run.learners:
        return None
    batch, prm = pack([(p.token_ids, r.token_ids) for p, r in zip(prompts, responses, strict=True)]), run.config.prm
    with run.timer("reward"):
        if prm.reward == "implicit" and prm.reference == "policy":
            batch.write("old_logprob", run.learners["policy"].score(batch)["logprob"])
        elif prm.reward == "implicit" and run.reference is not None:
            run.reference.write(batch)
        return _by_response(batch, read_rewards(run.learners["prm"].score(batch), batch, prm))


def _by_response(batch: PackedBatch, rewards: Tensor) -> Sequence[Tensor]:
    return rewards.split(batch.response_cu_seqlens.diff().tolist())
