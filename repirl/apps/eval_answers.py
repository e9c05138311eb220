"""`repirl eval --benchmark`: how well a model answers the problems of a benchmark, or responses that are there do."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from repirl import __version__
from repirl.apps.eval_metrics import Answered, Responses, figures, num_tied, shares
from repirl.apps.eval_sampling import Asked, AskOptions, Given, ask, sampled
from repirl.apps.judge import response_text, verifier_config
from repirl.apps.lines import LinesFile, write_json
from repirl.apps.output import ResumableOutput
from repirl.apps.sample import policy_sampler
from repirl.apps.solutions import as_source
from repirl.config import ConfigError
from repirl.data.sources import read_rows
from repirl.data.values import Place, shown
from repirl.distributed.world import join_world, own_rank
from repirl.evals import BENCHMARKS
from repirl.evals.benchmark import Benchmark, Problem, read_problems
from repirl.output_path import check_folder
from repirl.report.log import is_count
from repirl.run import set_up_process
from repirl.sources import check_sources
from repirl.verify.choose import make_verifier

RESPONSES, RESULTS = "responses.jsonl", "results.json"
# Given responses that are judged at a time.
_CHUNK = 1024
# Reasons that are no fault of a response, and how they are told.
NOT_JUDGED = {
    "right answer not readable": "the right answer of the data could not be read",
    "timed out": "judging them took longer than --timeout",
    "out of memory, or its process died": "the process that judged them ran out of memory, or died",
}
TIES = "of equally frequent answers that of the first response counts"


@dataclass(frozen=True)
class GradeOptions:
    """How responses are judged, and figures computed.

    Args:
        processes: that judge.
        timeout_seconds: for one response.
        seed: of the bootstrap, and of the subsets that votes are averaged over.
        resamples: of the bootstrap.
        allow_unsandboxed: run programs where there is no sandbox, too.
    """

    processes: int = 1
    timeout_seconds: float = 20.0
    seed: int = 0
    resamples: int = 1000
    allow_unsandboxed: bool = False

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise ConfigError(f"--resamples is {self.resamples}, expected at least 1")


def eval_model(
    benchmark: str,
    data: str | os.PathLike,
    model: str | os.PathLike,
    output: str | os.PathLike,
    options: AskOptions | None = None,
    *,
    grading: GradeOptions | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Ask a model the problems of a benchmark, judge its responses, and write what came out.

    `output` gets responses.jsonl, a line for each response, written part by part: `id`, `prompt` and `answer` of the
    problem, `sample` (null for the greedy response, else a number from 0), `temperature`, `response`, `finished`
    (whether it has an end, or was cut off), `tokens`, `verdict` (1 right, 0 wrong) and `reason`; and results.json, the
    dictionary that is returned. Both are the same to the byte for the same seed where the engine repeats itself, as
    `transformers` does on a CPU, and also after a kill.

    With torchrun all processes call this.

    Args:
        benchmark: a name in repirl.evals.BENCHMARKS.
        data: a file, or a data set of the hub ("owner/name:split").
        model: a folder of an exported policy or any causal language model, or its id on the hub.
        output: a folder.
        options: how the model is asked; None for what the benchmark says.
        grading: how responses are judged.
        resume: go on with the folder; responses that are there are kept.

    Raises:
        ConfigError: data, a model or options that cannot be used, or an output that exists.
        RunError: the output cannot be written, or the engine or the grader fails.
    """
    options, grading = options or AskOptions(), grading or GradeOptions()
    folder = check_folder(output, (RESPONSES, RESULTS), [data])
    asked = ask(_benchmark(benchmark), os.fspath(data), os.fspath(model), str(folder), options)
    asked = replace(asked, config=set_up_process(asked.config))
    config, total = asked.config, asked.num_responses
    with ExitStack() as stack:
        file = None
        if own_rank() == 0:
            file = stack.enter_context(ResumableOutput(folder / RESPONSES, "repirl eval", resume=resume, inputs=[data]))
            file.begin(asked.made_with(), total)
        world = join_world(config)
        start = int(world.maximum(file.num_rows if file is not None else 0))
        if start < total:
            check_sources(config)
            sampler = stack.enter_context(policy_sampler(config, asked.tokenizer, None))
            _keep(asked, sampled(asked, sampler, start), file, grading)
        world.barrier()
    with open(folder / RESPONSES, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    about = {"model": os.fspath(model), "asked": asked.made_with()}
    result = _result(asked.benchmark, asked.problems, rows, grading, data=os.fspath(data), about=about)
    if own_rank() == 0:
        write_json(folder / RESULTS, result)
    return result


def _keep(asked: Asked, parts: Iterable[list[Given]], file: ResumableOutput | None, grading: GradeOptions) -> None:
    """Judge and write the responses, part by part; without a file, as in other processes than the first, only sample
    them."""
    if file is None:
        for _ in parts:
            pass
        return
    for rows in _graded(asked.benchmark, parts, grading):
        file.write([json.dumps(row, ensure_ascii=False) for row in rows], {})
        done = f"{file.num_rows}/{asked.num_responses} responses"
        print(f"{asked.benchmark.name} {done}", file=sys.stderr, flush=True)


def eval_responses(
    benchmark: str,
    data: str | os.PathLike,
    responses: str | os.PathLike,
    output: str | os.PathLike | None = None,
    *,
    grading: GradeOptions | None = None,
) -> dict[str, Any]:
    """Judge responses that are there already, as those of `eval_model` are.

    Rows have `response` (text) or `responses` (a list of texts); `id`, or else `prompt`, `problem` or `question`, which
    says what they respond to; and maybe `temperature` (0: a greedy response), `finished` and `tokens`. `eval_model` and
    `repirl sample` write such rows.

    Args:
        benchmark: a name in repirl.evals.BENCHMARKS.
        data: the problems: a file, or a data set of the hub ("owner/name:split").
        responses: a file, likewise.
        output: a folder that gets responses.jsonl and results.json as of `eval_model`; None for none.
        grading: how responses are judged.

    Raises:
        ConfigError: a row that cannot be used, or an output that exists.
        RunError: the output cannot be written, or the grader fails.
    """
    grading, chosen = grading or GradeOptions(), _benchmark(benchmark)
    problems = list(read_problems(chosen, as_source(os.fspath(data))))
    given = _given(problems, os.fspath(responses))
    file = None
    if output is not None:
        check_folder(output, (RESPONSES, RESULTS), [data, responses], is_new=True)
        file = LinesFile(Path(output) / RESPONSES)
    rows = []
    for part in _graded(chosen, iter(lambda: list(islice(given, _CHUNK)), []), grading):
        if file is not None:
            file.write(part)
        rows += part
    if file is not None:
        file.finish()
    about = {"responses": os.fspath(responses)}
    result = _result(chosen, problems, rows, grading, data=os.fspath(data), about=about)
    if output is not None:
        write_json(Path(output) / RESULTS, result)
    return result


def _benchmark(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise ConfigError(f"--benchmark is {name!r}, expected one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def _graded(
    benchmark: Benchmark, parts: Iterable[list[Given]], grading: GradeOptions
) -> Iterator[list[dict[str, Any]]]:
    """The rows of responses.jsonl, part by part."""
    code = {"allow_unsandboxed": True} if grading.allow_unsandboxed else None
    config = verifier_config(benchmark.grader, grading.processes, grading.timeout_seconds, code)
    with closing(make_verifier(config, explain=True)) as verifier:
        for part in parts:
            texts = [benchmark.until_stop(one.text) for one in part]
            pairs = [
                (benchmark.judged(one.problem, text), one.problem.answer)
                for one, (text, _) in zip(part, texts, strict=True)
            ]
            verdicts, rows = verifier.judge(pairs), []
            for number, (one, (text, stopped)) in enumerate(zip(part, texts, strict=True)):
                reason = verifier.reasons.get(number, "right" if verdicts[number] > 0.5 else "wrong")
                row: dict[str, Any] = {"id": one.problem.id, "prompt": one.problem.prompt, "answer": one.problem.answer}
                row |= {"sample": one.sample, "temperature": one.temperature, "response": text}
                row |= {"finished": stopped or one.finished, "tokens": one.tokens}
                rows.append(row | {"verdict": verdicts[number], "reason": reason})
            yield rows


def _given(problems: Sequence[Problem], source: str) -> Iterator[Given]:
    """The responses of a file."""
    by_id = {problem.id: problem for problem in problems}
    by_text = {text: problem for problem in problems for text in (problem.prompt, problem.text) if text is not None}
    counts: dict[str, int] = {}
    for _, place, row in read_rows(as_source(source), "test"):
        if (name := row.get("id")) is not None:
            problem = by_id.get(str(name))
            if problem is None:
                raise place.error(f"'id' is {shown(name)}, which no problem of --data has")
        else:
            texts = [row[column] for column in ("prompt", "problem", "question") if column in row]
            problem = next((by_text[text] for text in texts if isinstance(text, str) and text in by_text), None)
            if problem is None:
                raise place.error(
                    "no problem of --data has its 'prompt', 'problem' or 'question'; a column 'id' with the problem's "
                    "id, or number from 0, says which one it is"
                )
        temperature, finished, tokens = _optional(place, row)
        for text in _texts(place, row):
            sample = None
            if temperature != 0:
                sample = counts.setdefault(problem.id, 0)
                counts[problem.id] += 1
            yield Given(problem, sample, temperature, text, finished, tokens)


def _texts(place: Place, row: dict[str, Any]) -> list[str]:
    if "response" in row:
        return [response_text(place, row["response"], "response")]
    values = row.get("responses")
    if not isinstance(values, list) or not values:
        raise place.error(
            f"there is neither 'response' (text) nor 'responses' (a list of texts), but {sorted(map(str, row))}"
        )
    return [response_text(place, value, f"responses.{number}") for number, value in enumerate(values)]


def _optional(place: Place, row: dict[str, Any]) -> tuple[float | None, bool | None, int | None]:
    """temperature, finished and tokens of a row."""
    temperature, finished, tokens = row.get("temperature"), row.get("finished"), row.get("tokens")
    if temperature is not None and (
        isinstance(temperature, bool) or not isinstance(temperature, int | float) or not temperature >= 0
    ):
        raise place.error(f"'temperature' is {shown(temperature)}, expected a number of at least 0")
    if finished is not None and not isinstance(finished, bool):
        raise place.error(f"'finished' is {shown(finished)}, expected true or false")
    if tokens is not None and not is_count(tokens):
        raise place.error(f"'tokens' is {shown(tokens)}, expected a whole number of at least 0")
    return temperature, finished, tokens


def _result(
    benchmark: Benchmark,
    problems: Sequence[Problem],
    rows: Sequence[dict[str, Any]],
    grading: GradeOptions,
    *,
    data: str,
    about: dict[str, Any],
) -> dict[str, Any]:
    """What is written and shown; see eval_metrics.figures."""
    groups: dict[str, Responses] = {problem.id: Responses() for problem in problems}
    for row in rows:
        vote = None if benchmark.vote is None else benchmark.vote(row["response"])
        answered = Answered(row["verdict"] > 0.5, vote, row["finished"], row["reason"].partition(":")[0])
        group = groups[row["id"]]
        (group.greedy if row["sample"] is None else group.sampled).append(answered)
    there = [group for group in groups.values() if group.greedy or group.sampled]
    if not there:
        raise ConfigError(f"there is no response to any of the {len(problems)} problems of {data}")
    votes = benchmark.vote is not None
    return {
        "benchmark": benchmark.name,
        "data": data,
        **about,
        "version": __version__,
        "problems": len(problems),
        "answered": len(there),
        "figures": figures(there, votes=votes, seed=grading.seed, resamples=grading.resamples),
        "intervals": f"95%, by bootstrap over problems: {grading.resamples} resamples, seed {grading.seed}",
        "greedy": shares([one for group in there for one in group.greedy], benchmark.unreadable),
        "sampled": shares([one for group in there for one in group.sampled], benchmark.unreadable),
        "votes": {"ties": TIES, "tied_problems": num_tied(there)} if votes else None,
    }


def print_result(result: dict[str, Any]) -> None:
    """A table of the figures, and what else is to be known."""
    from repirl.report.display import print_table

    rows = []
    for name, figure in result["figures"].items():
        interval = "-" if figure["low"] is None else f"{figure['low']:.4f} to {figure['high']:.4f}"
        rows.append([name, f"{figure['value']:.4f}", interval])
    answered, total = result["answered"], result["problems"]
    print_table(f"{result['benchmark']}: {answered} problems", ["", "share right", "95% interval"], rows)
    if answered < total:
        print(f"{total - answered} of {total} problems have no response, and are left out")
    for name in ("greedy", "sampled"):
        part = result[name]
        if not part["responses"]:
            continue
        cut = (
            "whether any was cut off is not known" if part["truncated"] is None else f"{part['truncated']:.1%} cut off"
        )
        print(f"{part['responses']} {name} responses: {cut}, {part['unreadable']} with no answer that could be read")
        for reason, why in NOT_JUDGED.items():
            if count := part["reasons"].get(reason):
                print(f"{count} of them count as wrong because {why}")
    if result["votes"] is not None and result["sampled"]["responses"]:
        print(f"maj@k: {TIES}; {result['votes']['tied_problems']} problems have a tie among all their responses")
