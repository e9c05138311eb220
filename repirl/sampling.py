"""The batches of a step: rollouts with their verdicts, experts, and the frozen reference's view of either."""

from __future__ import annotations

import torch
from torch import Tensor

from repirl.batch import EXPERT, PackedBatch, pack
from repirl.data.prompts import Prompt
from repirl.rewards.math import math_reward
from repirl.rollout.engine import Response, Sampling, sequence_seed
from repirl.setup import Run


def write_reference(run: Run, rollouts: PackedBatch) -> None:
    """The frozen reference's streams: `ref_logprob` at the policy's temperature, `prm_ref_logprob` at the PRM's."""
    if run.reference:
        rollouts.write("ref_logprob", run.reference.score(rollouts)["logprob"])
        if run.prm_reads_reference:
            rollouts.write("prm_ref_logprob", _prm_reference(run, rollouts))


def _prm_reference(run: Run, batch: PackedBatch) -> Tensor:
    assert run.reference
    assert run.prm
    return run.reference.score(batch, run.prm.temperature)["logprob"]


def write_expert_streams(run: Run, experts: PackedBatch) -> None:
    """What the PRM's loss reads of experts. They estimate no Z, so neither mu nor the base measure of theirs is ever
    needed; the reference's log-probabilities, which implicit rewards need, are computed once for each expert."""
    experts.write("old_logprob", torch.zeros(experts.num_response_tokens))
    if run.reference:
        experts.write("ref_logprob", torch.zeros(experts.num_response_tokens))
    if not run.prm_reads_reference:
        return
    indices = (-1 - experts.group_ids).tolist()
    first = {index: place for place, index in enumerate(indices) if index not in run.expert_reference}
    if first:
        new = experts.select(list(first.values()))
        parts = _prm_reference(run, new).split(new.response_cu_seqlens.diff().tolist())
        run.expert_reference |= {index: part.clone() for index, part in zip(first, parts, strict=True)}
    experts.write("prm_ref_logprob", torch.cat([run.expert_reference[index] for index in indices]))


def respond(
    run: Run, prompts: list[Prompt], seeds: list[int], sampling: Sampling
) -> list[tuple[Response, float | None]]:
    """A response to each prompt and the verifier's verdict on it (None for a prompt without an answer). Each process
    samples and judges its share; all of them get everything."""
    rank, size = run.world.rank, run.world.size
    # Sequences of one prompt stay on one process: their prompt is prefilled once.
    place: dict[tuple[int, ...], int] = {}
    shares = [place.setdefault(prompt.token_ids, len(place)) % size for prompt in prompts]
    mine = [i for i, share in enumerate(shares) if share == rank]
    responses = run.engine.generate([prompts[i].token_ids for i in mine], [seeds[i] for i in mine], sampling)
    run.work.tokens += sum(len(r.token_ids) for r in responses)
    judged = [
        (i, response, None if prompts[i].answer is None else verify(run, response, prompts[i].answer))
        for i, response in zip(mine, responses, strict=True)
    ]
    return [(response, outcome) for _, response, outcome in sorted(run.world.gather(judged), key=lambda x: x[0])]


def verify(run: Run, response: Response, answer: str) -> float:
    """1.0 where the response's final answer is right. One that ran into the length limit is judged like any
    other: what it wrote may hold an answer; the share of such responses is the metric `rollout/truncated`."""
    return math_reward(run.tokenizer.decode(response.token_ids, skip_special_tokens=True), answer)


def sample_rollouts(run: Run, step: int) -> tuple[PackedBatch, dict[str, float]]:
    """K responses for each prompt of the step, verified where prompts have answers."""
    config, num_samples = run.config, run.config.rollout.samples_per_prompt
    indices = run.prompt_cursor.next(config.rollout.prompts_per_step)
    prompts = [run.prompts[i] for i in indices for _ in range(num_samples)]
    groups = [g for g in range(len(indices)) for _ in range(num_samples)]
    seeds = [sequence_seed(config.seed, step, groups[i], i % num_samples) for i in range(len(prompts))]
    end_ids = (run.tokenizer.eos_token_id,)
    sampling = Sampling(config.rollout.max_response_tokens, config.rollout.temperature, end_ids)
    judged = respond(run, prompts, seeds, sampling)
    responses = [response for response, _ in judged]
    batch = pack(
        [(p.token_ids, r.token_ids) for p, r in zip(prompts, responses, strict=True)],
        group_ids=groups,
        outcome=[float("nan") if outcome is None else outcome for _, outcome in judged],
        streams={"sampler_logprob": [r.logprobs for r in responses]},
    )
    metrics = {
        "rollout/length": batch.num_response_tokens / batch.num_sequences,
        "rollout/truncated": sum(not r.ended for r in responses) / len(responses),
        "tokens": batch.num_tokens,
        "tokens/response": batch.num_response_tokens,
    }
    has_answers = config.data.answer_column is not None
    return batch, metrics | ({"rollout/outcome": float(batch.outcome.mean())} if has_answers else {})


def sample_experts(run: Run) -> PackedBatch:
    indices = run.expert_cursor.next(run.config.irl.experts_per_step or run.config.rollout.prompts_per_step)
    chosen = [run.experts[i] for i in indices]
    # Experts estimate no Z, so their groups are free to say which expert it is; prompts' groups begin at 0.
    groups = [-1 - i for i in indices]
    return pack([(e.prompt_ids, e.response_ids) for e in chosen], source=EXPERT, group_ids=groups)
