"""``python -m bench.run``: measures the ops beside every peer that is installed, on this machine.

Each contender is first compared with float64. One that gives other results, or cannot run the case, is not timed, and
its row says why. Times are medians of rounds in which all contenders take turns; ``products`` are multiples of one bare
matrix product of the same shape and dtype in the same rounds. Memory is what a step needs beyond its inputs and
gradients.
"""

import argparse
import datetime
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from repirl_kernels import choose_backend, native

from bench.cases import DTYPES, PROFILES, SHAPES, TASKS, Case, own_cases
from bench.contenders import CONTENDERS, Contender, preload, versions
from bench.measure import CHECKED_ROWS, errors_of, memory_of, reason_of, spread, times_of, truth_of, wrong_result
from bench.peers import load_peer
from bench.schema import FORMAT, write_csv
from bench.turns import wait_for_turn

LEGEND = """
median ms, quartiles: of rounds in which all contenders take turns; the fastest stands first
products:  the median in multiples of one bare matrix product of this shape and dtype in the same rounds
copies:    for given logits: in multiples of one copy of them
MiB:       peak memory of a step, without inputs and gradients
errors:    against float64, relative to the largest value
Compare rows of one table only. Runs are compared by python -m bench.compare."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch finds no CUDA device")
    if options.check_rows < 1:
        parser.error(f"--check-rows {options.check_rows}: at least one row is compared")
    torch.manual_seed(0)
    if options.threads:
        torch.set_num_threads(options.threads)
    named, own = _shapes(parser, options.shape)
    profile = options.profile or ("own" if own and not named else "gpu" if device == "cuda" else "cpu")
    chosen = PROFILES[profile] if named or not own else []
    cases = list(dict.fromkeys(case for case in [*chosen, *own] if _selected(case, named, options)))
    peers = _peers(parser, options.peer)
    contenders = [contender for contender in CONTENDERS if _named(contender, options.peers)] + peers
    if not cases or not contenders:
        print("nothing is left to measure: the filters exclude every case or contender", file=sys.stderr)
        return 2
    command = "python -m bench.run " + shlex.join(sys.argv[1:] if arguments is None else list(arguments))
    result: dict[str, Any] = {**_environment(device, contenders), "command": command.strip(), "profile": profile}
    result["cases"] = []
    preload(contenders, device)
    wait_for_turn()
    for case in cases:
        memory_only = options.memory_only or profile == "memory"
        measured = measure_case(case, contenders, device, options.seconds, memory_only, options.check_rows)
        result["cases"].append(measured)
        print(table(measured), flush=True)
        _write(result, options)  # after each case, for a run that ends early
    print(LEGEND)
    for file in filter(None, [options.json, options.csv]):
        print(f"written to {file}")
    return 0


def _write(result: dict[str, Any], options: argparse.Namespace) -> None:
    if options.json:
        file = Path(options.json)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(file.name + ".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(file)
    if options.csv:
        write_csv(Path(options.csv), {options.json or "": result})


def measure_case(
    case: Case,
    contenders: list[Contender],
    device: str,
    seconds: float,
    memory_only: bool = False,
    checked_rows: int = CHECKED_ROWS,
) -> dict[str, Any]:
    """One case's rows; those that could not run have a reason in place of figures."""
    rows: dict[str, dict[str, Any]] = {}
    truth = truth_of(case, device, checked_rows)
    able = []
    for contender in contenders:
        if contender.given_logits != (case.task == "logits"):
            continue
        row: dict[str, Any] = {"contender": contender.name, "ours": contender.ours}
        try:
            errors = errors_of(contender, case, device, truth, checked_rows)
            row["errors"] = {name: error if math.isfinite(error) else None for name, error in errors.items()}
            if wrong := wrong_result(errors, case):
                row["reason"] = wrong
            else:
                able.append(contender)
        except Exception as error:  # whatever a peer raises: it cannot run this case
            row["reason"] = reason_of(error)
        rows[contender.name] = row
    measured = {
        "case": case._asdict(),
        "name": case.name,
        "checked_rows": min(case.num_rows, checked_rows),
        "rows": list(rows.values()),
    }
    if not able:
        return measured
    # Memory first: a contender that does not fit is not timed.
    for name, extra in memory_of(able, case, device).items():
        rows[name]["reason" if isinstance(extra, str) else "extra_bytes"] = extra
    if memory_only:
        return measured
    times, reasons = times_of([c for c in able if "reason" not in rows[c.name]], case, device, seconds)
    measured["yardstick"] = spread(times.pop(""))
    for name, rounds in times.items():
        rows[name] |= spread(rounds)
        rows[name]["products"] = rows[name]["median"] / measured["yardstick"]["median"]
    for name, reason in reasons.items():
        rows[name]["reason"] = reason
    return measured


def table(measured: dict[str, Any]) -> str:
    """One case as text: the contenders that ran, fastest first (without times: smallest), then the others."""
    unit = "copies" if measured["case"]["task"] == "logits" else "products"
    timed = "yardstick" in measured
    lines = [f"\n{measured['name']}   ({TASKS[measured['case']['task']]})"]
    if timed:
        seconds = measured["yardstick"]["median"]
        lines.append(f"  one bare {'copy' if unit == 'copies' else 'product'}: {1e3 * seconds:.1f} ms")
    times = f"{'median ms':>11}{'quartiles':>20}{unit:>10}" if timed else ""
    lines.append(f"  {'':30}{times}{'MiB':>9}  largest relative error")
    for row in in_order(measured["rows"]):
        if "reason" in row:
            lines.append(f"  {row['contender']:30} - {row['reason']}")
            continue
        cells = f"  {row['contender']:30}"
        if timed:
            quartiles = f"{1e3 * row['low']:.1f} - {1e3 * row['high']:.1f}"
            cells += f"{1e3 * row['median']:11.1f}{quartiles:>20}{row['products']:10.2f}"
        lines.append(f"{cells}{row['extra_bytes'] / 2**20:9.0f}  {error_text(row)}")
    return "\n".join(lines)


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that have figures, fastest first (by memory, if no time was measured), then those that have a reason."""
    return sorted(rows, key=lambda row: (1, 0) if "reason" in row else (0, row.get("median", row["extra_bytes"])))


def error_text(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())


def _environment(device: str, contenders: list[Contender]) -> dict[str, Any]:
    environment = {
        "format": FORMAT,
        "date": datetime.date.today().isoformat(),
        "revision": _revision(Path(native.__file__)),
        "device": device,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "python": platform.python_version(),
        "backend": choose_backend(device, torch.bfloat16),
        "instruction_set": native.instruction_set() if native.is_available() else None,
        "versions": versions(contenders),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        environment |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
        environment["cuda"] = torch.version.cuda
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        nvidia_smi = shutil.which("nvidia-smi")
        environment["driver"] = subprocess.check_output(query, text=True).split()[0] if nvidia_smi else "unknown"
    return environment


def _revision(source: Path) -> str:
    """The commit of the checkout that a source file belongs to; ``unknown`` for one that was installed by copy."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=source.parent, capture_output=True, text=True).stdout.strip()

    if shutil.which("git") is None or not git("ls-files", source.name):
        return "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _named(contender: Contender, words: list[str] | None) -> bool:
    return not words or any(word.lower() in contender.name.lower() for word in words)


def _shapes(parser: argparse.ArgumentParser, occurrences: list[list[str]]) -> tuple[list[str], list[Case]]:
    """Of ``--shape``: the names of known shapes, and the cases of one's own."""
    named, own = [], []
    for words in occurrences:
        # 1024 x 576 x 49152 is three sizes, however it is spaced.
        for word in re.sub(r"(?<=\d)\s*x\s*(?=\d)", "x", " ".join(words), flags=re.I).split():
            if word in SHAPES:
                named.append(word)
                continue
            try:
                own += own_cases(word)
            except ValueError as error:
                shapes = ", ".join(SHAPES)
                parser.error(f"argument --shape: {word} {error}: expected NxDxV, such as 1024x576x49152, or {shapes}")
    return named, own


def _peers(parser: argparse.ArgumentParser, names: list[str]) -> list[Contender]:
    peers = []
    for name in dict.fromkeys(names):
        try:
            peers.append(load_peer(name))
        except ValueError as error:
            parser.error(f"argument --peer: {name} {error}; bench/README.md says what a peer gets and returns")
    return peers


def _selected(case: Case, named: list[str], options: argparse.Namespace) -> bool:
    known = case.shape in SHAPES
    return (
        (not named or not known or case.shape in named)
        and (not options.dtype or case.dtype in options.dtype)
        and (not options.task or case.task in options.task)
        and (not options.rows or case.num_rows in options.rows)
        and (not options.only or case.name in options.only)
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profile", choices=sorted(PROFILES), help="which cases; default: cpu or gpu, by the device")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--shape",
        nargs="+",
        action="append",
        default=[],
        metavar="NxDxV",
        help="cases of one's own: rows x features x vocabulary, such as 1024x576x49152, several or repeated; or only "
        f"the profile's cases of a known shape: {', '.join(SHAPES)}",
    )
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="measure a function of one's own, too (repeatable); bench/README.md says what it gets and returns",
    )
    parser.add_argument("--rows", nargs="+", type=int, help="only cases with these numbers of rows")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), help="only these dtypes")
    parser.add_argument("--task", nargs="+", choices=list(TASKS), help="only these tasks")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="only the cases of these names, as the tables have them"
    )
    parser.add_argument("--peers", nargs="+", metavar="WORD", help="only contenders with such a word in their name")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each contender and case; default 3")
    parser.add_argument("--memory-only", action="store_true", help="errors and memory, no times")
    parser.add_argument(
        "--check-rows",
        type=int,
        default=CHECKED_ROWS,
        metavar="ROWS",
        help=f"rows on which results are compared with float64; default {CHECKED_ROWS}",
    )
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument("--csv", metavar="FILE", help="write a table of them there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
