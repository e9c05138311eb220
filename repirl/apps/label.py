"""`repirl label`: labels for the steps of responses, from completions that the policy samples behind each of them."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from repirl.apps.output import ResumableOutput
from repirl.apps.step_labels import METHODS, LabelledTrajectory, hard
from repirl.checkpoint.fingerprints import fingerprint_model
from repirl.config import Config, ConfigError
from repirl.data.problems import Problem, load_problems
from repirl.data.split import Steps, segment
from repirl.distributed.world import World, join_world
from repirl.models import load_tokenizer
from repirl.packing import fit_window
from repirl.rollout.choose import make_engine
from repirl.rollout.completions import Completer, Request, Trajectory
from repirl.run import build_learners, set_up_process
from repirl.verify.choose import make_verifier
from repirl.work import Work


@dataclass
class LabelCounts:
    """What was labelled so far, and what it has cost.

    Args:
        prompts: prompts that are done.
        responses: rows in the output.
        steps: labelled steps in them.
        right: steps among these from which some completion was right.
        completions: responses and completions that were sampled.
        tokens_sampled: tokens in these.
        seconds: of sampling and judging.
        blank: responses without any text, which are left out.
    """

    prompts: int = 0
    responses: int = 0
    steps: int = 0
    right: int = 0
    completions: int = 0
    tokens_sampled: int = 0
    seconds: float = 0.0
    blank: int = 0


def label(config: Config, output: str | os.PathLike | None = None, *, resume: bool = False) -> tuple[LabelCounts, Path]:
    """Label the steps of the responses in `data.train`, or of responses that the policy samples to its prompts.

    Each line of the output holds a response in TRL's format for stepwise supervision: `prompt`, `completions` (the
    steps) and `labels` (hard ones, true and false); beside them `soft_labels`, `finished`, `outcome` and `row`, the
    number of the prompt's row. `data.steps` reads it. OUTPUT.meta.json holds the counts and how labels were made.

    With torchrun all processes call this.

    Args:
        config: the configuration: `label`, `data`, `policy.model`, `rollout`, `verifier` and `seed` are used.
        output: the file to write; None for the one that `data.steps` names.
        resume: go on with the file: prompts that are done are kept, and the result is that of an uninterrupted call.

    Returns:
        The counts, those of earlier calls included, and the file.

    Raises:
        ConfigError: data, models or options that cannot be used, or an output that exists and may not be replaced.
        RunError: the engine or the verifier fails.
    """
    if config.data.train is None or config.data.answer_column is None:
        raise ConfigError("labelling needs prompts with their right answers: set data.train and data.answer_column")
    inputs = [config.data.train.path]
    # The policy is not trained here, whatever the objective is.
    config = config.model_copy(update={"adapters": None})
    config = set_up_process(config, samples=True)
    world = join_world(config)
    tokenizer = load_tokenizer(config.policy.model, config.policy.gguf_file)
    problems = load_problems(config, tokenizer)
    path = _output_path(config, output)
    with ExitStack() as stack:
        file = None
        if world.is_main:
            output_file = ResumableOutput(path, "repirl label", resume=resume, inputs=inputs, unit="prompts")
            file = stack.enter_context(output_file)
            file.begin(_made_with(config, problems), len(problems))
        labels = Labels(file, world)
        if labels.counts.prompts < len(problems):
            _sample_and_label(problems, tokenizer, labels, config)
    return labels.counts, path


def _sample_and_label(
    problems: list[Problem], tokenizer: PreTrainedTokenizerBase, labels: Labels, config: Config
) -> None:
    """Load the policy, and label what is not done yet."""
    world = labels.world
    policy = build_learners(config, world, Work(), ("policy",))["policy"]
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    fit_window(policy.model, config.policy.model, longest)
    verifier = make_verifier(config.verifier)
    completer = Completer(config, policy, tokenizer, make_engine(config, policy, tokenizer), verifier)
    try:
        _label_all(problems, completer, labels, config)
    finally:
        completer.close()
        if policy.residency is not None:
            policy.residency.close()


def _label_all(problems: list[Problem], completer: Completer, labels: Labels, config: Config) -> None:
    """Label batch by batch, always the same ones: a completion depends, by rounding, on those sampled with it."""
    size, separator = config.label.prompts_per_batch, config.data.step_separator
    with Progress(len(problems), completer.world) as progress:
        for start in range(labels.counts.prompts, len(problems), size):
            begun = time.perf_counter()
            batch = problems[start : start + size]
            labelled, sampled = label_batch(batch, completer, config)
            counts = labels.counts
            counts.completions += len(sampled)
            counts.tokens_sampled += sum(t.num_sampled for t in sampled)
            rows = [to_row(p, one, separator) for p, some in zip(batch, labelled, strict=True) for one in some]
            counts.seconds += time.perf_counter() - begun
            labels.write(len(batch), rows)
            progress.show(counts.prompts, f"{counts.steps} steps, {counts.tokens_sampled} tokens sampled")


def label_batch(
    problems: Sequence[Problem], completer: Completer, config: Config
) -> tuple[list[Sequence[LabelledTrajectory]], list[Trajectory]]:
    """Label a few problems, their completions sampled side by side.

    Returns:
        The labelled responses of each problem, and all trajectories that were sampled.
    """

    def split(trajectory: Trajectory) -> Steps:
        separator, ended = config.data.step_separator, trajectory.ended
        return trajectory.steps or segment(trajectory.token_ids, separator, completer.tokenizer, ended=ended)

    given = [(response, problem.answer) for problem in problems for response in problem.responses]
    outcomes = iter(completer.judge([(r.token_ids, True) for r, _ in given], [answer for _, answer in given]))
    # For each problem that is not done: its method, and what this one asks for.
    asking = {}
    for place, problem in enumerate(problems):
        responses = [Trajectory(r.token_ids, True, next(outcomes), steps=r.steps) for r in problem.responses]
        method = METHODS[config.label.method](responses, split, config.rollout.samples_per_prompt, config.label)
        asking[place] = (method, next(method))
    labelled: list[Sequence[LabelledTrajectory]] = [()] * len(problems)
    sampled, rounds = list[Trajectory](), 0
    while asking:
        # A problem asks in every round until it is done, so its seeds are the same whatever the others do.
        requests = [
            Request(problem.prompt_ids, prefix, problem.answer, (problem.index, rounds, i, j))
            for problem, asked in ((problems[place], asked) for place, (_, asked) in asking.items())
            for i, (prefix, count) in enumerate(asked)
            for j in range(count)
        ]
        answers = completer.complete(requests)
        sampled += answers
        rounds += 1
        rest = iter(answers)
        for place, (method, asked) in list(asking.items()):
            try:
                asking[place] = (method, method.send([[next(rest) for _ in range(count)] for _, count in asked]))
            except StopIteration as done:
                labelled[place] = done.value
                del asking[place]
    return labelled, sampled


def to_row(problem: Problem, labelled: LabelledTrajectory, separator: str) -> dict[str, Any]:
    """A line of the output."""
    *texts, last = labelled.steps.texts
    steps = [text.removesuffix(separator) for text in texts]
    return {
        "prompt": problem.prompt,
        "completions": [*steps, last if labelled.finished else last.removesuffix(separator)],
        "labels": [hard(value) for value in labelled.labels],
        "soft_labels": list(labelled.labels),
        "finished": labelled.finished,
        "outcome": labelled.trajectory.outcome,
        "row": problem.index,
    }


class Labels:
    """What is labelled so far: all processes count it, the main one writes it to the output.

    Args:
        file: the output, begun; None in the other processes.
        world: the processes.
    """

    def __init__(self, file: ResumableOutput | None, world: World) -> None:
        self.file, self.world = file, world
        [before] = world.gather([] if file is None else [file.counts])
        self.counts = LabelCounts(**before)

    def write(self, num_prompts: int, rows: list[dict[str, Any]]) -> None:
        """Add the rows of the next prompts, and count them."""
        counts = self.counts
        counts.prompts += num_prompts
        kept = [row for row in rows if any(step.strip() for step in row["completions"])]
        counts.blank += len(rows) - len(kept)
        counts.responses += len(kept)
        labels = [value for row in kept for value in row["labels"] if value is not None]
        counts.steps += len(labels)
        counts.right += sum(labels)
        if self.file is not None:
            lines = [json.dumps(row, ensure_ascii=False) for row in kept]
            self.file.write(lines, asdict(counts), num_prompts)


def _output_path(config: Config, output: str | os.PathLike | None) -> Path:
    if output is not None:
        return Path(output)
    if config.data.steps is None:
        raise ConfigError("where should the labels go? give --output FILE, or set data.steps, which training reads")
    return Path(config.data.steps.path)


def _made_with(config: Config, problems: list[Problem]) -> dict[str, Any]:
    """What the labels depend on, as far as it can be written down."""
    options = {f"label.{name}": value for name, value in config.label.model_dump(mode="json").items()}
    rollout = config.rollout.model_dump(include={"engine", "temperature", "max_response_tokens", "samples_per_prompt"})
    options |= {f"rollout.{name}": value for name, value in rollout.items()}
    verifier = {f"verifier.{name}": getattr(config.verifier, name) for name in ("kind", "function")}
    return (
        options
        | verifier
        | {
            "seed": config.seed,
            "data.step_separator": config.data.step_separator,
            "policy.model": fingerprint_model(config.policy.model, config.policy.gguf_file),
            "data.train": _digest(problems),
        }
    )


def _digest(problems: list[Problem]) -> str:
    """Tells rows apart: their number, and a digest of all that they hold."""
    digest = hashlib.blake2b(digest_size=8)
    for problem in problems:
        digest.update(json.dumps(asdict(problem)).encode() + b"\n")
    return f"{len(problems)} rows, digest {digest.hexdigest()}"


class Progress:
    """Shows how many prompts are done: a bar on a terminal, elsewhere a line now and then. Only the main process does.

    Args:
        num_prompts: of the whole input.
        world: the processes.
        name: what is done.
    """

    def __init__(self, num_prompts: int, world: World, name: str = "label") -> None:
        self.console, self.num_prompts, self.world, self.name = Console(), num_prompts, world, name
        columns = (
            TextColumn(name),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self._bar = rich.progress.Progress(*columns, console=self.console, disable=not self._is_shown)
        self._task = self._bar.add_task("", total=num_prompts)
        self._shown = 0

    @property
    def _is_shown(self) -> bool:
        return self.world.is_main and self.console.is_terminal

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, done: int, figures: str) -> None:
        """Show how many prompts are done, and what came of them."""
        self._bar.update(self._task, completed=done, description=figures)
        due = done == self.num_prompts or done - self._shown >= self.num_prompts / 20
        if self.world.is_main and not self.console.is_terminal and due:
            self.console.print(f"{self.name} {done}/{self.num_prompts}: {figures}", soft_wrap=True)
            self._shown = done


def summary(counts: LabelCounts, path: str) -> str:
    """What was labelled and what it cost, in one line."""
    share = f" ({counts.right / counts.steps:.1%} right)" if counts.steps else ""
    blank = f"; {counts.blank} responses without text left out" if counts.blank else ""
    return (
        f"{counts.steps} labelled steps{share} of {counts.responses} responses to {counts.prompts} prompts{blank}; "
        f"{counts.tokens_sampled} tokens sampled in {counts.completions} completions, {counts.seconds:.0f} s: {path}"
    )
