"""``python -m bench.report``: README.md and plots of this folder, from ``results/*/ops*.json`` alone."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.cases import TASKS

HERE = Path(__file__).parent

INTRODUCTION = """# Benchmarks of the fused ops

Made by `python -m bench.report` from the JSON files below. `make bench` measures on your machine.

Compare only rows of one table: they are the same task on the same inputs, measured in turns. A contender is timed only
if its results (values, or gradients of hidden states and weights) agree with float64 up to the dtype's rounding. Below
a table are the contenders that cannot run the case, and why.

* **ms**: median of the rounds, and their quartiles.
* **products**: the median as a multiple of one bare matrix product of the same shape and dtype in the same rounds. A
  forward pass takes at least 1, with gradients of both operands 3, with a frozen head 2. For given logits, the unit is
  one copy of them.
* **MiB**: the peak memory of a step, without inputs and gradients. On a CPU it is resident memory.
* **error**: the largest error of a result against float64, relative to its largest value; on 256 rows.

A run that ended early has only the cases that it finished.
"""

ON_A_GPU = """## On a GPU

{measured}`bench/gpu.py` measures on a machine that has a GPU, PyTorch and Triton, and no network:

    python bench/gpu.py wheels --to WHEELS                     beforehand: peers, 58 MiB; packing takes 5 to 10 minutes
    python bench/gpu.py --out OUT --wheels WHEELS              at most 480 s
    python bench/gpu.py --out OUT --wheels WHEELS --call 2     at most 180 s

The first call measures how fast the GPU copies and multiplies, and runs the ops' tests while the candidates compile.
Then it runs, the most important first: the headline cases beside their peers, the candidates at D = 4096, a profile and
hardware counters of a step, the large shapes, the trainer's tests, a policy update beside TRL's, and further cases. The
tests and the headline cases are reached even if every step takes its whole time limit. The second call measures how
fast the GPU copies and multiplies, and the two largest cases beside Liger's kernel for Hopper. A step that fails, hangs
or is ended early does not affect the others.

`OUT` gets three files, each complete at any time: `gpu.json` (each step with its status, seconds, limit, results and,
if it failed, the end of its log), `ops.json` (for `bench/results`, from which this page is made) and `logs.tar.gz`.
`--steps WORD` runs only some steps, and `--device cpu` tests the script itself, in about a minute.

`bench/candidates.py` holds other ways to run `linear_token_stats` on a Hopper GPU: loads by TMA, one flat loop, a
warp-specialised kernel, cuBLAS in blocks that stay in the L2 cache, other slabs. Each is compared with float64, then
timed in turns with the bare product. `python -m bench.candidates --list` has their names,
`python -m bench.candidates NAME` runs one.

The study on a GPU trains a model from scratch on word problems with worked solutions (`gsm_symbolic` of reasoning-gym),
then four arms from it: SFT on 256 solutions, RLOO, rePIRL whose PRM learns apart from outcomes, and the PRM alone, with
an exact verifier and with one that reads only the last digit:

    python -m bench.gpu_study data --to FOLDER                               beforehand: 3.5 MiB; it says what it needs
    python -m bench.gpu_study run --data FOLDER --out OUT --wheels WHEELS    at most 460 s

Of `WHEELS` it needs only the wheels, 6 MiB, not the archive. The arms run beside each other for equal time and are
compared at the last evaluation that all reached. `OUT` gets `study.json`, `study.md` and `logs.tar.gz`, each complete
at any time; arms that failed or were not reached are listed. `--device cpu` tries the script with a small model.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder with */ops*.json")
    parser.add_argument("--page", type=Path, default=HERE / "README.md", help="default: bench/README.md")
    options = parser.parse_args(arguments)
    files = sorted(options.results.glob("*/ops*.json"))
    if not files:
        print(f"{options.results} has no */ops*.json; make one with python -m bench.run --json FILE", file=sys.stderr)
        return 2
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text(page(files, options.page.parent, sorted(options.results.glob("**/*.md"))))
    print(f"written to {options.page}, plots beside the results")
    return 0


def page(files: list[Path], folder: Path, others: Sequence[Path] = ()) -> str:
    """The page for ``folder``, with links to other pages of results; writes the plots beside the files."""
    parts = [INTRODUCTION]
    if others:
        links = [f"* [{title(other)}]({os.path.relpath(other, folder)})" for other in others]
        parts.append("\n".join(["Of the trainer:", "", *links, ""]))
    results = {file: json.loads(file.read_text()) for file in files}
    on_gpu = any(result["device"] == "cuda" for result in results.values())
    parts.append(ON_A_GPU.format(measured="" if on_gpu else "No figure on this page was measured on a GPU.\n\n"))
    for file, result in results.items():
        link = os.path.relpath(file, folder)
        parts.append(f"## {heading(result)}\n\n{environment(result)}\n\n`{result['command']}`: [{link}]({link})\n")
        if any("median" in row for measured in result["cases"] for row in measured["rows"]):
            image = file.with_suffix(".svg")
            plot(result, image)
            parts.append(f"![medians in multiples of the yardstick]({os.path.relpath(image, folder)})\n")
        parts += [table(measured) for measured in result["cases"]]
    return "\n".join(parts)


def title(page: Path) -> str:
    """The heading in a page's first line, else the file's name."""
    first = page.read_text().splitlines()[0]
    return first.removeprefix("# ") if first.startswith("# ") else page.stem


def heading(result: dict[str, Any]) -> str:
    return f"{result.get('gpu') or result['cpu']}, profile {result['profile']}"


def environment(result: dict[str, Any]) -> str:
    machine = f"{result['cpu']}, {result['cores']} cores, {result['threads']} threads, {result['memory_gib']} GiB"
    if result["device"] == "cuda":
        gpu = f"{result['gpu']}, {result['gpu_memory_gib']} GiB, driver {result['driver']}, CUDA {result['cuda']}"
        machine = f"{gpu}; {machine}"
    if result["instruction_set"]:
        machine += f", kernels for {result['instruction_set']}"
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    return f"{machine}. Python {result['python']}, {versions}. Revision {result['revision']}, {result['date']}."


def table(measured: dict[str, Any]) -> str:
    """One case as Markdown: the contenders that ran, fastest first, then the others and why they did not."""
    unit = "copies" if measured["case"]["task"] == "logits" else "products"
    lines = [f"### {measured['name']}\n", f"{TASKS[measured['case']['task']].capitalize()}.\n"]
    if "yardstick" in measured:
        yardstick = measured["yardstick"]
        lines.append(f"One bare {'copy' if unit == 'copies' else 'product'}: {1e3 * yardstick['median']:.2f} ms.\n")
    lines += [f"| | ms | quartiles | {unit} | MiB | error |", "|---|---:|---:|---:|---:|---|"]
    ran = [row for row in measured["rows"] if "reason" not in row]
    for row in sorted(ran, key=lambda row: row.get("median", row["extra_bytes"])):
        name = f"**{row['contender']}**" if row["ours"] else row["contender"]
        times = "| | "
        if "median" in row:
            quartiles = f"{1e3 * row['low']:.1f} to {1e3 * row['high']:.1f}"
            times = f"{1e3 * row['median']:.1f} | {quartiles} | {row['products']:.2f}"
        errors = ", ".join(f"{key} {error:.1e}" for key, error in row["errors"].items())
        lines.append(f"| {name} | {times} | {row['extra_bytes'] / 2**20:.0f} | {errors} |")
    reasons = [f"{row['contender']} ({row['reason']})" for row in measured["rows"] if "reason" in row]
    return "\n".join(lines) + ("\n\nNot measured: " + "; ".join(reasons) + "." if reasons else "") + "\n"


def plot(result: dict[str, Any], image: Path) -> None:
    """Bars of the medians in multiples of the yardstick, and of memory, one row of axes for each case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = [measured for measured in result["cases"] if any("median" in row for row in measured["rows"])]
    # Without date and random ids, so that the same results make the same file.
    with matplotlib.rc_context({"svg.hashsalt": "repirl", "svg.fonttype": "none", "font.size": 8}):
        figure, axes = plt.subplots(len(cases), 2, figsize=(10, 2.2 * len(cases)), squeeze=False, layout="constrained")
        for measured, (left, right) in zip(cases, axes, strict=True):
            rows = [row for row in measured["rows"] if "median" in row and "reason" not in row]
            rows.sort(key=lambda row: -row["median"])
            names = [row["contender"] for row in rows]
            colors = ["tab:orange" if row["ours"] else "tab:gray" for row in rows]
            base = measured["yardstick"]["median"]
            medians = [row["median"] / base for row in rows]
            below = [(row["median"] - row["low"]) / base for row in rows]
            above = [(row["high"] - row["median"]) / base for row in rows]
            left.barh(names, medians, xerr=(below, above), color=colors, capsize=2)
            left.set_title(measured["name"], loc="left")
            left.set_xlabel("copies" if measured["case"]["task"] == "logits" else "products")
            right.barh(names, [row["extra_bytes"] / 2**20 for row in rows], color=colors)
            right.set_yticklabels([])
            right.set_xlabel("MiB beyond inputs and gradients")
        figure.savefig(image, metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
