"""Held-out accuracy, and the verifier's verdict on one response."""

from __future__ import annotations

from repirl.config import Config, ConfigError
from repirl.dist.checkpoint import load_weights, resolve_checkpoint
from repirl.rewards.math import math_reward
from repirl.rollout.engine import Response, Sampling, sequence_seed
from repirl.setup import Run, build


def verify(run: Run, response: Response, answer: str) -> float:
    """1.0 where the response's final answer is right. One that ran into the length limit is judged like any
    other: what it wrote may hold an answer; the share of such responses is the metric `rollout/truncated`."""
    return math_reward(run.tokenizer.decode(response.token_ids, skip_special_tokens=True), answer)


def evaluate(run: Run) -> float:
    """Share of held-out prompts that the policy answers right; greedy at eval.temperature 0."""
    config = run.config
    prompts = run.held_out.prompts[: config.eval.num_prompts]
    seeds = [sequence_seed(config.seed, "eval", i) for i in range(len(prompts))]
    sampling = Sampling(config.rollout.max_response_tokens, config.eval.temperature, (run.tokenizer.eos_token_id,))
    responses = run.engine.generate([p.token_ids for p in prompts], seeds, sampling)
    return sum(verify(run, r, p.answer) for r, p in zip(responses, prompts, strict=True)) / len(prompts)


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
        load_weights(path, "policy", run.policy.model)
    return evaluate(run), len(run.held_out.prompts[: config.eval.num_prompts])
