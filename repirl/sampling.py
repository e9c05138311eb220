"""The batches of a step: rollouts, experts, and the frozen reference's view of either."""

from __future__ import annotations

from repirl.batch import EXPERT, PackedBatch, pack
from repirl.evaluate import verify
from repirl.rollout.engine import Sampling, sequence_seed
from repirl.setup import Run


def write_reference(run: Run, batch: PackedBatch) -> None:
    """The frozen reference's streams: `ref_logprob` at the policy's temperature, `prm_ref_logprob` at the PRM's."""
    if run.reference:
        batch.write("ref_logprob", run.reference.score(batch)["logprob"])
        if run.prm and run.config.prm.reward == "implicit":
            batch.write("prm_ref_logprob", run.reference.score(batch, run.prm.temperature)["logprob"])


def sample_rollouts(run: Run, step: int) -> tuple[PackedBatch, dict[str, float]]:
    """K responses for each prompt of the step, verified where prompts have answers."""
    config, num_samples = run.config, run.config.rollout.samples_per_prompt
    indices = run.prompt_cursor.next(config.rollout.prompts_per_step)
    prompts = [run.prompts[i] for i in indices for _ in range(num_samples)]
    groups = [g for g in range(len(indices)) for _ in range(num_samples)]
    seeds = [sequence_seed(config.seed, step, groups[i], i % num_samples) for i in range(len(prompts))]
    end_ids = (run.tokenizer.eos_token_id,)
    sampling = Sampling(config.rollout.max_response_tokens, config.rollout.temperature, end_ids)
    responses = run.engine.generate([p.token_ids for p in prompts], seeds, sampling)
    has_answers = config.data.answer_column is not None
    outcome = [
        verify(run, r, p.answer) if has_answers else float("nan") for r, p in zip(responses, prompts, strict=True)
    ]
    batch = pack(
        [(p.token_ids, r.token_ids) for p, r in zip(prompts, responses, strict=True)],
        group_ids=groups,
        outcome=outcome,
        streams={"sampler_logprob": [r.logprobs for r in responses]},
    )
    metrics = {
        "rollout/length": batch.num_response_tokens / batch.num_sequences,
        "rollout/truncated": sum(not r.ended for r in responses) / len(responses),
        "tokens": batch.num_tokens,
        "tokens/response": batch.num_response_tokens,
    }
    return batch, metrics | ({"rollout/outcome": float(batch.outcome.mean())} if has_answers else {})


def sample_experts(run: Run) -> PackedBatch:
    indices = run.expert_cursor.next(run.config.irl.experts_per_step or run.config.rollout.prompts_per_step)
    chosen = [run.experts[i] for i in indices]
    # Groups of their own: experts estimate no Z.
    groups = [-1 - i for i in range(len(chosen))]
    return pack([(e.prompt_ids, e.response_ids) for e in chosen], source=EXPERT, group_ids=groups)
