"""Builds the sampling engine that a configuration names."""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedTokenizerBase

from repirl.config import Config
from repirl.learner import Learner
from repirl.rollout.engine import Engine
from repirl.rollout.transformers import TransformersEngine

logger = logging.getLogger(__name__)


def make_engine(config: Config, policy: Learner, tokenizer: PreTrainedTokenizerBase) -> Engine:
    """Build the engine that `rollout.engine` names.

    Raises:
        ConfigError: the engine is not installed, cannot run the model, or (a server) was started with other options.
        EngineError: no server answers in time.
    """
    rollout, options = config.rollout, config.rollout.vllm
    if rollout.by_policy:
        return TransformersEngine(policy, pad_id=tokenizer.pad_token_id, max_sequences=rollout.max_sequences)
    if config.adapters is not None and config.computes_in == "bfloat16":
        logger.warning(
            "with adapters, vLLM in bfloat16 samples from their sum with the base rounded to bfloat16, in which small "
            "adapters vanish: rollout/sampler_mismatch_max tells how far it is from what is trained"
        )
    if rollout.engine == "vllm":
        from repirl.rollout.vllm import VLLMEngine

        return VLLMEngine(
            policy.model.config,
            options,
            dtype=getattr(torch, config.computes_in),
            max_model_len=config.data.max_prompt_tokens + rollout.max_response_tokens,
            max_sequences=rollout.max_sequences,
        )
    from repirl.rollout.vllm_server import VLLMServerEngine

    return VLLMServerEngine(
        options.url,
        # All processes send requests to the same server, so they share its places.
        max_sequences=max(1, rollout.max_sequences // policy.world.size),
        timeout_seconds=options.timeout_seconds,
        push_host=options.push_host,
    )
