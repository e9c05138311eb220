"""``python -m bench.report``: bench/README.md and its plots, from ``bench/results/*/ops*.json`` alone."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.cases import TASKS
from bench.peers import EXAMPLE, PROTOCOL
from bench.plots import figures
from bench.run import error_text, in_order
from bench.schema import COLUMNS, load, markdown, write_csv

INTRODUCTION = """# Benchmarks of the fused ops

Made by `python -m bench.report` from the JSON files below. `make bench` measures on your machine.

Compare only rows of one table: they are the same task on the same inputs, measured in turns. A contender is timed only
if its results (values, or gradients of hidden states and weights) agree with float64 up to the dtype's rounding. Tables
have the fastest first. Below a table are the contenders that cannot run the case, and why.

* **ms**: median of the rounds, and their quartiles.
* **products**: the median as a multiple of one bare matrix product (`torch.mm` of `[N, D]` and `[D, V]`) of the same
  dtype in the same rounds. Results take at least 1 without gradients, with gradients of both operands 3, with a frozen
  head 2, and of masked rows nothing; below that is only who multiplies faster than `torch.mm`. For given logits, the
  unit is one copy of them.
* **MiB**: the peak memory of a step, without inputs and gradients. On a CPU it is resident memory.
* **error**: the largest error of a result against float64, relative to its largest value; on 256 rows.

A run that ended early has only the cases that it finished.
"""

OWN = """## Your own shapes and functions

In a clone, after `make install` (`make bench` installs peers, too):

    repirl bench --shape 1024x576x49152 --shape 256x2048x151936 --task sft --json before.json   # N x D x V
    repirl bench --shape 1024x576x49152 --peer my_heads:plain --json after.json --csv after.csv
    repirl bench compare before.json after.json --fail-below 0.95

{protocol}
For example `my_heads.py`:

```python
{example}```

`repirl bench compare A.json B.json` compares two runs, of two revisions say, row by row: A's figure over B's, above 1
if B is better. Times are compared in multiples of the bare product of the same rounds, which evens out a machine that
was busier in one of the runs (`--unit seconds` compares seconds). The spread is that of 95% of the ratios of medians
over resampled rounds. With `--fail-below 0.95` the exit code is 1 if a ratio of ours is below 0.95 or one of ours no
longer runs, and 2 if the files cannot be compared; `--of time memory error` says which ratios count. Choose a ratio
that two runs of one revision do not fall below on that machine. Peers show what has changed beside the code: theirs
should be 1.

`python -m bench.report --results FOLDER --page FILE` makes a page such as this one from `FOLDER/*/ops*.json`, with its
plots. It writes into the page's folder and nowhere else; without options it needs to be called in a clone's top folder,
and writes there. `--profile sweep` measures N and V apart from each other, for curves.
"""

SCHEMA = """## The JSON

What `repirl bench --json FILE` writes. `bench/schema.py` holds this description, and checks files by it. `--csv FILE`
writes a line for each case and contender, with the columns {columns}.

{tables}"""

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
    parser.add_argument("--results", type=Path, help="folder with */ops*.json; default: bench/results of this folder")
    parser.add_argument(
        "--page", type=Path, help="default: bench/README.md of this folder; plots are written beside it"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all rows there, too")
    options = parser.parse_args(arguments)
    # Never the folder of this file: it may be another checkout than the one that the caller is in.
    if (options.results is None or options.page is None) and not Path("bench/results").is_dir():
        print(
            f"{Path.cwd()} has no bench/results: call this in the top folder of a clone, or name --results and --page",
            file=sys.stderr,
        )
        return 2
    results, target = options.results or Path("bench/results"), options.page or Path("bench/README.md")
    files = sorted(results.glob("*/ops*.json"))
    if not files:
        print(f"{results} has no */ops*.json; make one with python -m bench.run --json FILE", file=sys.stderr)
        return 2
    try:
        contents = {file: load(file) for file in files}
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(contents, target.parent, sorted(results.glob("**/*.md"))))
    print(f"written to {target}, with its plots")
    if options.csv:
        write_csv(options.csv, {os.path.relpath(file, target.parent): content for file, content in contents.items()})
        print(f"written to {options.csv}")
    return 0


def page(results: dict[Path, dict[str, Any]], folder: Path, others: Sequence[Path] = ()) -> str:
    """The page for ``folder``, with links to other pages of results; writes the plots into it.

    Args:
        results: contents of the files.
        folder: where the page will be. Plots of files below it are written beside them, of others into ``plots``.
        others: pages of other results.
    """
    parts = [INTRODUCTION]
    if others:
        links = [f"* [{title(other)}]({os.path.relpath(other, folder)})" for other in others]
        parts.append("\n".join(["Of the trainer:", "", *links, ""]))
    parts.append(OWN.format(protocol=PROTOCOL, example=EXAMPLE))
    on_gpu = any(result["device"] == "cuda" for result in results.values())
    parts.append(ON_A_GPU.format(measured="" if on_gpu else "No figure on this page was measured on a GPU.\n\n"))
    for file, result in results.items():
        link = os.path.relpath(file, folder)
        parts.append(f"## {heading(result)}\n\n{environment(result)}\n\n`{result['command']}`: [{link}]({link})\n")
        for name, drawing in figures(result).items():
            image = _plots_folder(file, folder) / f"{file.stem}_{name}.svg"
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_text(drawing)
            parts.append(f"![{name.replace('_', ' ')} of a step]({os.path.relpath(image, folder)})\n")
        parts += [table(measured) for measured in result["cases"]]
    columns = ", ".join(f"`{column}`" for column in COLUMNS)
    parts.append(SCHEMA.format(columns=columns, tables=markdown()))
    return "\n".join(parts)


def _plots_folder(file: Path, folder: Path) -> Path:
    """Beside the results if they lie below the page's folder, else in that folder: nothing else is written to."""
    if file.resolve().is_relative_to(folder.resolve()):
        return file.parent
    return folder / "plots" / file.parent.name


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
    else:
        lines += ["| | MiB | error |", "|---|---:|---|"]
    for row in (row for row in in_order(measured["rows"]) if "reason" not in row):
        name = f"**{row['contender']}**" if row["ours"] else row["contender"]
        times = ""
        if "median" in row:
            quartiles = f"{1e3 * row['low']:.1f} to {1e3 * row['high']:.1f}"
            times = f"{1e3 * row['median']:.1f} | {quartiles} | {row['products']:.2f} | "
        lines.append(f"| {name} | {times}{row['extra_bytes'] / 2**20:.0f} | {error_text(row)} |")
    reasons = [f"{row['contender']} ({row['reason']})" for row in measured["rows"] if "reason" in row]
    return "\n".join(lines) + ("\n\nNot measured: " + "; ".join(reasons) + "." if reasons else "") + "\n"


if __name__ == "__main__":
    sys.exit(main())
