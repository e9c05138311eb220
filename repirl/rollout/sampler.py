"""The sampler: everything between prompts and verified rollouts.

It owns the engine and knows which of the policy's weights it has, the order of the prompts, and rollouts that are
sampled beside the training.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from repirl.batch import PackedBatch, pack
from repirl.config import Config, ConfigError
from repirl.data.prompts import Cursor, Prompt, PromptSet
from repirl.data.text import find_end_tokens
from repirl.learner import Learner
from repirl.models import forward_flops
from repirl.rollout.engine import Engine, MismatchError, Response, Sampling, sequence_seed
from repirl.verify.process import Verifier
from repirl.work import PhaseTimer

# How far log-probabilities of one model may be apart between padded decoding with a KV cache and the trainer's packed
# pass, at temperature 1. What is bounded, and by how much:
# float32: rounding made 5e-5 at most over 1500 tokens of SmolLM2-135M, a sampler without a cache 26 (4 in the mean).
# bfloat16 has tails that no bound on single tokens can tell from a fault (0.3 at temperature 1, 0.6 at 0.3), but a mean
# of 0.04 at either, vLLM's up to 0.08. TensorFloat-32 on a GPU has half precision's digits, and float32's range.
SAMPLER_BOUNDS = {"float32": ("max", 1e-2), "TensorFloat-32": ("mean", 2e-2), "bfloat16": ("mean", 0.25)}


@dataclass
class InFlight:
    """Responses that are being sampled for a turn, or were sampled and wait for it.

    rows: of the turn's prompts in the data. mine: places, in the list of prompts, of those that this process
    samples. future: their responses.
    """

    turn: int
    rows: list[int]
    mine: list[int]
    future: Future[list[Response]]


class Sampler:
    """Samples responses to prompts from the policy and has them judged; all processes call the same methods alike.

    policy: whose weights the engine is given. prompts: to sample on turn by turn; None where only `ask` is called.
    timer: of the phases `push_weights` and `rollout`.
    """

    def __init__(
        self,
        config: Config,
        policy: Learner,
        tokenizer: PreTrainedTokenizerBase,
        engine: Engine,
        verifier: Verifier,
        prompts: PromptSet | None,
        timer: PhaseTimer,
    ) -> None:
        self.config, self.policy, self.tokenizer = config, policy, tokenizer
        self.engine, self.verifier, self.prompts, self.timer = engine, verifier, prompts, timer
        self.world = policy.world
        self._end_ids = find_end_tokens(config.data, tokenizer, config.policy.model).ids
        self._cursor = Cursor(len(prompts), config.seed) if prompts is not None else None
        self._in_flight: InFlight | None = None
        # Where the engine samples beside the training; None: in its turn.
        overlaps = config.rollout.overlap != "none"
        self._background = ThreadPoolExecutor(1, "rollout") if overlaps else None
        # The version of the policy's weights that the engine has.
        self._pushed: int | None = None

    # Turn by turn.

    def rollouts(self, turn: int, *, last: bool) -> tuple[PackedBatch, dict[str, float]]:
        """The verified rollouts of a turn, and what to report of them; with `rollout.overlap: step` the next turn's are
        begun, unless this is the last: they are sampled from weights that this turn is about to improve."""
        if self._in_flight is None:
            self._push()
        with self.timer("rollout"):
            if self._in_flight is None:
                self._begin(turn)
            batch, metrics = self._finish(turn)
        if self.config.rollout.overlap == "step" and not last:
            self._push()
            self._begin(turn + 1)
        self._rest()
        return batch, metrics

    def policy_updated(self, turn: int, *, last: bool) -> None:
        """The policy has this turn's weights: with `rollout.overlap: prm` the next turn's rollouts are begun."""
        if self.config.rollout.overlap == "prm" and not last:
            self._push()
            self._begin(turn + 1)

    def _push(self) -> None:
        with self.timer("push_weights"):
            self._ready_engine()

    def _ready_engine(self) -> None:
        """The engine is awake and has the policy's present weights."""
        self.engine.wake()
        if self._pushed != self.policy.version:
            self.engine.update_weights(self.policy)
            self._pushed = self.policy.version

    def _rest(self) -> None:
        """The engine gives its memory to the training, unless it still samples."""
        if self._in_flight is None:
            self.engine.sleep()

    def _begin(self, turn: int) -> None:
        """Start sampling K responses for each prompt of a turn, with the weights that the engine has now."""
        assert self._cursor is not None
        config = self.config.rollout
        rows = self._cursor.next(config.prompts_per_step)
        num_samples = config.samples_per_prompt
        seeds = [sequence_seed(self.config.seed, turn, g, i) for g in range(len(rows)) for i in range(num_samples)]
        mine, future = self._submit(self._prompts_of(rows), seeds, config.temperature)
        self._in_flight = InFlight(turn, rows, mine, future)

    def _finish(self, turn: int) -> tuple[PackedBatch, dict[str, float]]:
        in_flight, self._in_flight = self._in_flight, None
        assert in_flight is not None
        assert in_flight.turn == turn
        prompts = self._prompts_of(in_flight.rows)
        judged = self._judge(prompts, in_flight.mine, in_flight.future.result())
        responses = [response for response, _ in judged]
        batch = pack(
            [(p.token_ids, r.token_ids) for p, r in zip(prompts, responses, strict=True)],
            group_ids=[i // self.config.rollout.samples_per_prompt for i in range(len(prompts))],
            outcome=[float("nan") if outcome is None else outcome for _, outcome in judged],
            streams={"sampler_logprob": [r.logprobs for r in responses]},
        )
        metrics = {
            "rollout/length": batch.num_response_tokens / batch.num_sequences,
            "rollout/truncated": sum(not r.ended for r in responses) / len(responses),
            "tokens": batch.num_tokens,
            "tokens/response": batch.num_response_tokens,
        }
        if self.config.data.answer_column is not None:
            metrics |= self._verifier_metrics() | {"rollout/outcome": float(batch.outcome.mean())}
        return batch, metrics

    def _verifier_metrics(self) -> dict[str, float]:
        verifier = self.verifier
        counts = self.world.gather([(verifier.num_timeouts, verifier.num_overlong)])
        timeouts, overlong = (sum(count) for count in zip(*counts, strict=True))
        return {"rollout/verifier_timeouts": timeouts, "rollout/verifier_overlong": overlong}

    def _prompts_of(self, rows: list[int]) -> list[Prompt]:
        assert self.prompts is not None
        return [self.prompts[row] for row in rows for _ in range(self.config.rollout.samples_per_prompt)]

    # Whatever is asked.

    def ask(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], temperature: float
    ) -> list[tuple[Response, float | None]]:
        """A response of the present policy to each prompt, and its verdict (None where the prompt has no answer)."""
        if self._in_flight is not None and self._pushed != self.policy.version:
            # These are sampled from older weights: the engine gets the present ones when it is done with everybody's.
            self._in_flight.future.result()
            self.world.barrier()
        self._ready_engine()
        mine, future = self._submit(prompts, seeds, temperature)
        judged = self._judge(prompts, mine, future.result())
        self._rest()
        return judged

    def _submit(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], temperature: float
    ) -> tuple[list[int], Future[list[Response]]]:
        """Start sampling a response to each prompt; each process samples its share. Returns the places of this
        process's prompts, and their responses to be."""
        config = self.config.rollout
        # Sequences of one prompt stay on one process: their prompt is prefilled once.
        place: dict[tuple[int, ...], int] = {}
        shares = [place.setdefault(prompt.token_ids, len(place)) % self.world.size for prompt in prompts]
        mine = [i for i, share in enumerate(shares) if share == self.world.rank]
        if self.policy.residency is not None and config.engine != "transformers":
            # The engine has weights of its own: no model of the trainer's is needed meanwhile.
            self.policy.residency.use(None)
        sampling = Sampling(config.max_response_tokens, temperature, self._end_ids)
        arguments = ([prompts[i].token_ids for i in mine], [seeds[i] for i in mine], sampling)
        if self._background is not None:
            return mine, self._background.submit(self.engine.generate, *arguments)
        future: Future[list[Response]] = Future()
        future.set_result(self.engine.generate(*arguments))
        return mine, future

    def _judge(
        self, prompts: Sequence[Prompt], mine: list[int], responses: list[Response]
    ) -> list[tuple[Response, float | None]]:
        """Everybody's responses with their verdicts, in the order of the prompts; each process judges its own.

        One that ran into the length limit is judged like any other: what it wrote may hold an answer; the share of such
        responses is the metric `rollout/truncated`.
        """
        if responses:
            pairs = [(prompts[i].token_ids, r.token_ids) for i, r in zip(mine, responses, strict=True)]
            self.policy.work.tokens += sum(len(response) for _, response in pairs)
            self.policy.work.flops += sum(forward_flops(self.policy.model, pack(pairs), reads_values=False))
        texts = {
            i: (self._text(response), answer)
            for i, response in zip(mine, responses, strict=True)
            if (answer := prompts[i].answer) is not None
        }
        verdicts = dict(zip(texts, self.verifier.judge(list(texts.values())), strict=True))
        judged = [(i, response, verdicts.get(i)) for i, response in zip(mine, responses, strict=True)]
        return [(response, outcome) for _, response, outcome in sorted(self.world.gather(judged), key=lambda x: x[0])]

    def _text(self, response: Response) -> str:
        # Not every end token is special to the tokenizer.
        token_ids = response.token_ids[:-1] if response.ended else response.token_ids
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    def check(self, mismatch: Tensor) -> None:
        """MismatchError where the policy's own sampler is further from the trainer than rounding explains. The vLLM
        engines are checked whenever they are given weights, and may sample from older ones than those of the trainer.

        mismatch: |log pi_old - log mu| of each response token, equal on all processes.
        """
        config = self.config
        if config.rollout.engine != "transformers":
            return
        precision = "bfloat16" if "bfloat16" in (config.dtype, config.computes_in) else "float32"
        if precision == "float32" and self.world.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
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
            f"{transformers.__version__} and {type(self.policy.model).__name__} do not decode with a KV cache as "
            "repirl expects: install a release of transformers that the extra repirl[train] allows, or choose "
            "rollout.engine: vllm"
        )

    # Checkpoints, and the end.

    def state_dict(self) -> dict[str, Any]:
        """The place in the prompts, and rollouts in flight, which are waited for: they were sampled from weights that
        may be gone by the time the run goes on, so they could not be sampled again. Equal on all processes."""
        cursor = self._cursor.state_dict() if self._cursor is not None else None
        if self._in_flight is None:
            return {"cursor": cursor, "in_flight": None}
        mine = zip(self._in_flight.mine, self._in_flight.future.result(), strict=True)
        everybody = sorted(self.world.gather([(i, astuple(r)) for i, r in mine]))
        in_flight = {
            "turn": self._in_flight.turn,
            "rows": self._in_flight.rows,
            "responses": [r for _, r in everybody],
            "made_with": self._made_with(),
        }
        return {"cursor": cursor, "in_flight": in_flight}

    def _made_with(self) -> dict[str, Any]:
        """Options that rollouts in flight depend on."""
        rollout = self.config.rollout
        return {"rollout.samples_per_prompt": rollout.samples_per_prompt, "rollout.overlap": rollout.overlap}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Take back what `state_dict` gave, on any number of processes. ConfigError where the checkpoint is of other
        data, or holds rollouts that were made with another value of an option."""
        if self._cursor is not None:
            if state is None or state["cursor"] is None:
                raise ConfigError("the checkpoint is of a run without prompts; it had another objective")
            self._cursor.load_state_dict(state["cursor"])
        in_flight = state["in_flight"] if state is not None else None
        if in_flight is None:
            return
        for name, value in self._made_with().items():
            if value != (before := in_flight["made_with"][name]):
                raise ConfigError(
                    f"{name} is {value!r}, but the checkpoint holds rollouts that were made with {before!r}: go on "
                    "with that, or from a checkpoint without rollouts in flight"
                )
        responses = [Response(*fields) for fields in in_flight["responses"]]
        mine = list(range(len(responses)))[self.world.rank :: self.world.size]
        future: Future[list[Response]] = Future()
        future.set_result([responses[i] for i in mine])
        self._in_flight = InFlight(in_flight["turn"], in_flight["rows"], mine, future)

    def close(self) -> None:
        """Wait for what is being sampled, and end engine and verifier."""
        if self._background is not None:
            self._background.shutdown()
        self.engine.close()
        self.verifier.close()

    def abort(self) -> None:
        """The run has failed: nothing that is being sampled is waited for."""
        if self._background is not None:
            self._background.shutdown(wait=False, cancel_futures=True)
            self.engine.close()
        self.verifier.close()
