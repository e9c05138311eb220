"""The sampler: everything between prompts and verified rollouts.

It owns the engine. It keeps which version of the policy's weights the engine has, the position in the prompts, rollouts
that are sampled while the training goes on, and prompts that passed a filter but were not needed yet."""

from __future__ import annotations

import dataclasses
import math
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
from repirl.data.text import find_end_tokens, response_text
from repirl.fused import forward_flops
from repirl.learner import Learner
from repirl.rollout.engine import Engine, MismatchError, Response, Sampling, sequence_seed
from repirl.rollout.filter import Group, Sampled, sample_filtered, without
from repirl.verify.choose import AnyVerifier, count_metrics, make_verifier
from repirl.work import PhaseTimer

# The same model gives slightly different log-probabilities in padded decoding with a KV cache and in the trainer's
# packed pass. These are the largest differences, in nats at temperature 1, that count as rounding: a bound on the
# largest difference of a token, or on the mean over the tokens. Measured on 1500 tokens of SmolLM2-135M:
# float32: rounding causes at most 5e-5; a sampler whose cache does not work is wrong by up to 26 (4 in the mean).
# bfloat16: single tokens differ by up to 0.3 (0.6 at temperature 0.3), which could as well be a fault. The mean is 0.04
# at both temperatures (vLLM: up to 0.08), so the mean is bounded. TensorFloat-32 rounds like half precision.
SAMPLER_BOUNDS = {"float32": ("max", 1e-2), "TensorFloat-32": ("mean", 2e-2), "bfloat16": ("mean", 0.25)}


@dataclass
class InFlight:
    """Responses for a turn that has not used them yet; they may still be sampled at this moment.

    Args:
        turn: the turn that will use them.
        rows: the row numbers of the turn's prompts in the data.
        mine: the indices, in the turn's list of prompts, of those that this process samples.
        future: the responses to the prompts in `mine`.
    """

    turn: int
    rows: list[int]
    mine: list[int]
    future: Future[list[Response]]


class Sampler:
    """Samples responses to prompts from the policy and judges them.

    All processes call the same methods with the same arguments.

    Args:
        config: the run's configuration.
        policy: the learner whose weights the engine samples from.
        tokenizer: turns responses into text for the verifier.
        engine: samples the responses. `close` also closes the engine.
        verifier: judges rollouts. `close` also closes it, and the one of `eval.verifier`.
        prompts: the training prompts, used turn by turn; None if only `ask` is called.
        timer: measures the phases `push_weights` and `rollout`.
    """

    def __init__(
        self,
        config: Config,
        policy: Learner,
        tokenizer: PreTrainedTokenizerBase,
        engine: Engine,
        verifier: AnyVerifier,
        prompts: PromptSet | None,
        timer: PhaseTimer,
    ) -> None:
        self.config, self.policy, self.tokenizer = config, policy, tokenizer
        self.engine, self.verifier, self.prompts, self.timer = engine, verifier, prompts, timer
        self.held_out_verifier = verifier if config.eval.verifier is None else make_verifier(config.eval.verifier)
        self.world = policy.world
        self._end_ids = find_end_tokens(config.data, tokenizer, config.policy.model).ids
        self._cursor = Cursor(len(prompts), config.seed) if prompts is not None else None
        self.sampled: Sampled | None = None  # of the last turn
        self._in_flight: InFlight | None = None
        self._surplus: list[Group] = []  # prompts that passed the filter beyond those of the last turn
        # [R] bool, whether the response tokens of the last batch come from the present weights.
        self._fresh: Tensor | None = None
        # The thread in which the engine samples during the training; None: sampling and training alternate.
        overlaps = config.rollout.overlap != "none"
        self._background = ThreadPoolExecutor(1, "rollout") if overlaps else None
        # The version of the policy's weights that the engine has.
        self._pushed: int | None = None

    # Turn by turn.

    def rollouts(self, turn: int, *, last: bool) -> tuple[PackedBatch | None, dict[str, float]]:
        """Sample and verify the rollouts of a turn.

        With `rollout.overlap: step` this also starts to sample the next turn's rollouts, from the weights before this
        turn's updates, unless this is the last turn. With `rollout.filter` it samples until enough prompts pass.

        Returns:
            The rollouts, None if no prompt passed the filter; and the metrics to report. The metrics "rollout/" are
            means over all responses sampled for this turn, also those that were filtered out.
        """
        if self._in_flight is None:
            self._push()
        with self.timer("rollout"):
            if self.config.rollout.filter is not None:
                kept, sampled, metrics = self._filtered(turn)
            else:
                if self._in_flight is None:
                    self._begin(turn, self.config.rollout.prompts_per_step)
                kept = sampled = self._finish(turn)
                metrics = {}
            batch = self._pack(kept) if kept else None
            self.sampled = Sampled(kept, without(sampled, [*kept, *self._surplus]), batch)
            metrics |= self._metrics(sampled, batch)
        if self.config.rollout.overlap == "step" and not last:
            self._push()
            self._begin(turn + 1, self.config.rollout.prompts_per_step)
        self._rest()
        return batch, metrics

    def policy_updated(self, turn: int, *, last: bool) -> None:
        """Call this after the policy's updates of a turn. With `rollout.overlap: prm` it starts the next rollouts."""
        if self.config.rollout.overlap == "prm" and not last:
            self._push()
            self._begin(turn + 1, self.config.rollout.prompts_per_step)

    def _push(self) -> None:
        with self.timer("push_weights"):
            self._ready_engine()

    def _ready_engine(self) -> None:
        """Wake the engine, and send it the policy's weights if they have changed or the engine gave them up."""
        self.engine.wake()
        if self._pushed != self.policy.version or not self.engine.has_weights:
            self.engine.update_weights(self.policy)
            self._pushed = self.policy.version

    def _rest(self) -> None:
        """Let the engine free its memory for the training, unless it is still sampling."""
        if self._in_flight is None:
            self.engine.sleep()

    def _filtered(self, turn: int) -> tuple[list[Group], list[Group], dict[str, float]]:
        """Sample in rounds; returns the prompts that are kept, all that were sampled, and the filter's metrics.

        All processes see all outcomes, so they take the same decisions.
        """
        config = self.config.rollout
        assert config.filter is not None

        def sample(count: int, start: int) -> list[Group]:
            self._begin(turn, count, start)
            return self._finish(turn)

        result = sample_filtered(config.filter, config.prompts_per_step, self._surplus, sample)
        surplus = result.surplus if config.keeps_surplus else []
        self._surplus = [dataclasses.replace(group, fresh=False) for group in surplus]
        return result.kept, result.sampled, result.metrics

    def _begin(self, turn: int, num_prompts: int, start: int = 0) -> None:
        """Start sampling K responses for each of the next prompts, with the weights that the engine has now.

        Args:
            turn: the turn that will use them.
            num_prompts: the number of prompts.
            start: the number of prompts that were sampled for this turn before; the seeds continue there.
        """
        assert self._cursor is not None
        config = self.config.rollout
        rows = self._cursor.next(num_prompts)
        num_samples, numbers = config.samples_per_prompt, range(start, start + num_prompts)
        seeds = [sequence_seed(self.config.seed, turn, g, i) for g in numbers for i in range(num_samples)]
        mine, future = self._submit(self._prompts_of(rows), seeds, config.temperature)
        self._in_flight = InFlight(turn, rows, mine, future)

    def _finish(self, turn: int) -> list[Group]:
        """Wait for what `_begin` started, and judge it."""
        in_flight, self._in_flight = self._in_flight, None
        assert in_flight is not None
        assert in_flight.turn == turn
        prompts = self._prompts_of(in_flight.rows)
        judged = self._judge(prompts, in_flight.mine, in_flight.future.result(), self.verifier)
        num_samples, groups = self.config.rollout.samples_per_prompt, []
        for i, row in enumerate(in_flight.rows):
            responses, outcomes = zip(*judged[i * num_samples : (i + 1) * num_samples], strict=True)
            groups.append(Group(row, [*responses], [float("nan") if x is None else x for x in outcomes]))
        return groups

    def _pack(self, groups: list[Group]) -> PackedBatch:
        prompts = self._prompts_of([group.row for group in groups])
        responses = [response for group in groups for response in group.responses]
        fresh = [group.fresh for group in groups for response in group.responses for _ in response.token_ids]
        self._fresh = torch.tensor(fresh)
        return pack(
            [(p.token_ids, r.token_ids) for p, r in zip(prompts, responses, strict=True)],
            group_ids=[i for i, group in enumerate(groups) for _ in group.responses],
            outcome=[outcome for group in groups for outcome in group.outcomes],
            streams={"sampler_logprob": [r.logprobs for r in responses]},
        )

    def _metrics(self, groups: list[Group], batch: PackedBatch | None) -> dict[str, float]:
        """The metrics of all sampled groups, and of the batch that is trained on."""
        responses = [response for group in groups for response in group.responses]
        metrics: dict[str, float] = {"tokens": 0, "tokens/response": 0}
        if batch is not None:
            metrics = {"tokens": batch.num_tokens, "tokens/response": batch.num_response_tokens}
        if responses:
            metrics |= {
                "rollout/length": sum(len(r.token_ids) for r in responses) / len(responses),
                "rollout/truncated": sum(not r.ended for r in responses) / len(responses),
            }
        if self.config.data.answer_column is not None:
            metrics |= self._verifier_metrics()
            if responses:
                outcomes = torch.tensor([outcome for group in groups for outcome in group.outcomes])
                metrics["rollout/outcome"] = float(outcomes.mean())
        return metrics

    def _verifier_metrics(self) -> dict[str, float]:
        counts = count_metrics(self.world.gather([self.verifier.counts]))
        return {f"rollout/verifier_{name}": value for name, value in counts.items()}

    def _prompts_of(self, rows: list[int]) -> list[Prompt]:
        assert self.prompts is not None
        return [self.prompts[row] for row in rows for _ in range(self.config.rollout.samples_per_prompt)]

    # Prompts outside the turns, such as held-out ones.

    def ask(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], temperature: float, verifier: AnyVerifier | None = None
    ) -> list[tuple[Response, float | None]]:
        """Sample a response from the policy's current weights for each prompt, and judge it.

        Args:
            prompts: the prompts.
            seeds: one for each prompt.
            temperature: of sampling; 0 is greedy.
            verifier: judges the responses; by default the one that judges the rollouts.

        Returns:
            For each prompt, in order, the response and its verdict: 1.0 if right, 0.0 if wrong, None if the prompt has
            no answer.
        """
        if self._in_flight is not None and self._pushed != self.policy.version:
            # The rollouts in flight need the older weights: wait until all processes have sampled theirs.
            self._in_flight.future.result()
            self.world.barrier()
        self._ready_engine()
        mine, future = self._submit(prompts, seeds, temperature)
        judged = self._judge(prompts, mine, future.result(), verifier or self.verifier)
        self._rest()
        return judged

    def _submit(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], temperature: float
    ) -> tuple[list[int], Future[list[Response]]]:
        """Start to sample a response for each prompt; each process samples a part of them. Returns the indices of this
        process's prompts, and a future of their responses."""
        config = self.config.rollout
        # All samples of a prompt go to one process, which then prefills the prompt only once.
        place: dict[tuple[int, ...], int] = {}
        shares = [place.setdefault(prompt.token_ids, len(place)) % self.world.size for prompt in prompts]
        mine = [i for i, share in enumerate(shares) if share == self.world.rank]
        if self.policy.residency is not None and not config.by_policy:
            # The engine has its own copy of the weights, so all training models can leave the device while it samples.
            self.policy.residency.use(None)
        sampling = Sampling(config.max_response_tokens, temperature, self._end_ids)
        arguments = ([prompts[i].token_ids for i in mine], [seeds[i] for i in mine], sampling)
        if self._background is not None:
            return mine, self._background.submit(self.engine.generate, *arguments)
        future: Future[list[Response]] = Future()
        future.set_result(self.engine.generate(*arguments))
        return mine, future

    def _judge(
        self, prompts: Sequence[Prompt], mine: list[int], responses: list[Response], verifier: AnyVerifier
    ) -> list[tuple[Response, float | None]]:
        """Judge this process's responses, and return those of all processes with their verdicts, in prompt order.

        A response that reached the length limit is judged like any other, because it may already contain the answer.
        The metric `rollout/truncated` is the share of such responses.
        """
        if responses:
            pairs = [(prompts[i].token_ids, r.token_ids) for i, r in zip(mine, responses, strict=True)]
            self.policy.work.tokens += sum(len(response) for _, response in pairs)
            self.policy.work.flops += sum(forward_flops(self.policy.model, pack(pairs), reads_values=False))
        texts = {
            i: (response_text(response.token_ids, self.tokenizer, ended=response.ended), answer)
            for i, response in zip(mine, responses, strict=True)
            if (answer := prompts[i].answer) is not None
        }
        verdicts = dict(zip(texts, verifier.judge(list(texts.values())), strict=True))
        judged = [(i, response, verdicts.get(i)) for i, response in zip(mine, responses, strict=True)]
        everybodys = sorted(self.world.gather(judged), key=lambda x: x[0])
        self._check_finite([response for _, response, _ in everybodys])
        return [(response, outcome) for _, response, outcome in everybodys]

    def _check_finite(self, responses: Sequence[Response]) -> None:
        """MismatchError where there are log-probabilities of NaN: tokens were drawn from logits that are not finite."""
        count = sum(math.isnan(sum(response.logprobs)) for response in responses)
        if count:
            raise MismatchError(
                f"{count} of {len(responses)} responses were sampled from logits that are not finite: the policy's "
                f"weights are finite, but too large to be computed with in {self.config.computes_in}; go on from an "
                "earlier checkpoint with a lower policy.optimizer.lr"
            )

    def check(self, mismatch: Tensor) -> None:
        """Check that the engine `transformers` samples from the policy; for other engines nothing is checked here.

        The vLLM engines are checked each time they get new weights. Later they may rightly differ from the trainer,
        because they may sample from older weights.

        Args:
            mismatch: |log pi_old - log mu| of each response token, [R], in nats; the same on all processes.

        Raises:
            MismatchError: the difference is larger than rounding explains.
        """
        config = self.config
        if not config.rollout.by_policy:
            return
        if self._fresh is not None:
            # Those of older weights may rightly differ.
            mismatch = mismatch[self._fresh]
            if mismatch.numel() == 0:
                return
        precision = "bfloat16" if "bfloat16" in (config.dtype, config.computes_in) else "float32"
        if precision == "float32" and self.world.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
            precision = "TensorFloat-32"
        measure, bound = SAMPLER_BOUNDS[precision]
        # The temperature divides the logits, and their rounding errors with them.
        bound /= min(1.0, config.rollout.temperature)
        largest, mean = float(mismatch.max()), float(mismatch.mean())
        # NaN passes this check: an update with a loss that is not finite is skipped and counted by the learner.
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
        """The position in the prompts, the filter's surplus, and the rollouts in flight; the same on all processes.

        This waits for the rollouts in flight. They are saved because a resumed run cannot sample them again: it may no
        longer have the weights that they come from.
        """
        cursor = self._cursor.state_dict() if self._cursor is not None else None
        state: dict[str, Any] = {
            "cursor": cursor,
            "in_flight": None,
            "surplus": [group.state() for group in self._surplus],
        }
        if self._in_flight is None:
            return state
        mine = zip(self._in_flight.mine, self._in_flight.future.result(), strict=True)
        everybody = sorted(self.world.gather([(i, astuple(r)) for i, r in mine]))
        state["in_flight"] = {
            "turn": self._in_flight.turn,
            "rows": self._in_flight.rows,
            "responses": [r for _, r in everybody],
            "made_with": self._made_with(),
        }
        return state

    def _made_with(self) -> dict[str, Any]:
        """The options that must not change while rollouts are in flight, with their values."""
        rollout = self.config.rollout
        return {"rollout.samples_per_prompt": rollout.samples_per_prompt, "rollout.overlap": rollout.overlap}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restore a state that `state_dict` returned, on any number of processes.

        Raises:
            ConfigError: the checkpoint belongs to other data, or contains rollouts that were made with other options.
        """
        if self._cursor is not None:
            if state is None or state["cursor"] is None:
                raise ConfigError("the checkpoint is of a run without prompts; it had another objective")
            self._cursor.load_state_dict(state["cursor"])
        self._load_surplus(state.get("surplus", []) if state is not None else [])
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

    def _load_surplus(self, surplus: list[dict[str, Any]]) -> None:
        self._surplus = [Group.from_state(group) for group in surplus]
        config = self.config.rollout
        if not self._surplus:
            return
        if not config.keeps_surplus:
            raise ConfigError(
                f"the checkpoint holds {len(surplus)} prompts with rollouts for later steps (rollout.filter.surplus: "
                "keep): go on with that option"
            )
        if config.samples_per_prompt != (before := len(self._surplus[0].responses)):
            raise ConfigError(
                f"rollout.samples_per_prompt is {config.samples_per_prompt}, but the checkpoint holds rollouts that "
                f"were made with {before}: go on with that"
            )

    def close(self) -> None:
        """Wait until sampling ends, then close the engine and the verifiers."""
        if self._background is not None:
            self._background.shutdown()
        self.engine.close()
        self._close_verifiers()

    def abort(self) -> None:
        """Close everything after a failure, without waiting until sampling ends."""
        if self._background is not None:
            self._background.shutdown(wait=False, cancel_futures=True)
            self.engine.close()
        self._close_verifiers()

    def _close_verifiers(self) -> None:
        for verifier in {self.verifier, self.held_out_verifier}:
            verifier.close()
