"""``python -m bench.run``: measures the ops beside every peer that is installed, on this machine.

Each contender is first compared with float64. One that gives other results, or cannot run the case, is not timed, and
its row says why. Times are medians of rounds in which all contenders take turns; ``products`` are multiples of one bare
matrix product of the same shape and dtype in the same rounds. Memory is what a step needs beyond its inputs and
gradients.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from repirl_kernels import choose_backend, native

from bench.cases import DTYPES, PROFILES, SHAPES, TASKS, Case
from bench.contenders import CONTENDERS, Contender, preload, versions
from bench.measure import errors_of, memory_of, reason_of, spread, times_of, truth_of
from bench.turns import wait_for_turn

ROOT = Path(__file__).parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch finds no CUDA device")
    torch.manual_seed(0)
    if options.threads:
        torch.set_num_threads(options.threads)
    profile = options.profile or ("gpu" if device == "cuda" else "cpu")
    cases = [case for case in PROFILES[profile] if _selected(case, options)]
    contenders = [contender for contender in CONTENDERS if _named(contender, options.peers)]
    if not cases or not contenders:
        print("nothing is left to measure: the filters exclude every case or contender", file=sys.stderr)
        return 2
    command = "python -m bench.run " + shlex.join(sys.argv[1:] if arguments is None else list(arguments))
    result: dict[str, Any] = {**_environment(device), "command": command.strip(), "profile": profile, "cases": []}
    preload(contenders, device)
    wait_for_turn()
    for case in cases:
        measured = measure_case(case, contenders, device, options.seconds, memory_only=profile == "memory")
        result["cases"].append(measured)
        print(table(measured), flush=True)
        if options.json:  # after each case, for a run that ends early
            file = Path(options.json)
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(file.name + ".partial")
            partial.write_text(json.dumps(result, indent=1) + "\n")
            partial.replace(file)
    if options.json:
        print(f"written to {options.json}")
    return 0


def measure_case(
    case: Case, contenders: list[Contender], device: str, seconds: float, memory_only: bool = False
) -> dict[str, Any]:
    """One case's rows; those that could not run have a reason in place of figures."""
    rows: dict[str, dict[str, Any]] = {}
    truth = truth_of(case, device)
    able = []
    for contender in contenders:
        if contender.given_logits != (case.task == "logits"):
            continue
        row: dict[str, Any] = {"contender": contender.name, "ours": contender.ours}
        try:
            row["errors"] = errors_of(contender, case, device, truth)
            able.append(contender)
        except Exception as error:  # whatever a peer raises: it cannot run this case
            row["reason"] = reason_of(error)
        rows[contender.name] = row
    measured = {"case": case._asdict(), "name": case.name, "rows": list(rows.values())}
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
    """One case as text."""
    unit = "copies" if measured["case"]["task"] == "logits" else "products"
    lines = [f"\n{measured['name']}   ({TASKS[measured['case']['task']]})"]
    if "yardstick" in measured:
        lines.append(
            f"  one bare {unit[:-1]}: {1e3 * measured['yardstick']['median']:.1f} ms".replace("copie:", "copy:")
        )
    lines.append(f"  {'':30}{'median ms':>11}{'quartiles':>20}{unit:>10}{'MiB':>9}  largest relative error")
    for row in measured["rows"]:
        if "reason" in row:
            lines.append(f"  {row['contender']:30}- {row['reason']}")
            continue
        cells = f"  {row['contender']:30}"
        if "median" in row:
            quartiles = f"{1e3 * row['low']:.1f} - {1e3 * row['high']:.1f}"
            cells += f"{1e3 * row['median']:11.1f}{quartiles:>20}{row['products']:10.2f}"
        else:
            cells += " " * 41
        errors = ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
        lines.append(f"{cells}{row['extra_bytes'] / 2**20:9.0f}  {errors}")
    return "\n".join(lines)


def _environment(device: str) -> dict[str, Any]:
    def git(*words: str) -> str:
        if shutil.which("git") is None:
            return ""
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = bool(git("status", "--porcelain", "--untracked-files=no"))
    environment = {
        "date": datetime.date.today().isoformat(),
        "revision": (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+changes" if changed else ""),
        "device": device,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "python": platform.python_version(),
        "backend": choose_backend(device, torch.bfloat16),
        "instruction_set": native.instruction_set() if native.is_available() else None,
        "versions": versions(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        environment |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
        environment["cuda"] = torch.version.cuda
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        nvidia_smi = shutil.which("nvidia-smi")
        environment["driver"] = subprocess.check_output(query, text=True).split()[0] if nvidia_smi else "unknown"
    return environment


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _named(contender: Contender, words: list[str] | None) -> bool:
    return not words or any(word.lower() in contender.name.lower() for word in words)


def _selected(case: Case, options: argparse.Namespace) -> bool:
    return (
        (not options.shape or case.shape in options.shape)
        and (not options.dtype or case.dtype in options.dtype)
        and (not options.task or case.task in options.task)
        and (not options.rows or case.num_rows in options.rows)
        and (not options.only or case.name in options.only)
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profile", choices=sorted(PROFILES), help="which cases; default: cpu or gpu, by the device")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), help="only these shapes")
    parser.add_argument("--rows", nargs="+", type=int, help="only cases with these numbers of rows")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), help="only these dtypes")
    parser.add_argument("--task", nargs="+", choices=list(TASKS), help="only these tasks")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="only the cases of these names, as the tables have them"
    )
    parser.add_argument("--peers", nargs="+", metavar="WORD", help="only contenders with such a word in their name")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each contender and case; default 3")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
