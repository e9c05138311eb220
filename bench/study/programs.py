"""What is wrong with the programs that a trained policy writes, and how many are judged a second."""

from __future__ import annotations

import time
from typing import Any

from repirl.apps.sample import policy_sampler
from repirl.checkpoint.manifest import resolve_checkpoint
from repirl.config import Config
from repirl.data.prompts import load_prompts
from repirl.data.responses import decode_response
from repirl.data.text import find_end_tokens
from repirl.evaluate import ask_held_out
from repirl.sources import check_sources
from repirl.verify.code import KINDS, CodeVerifier

# Programs that are judged in a row while the clock runs.
TIMED = 400


def judge_programs(config: Config) -> dict[str, Any]:
    """Judge the programs that a run's last checkpoint writes for the held-out prompts.

    Args:
        config: the run's; its verifier is one of programs.

    Returns:
        `responses`, how many; `wrong`, of these the number by each reason that occurred (keys of
        repirl.verify.code.KINDS); `judged_per_second`, with `verifier.processes` at a time.
    """
    tokenizer = check_sources(config)
    held_out = load_prompts(config.data, tokenizer, "eval")
    ends = find_end_tokens(config.data, tokenizer, config.policy.model)
    with policy_sampler(config, tokenizer, resolve_checkpoint(config.output_dir)) as sampler:
        answers = ask_held_out(sampler, held_out, config)
    texts = [decode_response(response.token_ids, ends, tokenizer) for response, _ in answers]
    pairs = [(text, str(prompt.answer)) for text, prompt in zip(texts, held_out.prompts, strict=False)]
    verifier = CodeVerifier(config.verifier)
    try:
        verifier.judge(pairs)
        wrong = {kind: verifier.counts[kind] for kind in KINDS if verifier.counts[kind]}
        timed = (pairs * (1 + TIMED // len(pairs)))[:TIMED]
        begin = time.perf_counter()
        verifier.judge(timed)
        seconds = time.perf_counter() - begin
    finally:
        verifier.close()
    return {"responses": len(pairs), "wrong": wrong, "judged_per_second": len(timed) / seconds}
