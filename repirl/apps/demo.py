"""`repirl demo`: the dual loop end to end on a generated task, with a table and a page at the end.

Of arithmetic: a small model learns to add and subtract from neat notes, then picks up a bad habit from a sloppy
student's (forgetting more than every second carry). There are only 16 expert solutions to unlearn it by, and the
verifier can be fooled: it reads the last digit alone, which is right when a carry is forgotten. From that one start:
SFT on the experts; RLOO, which trusts the verifier; rePIRL as in algorithm 1, whose PRM trusts it, too; rePIRL with a
PRM that learns from the experts alone; and that PRM without any verifier.

Of code (`--task code`): the model writes small programs, which are run on tests. It picks up the misconceptions of a
sloppy student, and the verifier is exact, as tests are: SFT, RLOO, rePIRL, and its PRM without any verifier.
"""

from __future__ import annotations

import itertools
import json
import platform
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from repirl.apps.localize import judge, step_scores
from repirl.apps.start import TASKS, Start, make_start
from repirl.config import Config, ConfigError
from repirl.configfile import build_config, describe, load_preset, merge
from repirl.data.tasks.arithmetic import Solution
from repirl.export import export_checkpoint
from repirl.loop import train
from repirl.models import quiet_transformers
from repirl.prm import PRM, PRMDescription, load_prm
from repirl.report.display import print_table
from repirl.report.html import Curve, Report, Sample, Series, write_report
from repirl.report.log import read_metrics
from repirl.work import reset_peak_memory

NUM_EXPERTS = 16
# What ends a worked step of arithmetic.
STEP_SEPARATOR = "; "


@dataclass(frozen=True)
class Demo:
    """The demo on one task.

    Args:
        task: a name in repirl.apps.start.TASKS.
        start: how the model with the bad habit is made.
        runs: the preset of each run, and what the run changes in it. One is called "RLOO", one "rePIRL".
        step_separator: what ends a worked step.
        values: of all runs: their verifiers.
        habit: what is bad about the start, for the page's title.
        note: what the page says of the runs.
        num_experts: expert solutions that the runs have.
    """

    task: str
    start: Start
    runs: dict[str, tuple[str, dict[str, Any]]]
    step_separator: str
    values: dict[str, Any]
    habit: str
    note: str
    num_experts: int = NUM_EXPERTS


ARITHMETIC = Demo(
    task="arithmetic",
    start=Start(),
    runs={
        "SFT": ("demo-sft", {}),
        "RLOO": ("demo-rloo", {}),
        "rePIRL": ("demo", {}),
        "rePIRL, PRM apart": ("demo", {"irl": {"use_outcome": False}}),
        "rePIRL, PRM only": ("demo-prm-only", {}),
    },
    step_separator=STEP_SEPARATOR,
    # Held-out accuracy is exact.
    values={
        "verifier": {"kind": "custom", "function": "repirl.verify.flawed:last_digit"},
        "eval": {"verifier": {"kind": "math"}},
    },
    habit="it forgets most carries",
    note="Their verifier reads only the last digit, which is right where a carry was forgotten; held-out accuracy is "
    "exact. There are {num_experts} expert solutions. SFT imitates them. RLOO trusts the verifier, and so does the PRM "
    "of rePIRL as published, which takes what it accepts for experts. PRM apart: the PRM learns from the experts "
    "alone, the policy from both. PRM only: nobody asks the verifier.",
)
CODE = Demo(
    task="code",
    start=Start(warm_turns=300, sloppy_turns=100),
    runs={
        "SFT": ("demo-code-sft", {}),
        "RLOO": ("demo-code-rloo", {}),
        "rePIRL": ("demo-code", {}),
        "rePIRL, PRM only": ("demo-code-prm-only", {}),
    },
    step_separator="\n",
    values={},
    habit="it takes some operations for others",
    note="Programs are run on six tests each, and are right where all pass. There are {num_experts} expert programs. "
    "SFT imitates them. RLOO learns from the tests; so does rePIRL, and its PRM takes what passes for experts. PRM "
    "only: no reward comes from tests.",
)
DEMOS = {demo.task: demo for demo in (ARITHMETIC, CODE)}


def run(output_dir: str = "runs/demo", seed: int = 0, num_threads: int = 1, task: str = "arithmetic") -> int:
    """Everything, into `output_dir`; returns the exit code. ConfigError where the folder holds something else."""
    console, folder, start_time = Console(), Path(output_dir), time.perf_counter()
    if folder.exists() and any(folder.iterdir()):
        if not (folder / "demo.json").is_file():
            raise ConfigError(f"--output-dir {output_dir!r} exists and is no earlier demo; choose another")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "demo.json").write_text(json.dumps({"seed": seed, "task": task}))
    torch.set_num_threads(num_threads)
    quiet_transformers()

    demo = DEMOS[task]
    console.print(f"[bold]rePIRL demo[/]: a small model with a bad habit, {len(demo.runs)} ways to lose it")
    stages = itertools.count(1)

    def begin(what: str) -> None:
        console.print(f"[bold]stage {next(stages)} of {len(demo.runs) + 2}[/]: {what}", highlight=False)

    begin("make the model and the data")
    tests = make_start(folder, seed, demo.start, task)

    # A policy is a PRM by its log-probabilities: what a trained one has to beat.
    start = load_prm(folder / "start", device="cpu", description=PRMDescription(reward="logprob"))
    results, prms = {}, {"start policy's log-probs": start}
    for name in demo.runs:
        begin(name)
        config = run_config(folder, seed, name, task)
        reset_peak_memory(torch.device("cpu"))
        train(config)
        results[name] = read_metrics(Path(config.output_dir) / "metrics.jsonl")
        export = Path(config.output_dir) / "export"
        export_checkpoint(config.output_dir, export, step_separator=demo.step_separator)
        if "prm" in config.system.trains:
            prms[name] = load_prm(export / "prm", device="cpu")
        elif not config.system.online:
            # The log-probabilities of one that imitates the experts are a PRM, too.
            prms[name] = load_prm(export / "policy", device="cpu", description=PRMDescription(reward="logprob"))
    begin("find planted errors by each PRM")
    scores = {name: score_solutions(prm, tests, task) for name, prm in prms.items()}
    judgments = {name: judge([s for s, _ in score], [t.error_step for t in tests]) for name, score in scores.items()}

    columns, rows = comparison(results, judgments)
    total = time.perf_counter() - start_time
    print_table(f"Held-out accuracy and planted errors (seed {seed}, {total:.0f} s in all)", columns, rows, console)
    figures = summary(results, judgments)
    saved = {"seed": seed, "task": task, "seconds": total, "columns": columns, "rows": rows, "summary": figures}
    (folder / "results.json").write_text(json.dumps(saved))
    page, config = folder / "report.html", run_config(folder, seed, "rePIRL", task)
    write_report(page, report(demo, results, (columns, rows), tests, scores, config, total))
    console.print(f"The report is at [bold]{page}[/]: open it in a browser.")
    return 0


def run_config(folder: Path, seed: int, name: str, task: str = "arithmetic") -> Config:
    """A run's preset, with what the run changes, on this demo's task."""
    slug = "".join(c if c.isalnum() else "-" for c in name.lower()).replace("--", "-")
    demo = DEMOS[task]
    preset, changes = demo.runs[name]
    data = {part: str(folder / "data" / f"{part}.jsonl") for part in ("train", "eval")}
    experts = {"path": str(folder / "data" / f"experts_{demo.num_experts}.jsonl")}
    values: dict[str, Any] = {
        "seed": seed,
        "output_dir": str(folder / slug),
        "policy": {"model": str(folder / "start")},
        "data": data | {"solution_column": None, "experts": experts},
    }
    return build_config(merge(merge(merge(load_preset(preset), changes), demo.values), values))


def step_lens(solutions: Iterable[Solution], task: str = "arithmetic") -> list[list[int]]:
    """For each solution the number of tokens of each worked step."""
    tokenizer = TASKS[task].build_tokenizer()
    return [[len(tokenizer(line).input_ids) for line in s.lines[:-1]] for s in solutions]


def score_solutions(
    prm: PRM, solutions: list[Solution], task: str = "arithmetic"
) -> list[tuple[list[float], list[float]]]:
    """For each solution: a score for each worked step (its worst token), and every token's reward."""
    rewards = prm.rewards([(s.problem.prompt, s.text) for s in solutions])
    return [
        (step_scores(reward, lens), reward.tolist())
        for reward, lens in zip(rewards, step_lens(solutions, task), strict=True)
    ]


def summary(results: dict[str, list[dict[str, Any]]], judgments: dict[str, dict[str, float]]) -> dict[str, float]:
    """The figures that runs of several seeds are compared by."""
    figures = {"accuracy/start": results["RLOO"][0]["eval/accuracy"]}
    for name, lines in results.items():
        figures[f"accuracy/{name}"] = lines[-1]["eval/accuracy"]
    for name, judged in judgments.items():
        figures |= {f"{key}/{name}": value for key, value in judged.items()}
    return figures


def comparison(
    results: dict[str, list[dict[str, Any]]], judgments: dict[str, dict[str, float]]
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the final table. Errors are found by each run's PRM; the start's column uses its own
    log-probabilities, which is what a PRM has to beat."""

    def cells(name: str) -> dict[str, str]:
        steps = results[name][1:]

        def total(*keys: str) -> float:
            return sum(line.get(key, 0.0) for line in steps for key in keys)

        ess = [line["prm/ess_fraction"] for line in steps if "prm/ess_fraction" in line]
        phases = {
            "rollout": total("seconds/rollout"),
            "PRM": total("seconds/prm", "seconds/reward"),
            "policy": total("seconds/policy", "seconds/old_logprob"),
        }
        return {
            "held-out accuracy": f"{results[name][-1]['eval/accuracy']:.1%}",
            "effective sample share": f"{sum(ess) / len(ess):.2f}" if ess else "-",
            **{f"seconds, {phase}": f"{seconds:.1f}" if seconds else "-" for phase, seconds in phases.items()},
            "tokens/s": f"{total('tokens') / sum(phases.values()):.0f}",
            "peak memory, MiB": f"{results[name][-1]['memory/peak_bytes'] / 2**20:.0f}",
        }

    def localisation(name: str) -> dict[str, str]:
        judged = judgments.get(name)
        return {
            "planted error, AUROC": f"{judged['auroc']:.3f}" if judged else "-",
            "planted error, first-error F1": f"{judged['first_error_f1']:.3f}" if judged else "-",
        }

    start = {"held-out accuracy": f"{results['RLOO'][0]['eval/accuracy']:.1%}"}
    table = {"start": start | localisation("start policy's log-probs")}
    table |= {name: cells(name) | localisation(name) for name in results}
    labels = list(table["rePIRL"])
    return ["", *table], [[label, *(column.get(label, "-") for column in table.values())] for label in labels]


def report(
    demo: Demo,
    results: dict[str, list[dict[str, Any]]],
    table: tuple[list[str], list[list[str]]],
    tests: list[Solution],
    scores: dict[str, list[tuple[list[float], list[float]]]],
    config: Config,
    seconds: float,
) -> Report:
    """What repirl.report.html.write_report shows; table: columns and rows."""

    def curve(title: str, key: str, ylabel: str, percent: bool = False) -> Curve:
        series: list[Series] = []
        for name, lines in results.items():
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            if points:
                series.append({"name": name, "x": [p[0] for p in points], "y": [p[1] for p in points]})
        return {"title": title, "xlabel": "step", "ylabel": ylabel, "series": series, "percent": percent}

    samples = []
    with_errors = [i for i, t in enumerate(tests) if t.error_step is not None][:4]
    clean = [i for i, t in enumerate(tests) if t.error_step is None][:2]
    for index in [*with_errors, *clean]:
        samples.append(_sample(demo, tests[index], {name: score[index][1] for name, score in scores.items()}))
    return {
        "title": "rePIRL demo",
        "subtitle": f"A small model with a bad habit - {demo.habit} - and {len(demo.runs)} ways to lose it",
        "configuration": describe(config),
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "platform": platform.platform(),
            "threads": str(torch.get_num_threads()),
            "seconds": f"{seconds:.0f}",
            "command": " ".join(["repirl", *sys.argv[1:]]),
        },
        "table": {"columns": table[0], "rows": table[1]},
        "notes": [
            f"All runs begin with the same weights. {demo.note.format(num_experts=demo.num_experts)}",
            "Error AUROC: the chance that a step with a planted error scores below a right step. Error F1: does the "
            "first step below a threshold, chosen on other solutions, match the planted one? A step scores as its "
            "worst token. The start's column uses the start policy's own log-probabilities.",
            "ESS: effective sample size of the importance weights as a share of the samples, mean over the run.",
        ],
        "curves": [
            curve("Held-out accuracy", "eval/accuracy", "share of problems answered right, greedy", percent=True),
            curve("Accuracy of the rollouts", "rollout/outcome", "share of sampled responses that are right", True),
            curve("Expert minus policy reward", "prm/reward_gap", "nats per token"),
            curve("Policy entropy", "policy/entropy", "nats per token"),
        ],
        "samples": samples,
    }


def _sample(demo: Demo, solution: Solution, rewards: dict[str, list[float]]) -> Sample:
    tokenizer = TASKS[demo.task].build_tokenizer()
    [lens] = step_lens([solution], demo.task)
    tokens = [str(tokenizer.decode([i])) for i in [*tokenizer(solution.text).input_ids, tokenizer.eos_token_id]]
    step = solution.error_step
    span = None
    note = "an expert's solution, all steps right"
    if step is not None:
        # What is wrong stands between the sign of equality and the separator of its step.
        end = sum(lens[: step + 1]) - 1
        begin = max(i for i in range(end) if tokens[i].strip(" x") == "=") + 1
        span, note = [begin, end], f"planted error in step {step + 1}; what follows is consistent with it"
    return {
        "title": solution.problem.prompt,
        "prompt": solution.problem.prompt,
        "note": note,
        "variants": [
            {"name": name, "tokens": tokens, "rewards": values, "error_span": span, "response_start": 0}
            for name, values in rewards.items()
        ],
        "correct": step is None,
    }
