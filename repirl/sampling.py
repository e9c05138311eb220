"""The batches of a step: rollouts with their verdicts, experts, and the frozen reference's view of either."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from repirl.batch import EXPERT, PackedBatch, pack
from repirl.config import ConfigError
from repirl.data.prompts import Prompt
from repirl.models import forward_flops
from repirl.rollout.engine import MismatchError, Response, Sampling, sequence_seed

if TYPE_CHECKING:
    from repirl.run import Run

# How far log-probabilities of one model may be apart between padded decoding with a KV cache and the trainer's packed
# pass, at temperature 1. What is bounded, and by how much:
# float32: rounding made 5e-5 at most over 1500 tokens of SmolLM2-135M, a sampler without a cache 26 (4 in the mean).
# bfloat16 has tails that no bound on single tokens can tell from a fault (0.3 at temperature 1, 0.6 at 0.3), but a mean
# of 0.04 at either, vLLM's up to 0.08. TensorFloat-32 on a GPU has half precision's digits, and float32's range.
SAMPLER_BOUNDS = {"float32": ("max", 1e-2), "TensorFloat-32": ("mean", 2e-2), "bfloat16": ("mean", 0.25)}


def check_sampler(run: Run, mismatch: Tensor) -> None:
    """MismatchError where the policy's own sampler is further from the trainer than rounding explains. The vLLM engines
    are checked whenever they are given weights, and may sample from older ones than those that are asked here.

    mismatch: |log pi_old - log mu| of each response token, equal on all processes.
    """
    config = run.config
    if config.rollout.engine != "transformers":
        return
    precision = "bfloat16" if "bfloat16" in (config.dtype, config.computes_in) else "float32"
    if precision == "float32" and run.world.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        precision = "TensorFloat-32"
    measure, bound = SAMPLER_BOUNDS[precision]
    # Logits, and so their rounding, are divided by it.
    bound /= min(1.0, config.rollout.temperature)
    largest, mean = float(mismatch.max()), float(mismatch.mean())
    # What is not finite on both sides is the trainer's to find.
    if not (mean if measure == "mean" else largest) > bound:
        return
    raise MismatchError(
        f"the sampler (rollout.engine: transformers) does not sample from the policy: its log-probabilities are "
        f"{mean:.3g} off in the mean over {mismatch.numel()} tokens and {largest:.3g} at most, and rounding in "
        f"{precision} explains {bound:.3g} {'in the mean' if measure == 'mean' else 'at most'}. transformers "
        f"{transformers.__version__} and {type(run.policy.model).__name__} do not decode with a KV cache as repirl "
        "expects: install a release of transformers that the extra repirl[train] allows, or choose rollout.engine: vllm"
    )


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
    unknown = ("old_logprob", "sampler_logprob", *(["ref_logprob"] if run.reference else []))
    for name in unknown:
        experts.write(name, torch.zeros(experts.num_response_tokens))
    if not run.prm_reads_reference:
        return
    indices = (-1 - experts.group_ids).tolist()
    first = {index: place for place, index in enumerate(indices) if index not in run.expert_reference}
    if first:
        new = experts.select(list(first.values()))
        parts = _prm_reference(run, new).split(new.response_cu_seqlens.diff().tolist())
        run.expert_reference |= {index: part.clone() for index, part in zip(first, parts, strict=True)}
    experts.write("prm_ref_logprob", torch.cat([run.expert_reference[index] for index in indices]))


@dataclass
class InFlight:
    """Responses that are being sampled for a step, or were sampled and wait for it.

    rows: of the step's prompts in the data · mine: places, in the list of prompts, of those that this process
    samples · future: their responses.
    """

    step: int
    rows: list[int]
    mine: list[int]
    future: Future[list[Response]]


def begin_responses(run: Run, prompts: list[Prompt], seeds: list[int], sampling: Sampling) -> tuple[list[int], Future]:
    """Start sampling a response to each prompt; each process samples its share. Returns the places of this process's
    prompts, and their responses to be."""
    rank, size = run.world.rank, run.world.size
    # Sequences of one prompt stay on one process: their prompt is prefilled once.
    place: dict[tuple[int, ...], int] = {}
    shares = [place.setdefault(prompt.token_ids, len(place)) % size for prompt in prompts]
    mine = [i for i, share in enumerate(shares) if share == rank]
    if run.policy.residency is not None and run.config.rollout.engine != "transformers":
        # The engine has weights of its own: no model of the trainer's is needed meanwhile.
        run.policy.residency.use(None)
    arguments = ([prompts[i].token_ids for i in mine], [seeds[i] for i in mine], sampling)
    if run.background is not None:
        return mine, run.background.submit(run.engine.generate, *arguments)
    future: Future[list[Response]] = Future()
    future.set_result(run.engine.generate(*arguments))
    return mine, future


def judge(
    run: Run, prompts: list[Prompt], mine: list[int], responses: list[Response]
) -> list[tuple[Response, float | None]]:
    """Everybody's responses, in the order of the prompts, and the verifier's verdicts (None without an answer); each
    process judges its own."""
    if responses:
        pairs = [(prompts[i].token_ids, r.token_ids) for i, r in zip(mine, responses, strict=True)]
        run.work.tokens += sum(len(response) for _, response in pairs)
        run.work.flops += sum(forward_flops(run.policy.model, pack(pairs), reads_values=False))
    judged = [
        (i, response, None if prompts[i].answer is None else verify(run, response, prompts[i].answer))
        for i, response in zip(mine, responses, strict=True)
    ]
    return [(response, outcome) for _, response, outcome in sorted(run.world.gather(judged), key=lambda x: x[0])]


def verify(run: Run, response: Response, answer: str) -> float:
    """1.0 where the response's final answer is right. One that ran into the length limit is judged like any
    other: what it wrote may hold an answer; the share of such responses is the metric `rollout/truncated`."""
    return run.verifier.judge(run.tokenizer.decode(response.token_ids, skip_special_tokens=True), answer)


def _step_prompts(run: Run, rows: list[int]) -> list[Prompt]:
    return [run.prompts[row] for row in rows for _ in range(run.config.rollout.samples_per_prompt)]


def begin_rollouts(run: Run, step: int) -> None:
    """Start sampling K responses for each prompt of a step, with the weights that the engine has now."""
    config, num_samples = run.config.rollout, run.config.rollout.samples_per_prompt
    rows = run.prompt_cursor.next(config.prompts_per_step)
    seeds = [sequence_seed(run.config.seed, step, g, i) for g in range(len(rows)) for i in range(num_samples)]
    sampling = Sampling(config.max_response_tokens, config.temperature, (run.tokenizer.eos_token_id,))
    mine, future = begin_responses(run, _step_prompts(run, rows), seeds, sampling)
    run.in_flight = InFlight(step, rows, mine, future)


def finish_rollouts(run: Run, step: int) -> tuple[PackedBatch, dict[str, float]]:
    """The rollouts of a step, verified where prompts have answers; begun now if they are not in flight."""
    if run.in_flight is None:
        begin_rollouts(run, step)
    in_flight, run.in_flight = run.in_flight, None
    assert in_flight is not None
    assert in_flight.step == step
    prompts = _step_prompts(run, in_flight.rows)
    judged = judge(run, prompts, in_flight.mine, in_flight.future.result())
    responses = [response for response, _ in judged]
    batch = pack(
        [(p.token_ids, r.token_ids) for p, r in zip(prompts, responses, strict=True)],
        group_ids=[i // run.config.rollout.samples_per_prompt for i in range(len(prompts))],
        outcome=[float("nan") if outcome is None else outcome for _, outcome in judged],
        streams={"sampler_logprob": [r.logprobs for r in responses]},
    )
    metrics = {
        "rollout/length": batch.num_response_tokens / batch.num_sequences,
        "rollout/truncated": sum(not r.ended for r in responses) / len(responses),
        "tokens": batch.num_tokens,
        "tokens/response": batch.num_response_tokens,
    }
    has_answers = run.config.data.answer_column is not None
    if has_answers:
        metrics["rollout/verifier_timeouts"] = sum(run.world.gather([run.verifier.num_timeouts]))
    return batch, metrics | ({"rollout/outcome": float(batch.outcome.mean())} if has_answers else {})


def in_flight_state(run: Run) -> dict[str, Any] | None:
    """What a checkpoint holds of rollouts in flight, equal on all processes; waits for them. They were sampled from
    weights that may be gone by the time the run goes on, so they could not be sampled again."""
    if run.in_flight is None:
        return None
    mine = zip(run.in_flight.mine, run.in_flight.future.result(), strict=True)
    everybody = sorted(run.world.gather([(i, astuple(r)) for i, r in mine]))
    return {
        "step": run.in_flight.step,
        "rows": run.in_flight.rows,
        "responses": [r for _, r in everybody],
        "made_with": _made_with(run),
    }


def _made_with(run: Run) -> dict[str, Any]:
    """Options that rollouts in flight depend on."""
    rollout = run.config.rollout
    return {"rollout.samples_per_prompt": rollout.samples_per_prompt, "rollout.overlap": rollout.overlap}


def restore_in_flight(run: Run, state: dict[str, Any] | None) -> None:
    """Take back what `in_flight_state` gave, on any number of processes. ConfigError where an option has another value
    than these rollouts were made with."""
    if state is None:
        return
    for name, value in _made_with(run).items():
        if value != (before := state["made_with"][name]):
            raise ConfigError(
                f"{name} is {value!r}, but the checkpoint holds rollouts that were made with {before!r}: go on with "
                "that, or from a checkpoint without rollouts in flight"
            )
    responses = [Response(*fields) for fields in state["responses"]]
    mine = list(range(len(responses)))[run.world.rank :: run.world.size]
    future: Future[list[Response]] = Future()
    future.set_result([responses[i] for i in mine])
    run.in_flight = InFlight(state["step"], state["rows"], mine, future)


def sample_experts(run: Run) -> PackedBatch:
    indices = run.expert_cursor.next(run.config.irl.experts_per_step or run.config.rollout.prompts_per_step)
    chosen = [run.experts[i] for i in indices]
    # Experts estimate no Z, so their groups are free to say which expert it is; prompts' groups begin at 0.
    groups = [-1 - i for i in indices]
    return pack([(e.prompt_ids, e.response_ids) for e in chosen], source=EXPERT, group_ids=groups)
