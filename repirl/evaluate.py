"""Held-out accuracy."""

from __future__ import annotations

from repirl.config import Config, ConfigError
from repirl.distributed.checkpoint import load_weights, resolve_checkpoint
from repirl.rollout.engine import Sampling, sequence_seed
from repirl.run import Run, build
from repirl.sampling import begin_responses, judge


def evaluate(run: Run) -> float:
    """Share of held-out prompts that the policy answers right; greedy at eval.temperature 0."""
    config = run.config
    if run.in_flight is not None and not run.engine_is_current:
        # These are sampled from older weights: the engine gets the present ones when it is done with everybody's.
        run.in_flight.future.result()
        run.world.barrier()
    run.ready_engine()
    prompts = run.held_out.prompts[: config.eval.num_prompts]
    seeds = [sequence_seed(config.seed, "eval", i) for i in range(len(prompts))]
    sampling = Sampling(config.rollout.max_response_tokens, config.eval.temperature, (run.tokenizer.eos_token_id,))
    mine, future = begin_responses(run, prompts, seeds, sampling)
    judged = judge(run, prompts, mine, future.result())
    run.rest_engine()
    return sum(outcome or 0.0 for _, outcome in judged) / len(prompts)


def evaluate_checkpoint(config: Config, checkpoint: str | None) -> tuple[float, int]:
    """(accuracy, number of prompts) of a checkpoint's policy, or of policy.model itself without one.

    ConfigError without held-out data, or where the checkpoint is missing.
    """
    if config.data.eval is None:
        raise ConfigError("data.eval is not set: there are no held-out prompts to evaluate on")
    path = resolve_checkpoint(checkpoint) if checkpoint is not None else None
    # Only the policy is needed, so neither a PRM nor a reference is loaded.
    policy_only = {
        "objective": "rloo",
        "loss": config.loss.model_copy(update={"kl_coefficient": 0.0}),
        "data": config.data.model_copy(update={"train": config.data.eval}),
    }
    run = build(config.model_copy(update=policy_only))
    if path is not None:
        load_weights(path, "policy", run.policy)
    accuracy = evaluate(run)
    run.close()
    return accuracy, len(run.held_out.prompts[: config.eval.num_prompts])
