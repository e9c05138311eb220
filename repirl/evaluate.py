"""Held-out accuracy."""

from __future__ import annotations

from contextlib import closing

from repirl.checkpoint.load import load_weights
from repirl.checkpoint.manifest import resolve_checkpoint
from repirl.config import Config, ConfigError
from repirl.data.prompts import PromptSet, load_prompts
from repirl.distributed.world import join_world
from repirl.models import load_tokenizer
from repirl.rollout.choose import make_engine
from repirl.rollout.engine import sequence_seed
from repirl.rollout.sampler import Sampler
from repirl.run import build_learners, set_up_process
from repirl.verify.process import Verifier
from repirl.work import PhaseTimer


def evaluate(sampler: Sampler, held_out: PromptSet, config: Config) -> float:
    """The accuracy: the share of held-out prompts that the policy answers correctly.

    Args:
        sampler: samples and judges the answers.
        held_out: the prompts, of which the first `eval.num_prompts` are used.
        config: the run's configuration. `eval.temperature` 0 means greedy decoding. `eval.verifier` judges, if it is
            set, else `verifier`.
    """
    prompts = held_out.prompts[: config.eval.num_prompts]
    seeds = [sequence_seed(config.seed, "eval", i) for i in range(len(prompts))]
    if config.eval.verifier is None:
        judged = sampler.ask(prompts, seeds, config.eval.temperature)
    else:
        with closing(Verifier(config.eval.verifier)) as verifier:
            judged = sampler.ask(prompts, seeds, config.eval.temperature, verifier)
    return sum(outcome or 0.0 for _, outcome in judged) / len(prompts)


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
    set_up_process(config)
    world, timer = join_world(config), PhaseTimer()
    tokenizer = load_tokenizer(config.policy.model, config.policy.gguf_file)
    held_out = load_prompts(config.data, tokenizer, "eval")
    policy = build_learners(config, world, timer.work, ("policy",))["policy"]
    engine, verifier = make_engine(config, policy, tokenizer), Verifier(config.verifier)
    sampler = Sampler(config, policy, tokenizer, engine, verifier, None, timer)
    try:
        if path is not None:
            load_weights(path, "policy", policy)
        accuracy = evaluate(sampler, held_out, config)
    finally:
        sampler.close()
        if policy.residency is not None:
            policy.residency.close()
    return accuracy, len(held_out.prompts[: config.eval.num_prompts])
