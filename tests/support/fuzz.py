"""Hostile configurations, data files and model folders: none may end in a traceback or hang.

    python tests/support/fuzz.py                       500 configurations, 100 data files, 150 model folders
    python tests/support/fuzz.py --models 20 --seed 7  other numbers; the seed is printed
    python tests/support/fuzz.py --case models/17      one of them again, with what it prints

Each case is a sound run with one to three faults, given to the command line in a process of its own. What is accepted
is listed, with its faults, to be read by a person.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel
from tiny import make_data, make_model

TIMEOUT_SECONDS = 120
MAX_BYTES = 16 << 30
HOSTILE: list[Any] = [
    None, True, False, -1, 0, 1, 2, 7, 0.5, -0.5, 1e-30, 1e30, 2**31, 2**63, 2**64, float("inf"), float("nan"), "", " ",
    "abc", "null", "1:30", "017", "1e-3", "true", "~", "{prompt}", "../..", "/", "/dev/null", "é\u202e\x00", "x" * 5000,
    [], [1], ["a", None], [[]], {}, {"a": 1}, {"": ""}, [0.9, 0.99], [float("nan")] * 2, "math", "value", "cuda",
]  # fmt: skip


@dataclass
class Case:
    """faults: what was done to a sound run, in words. arguments: of the command line."""

    faults: list[str]
    arguments: list[str]


def option_names(section: type[BaseModel], prefix: str = "") -> list[str]:
    """The full names of all options, sections included."""
    names = []
    for name, field in section.model_fields.items():
        names.append(f"{prefix}{name}")
        for kind in [field.annotation, *get_args(field.annotation)]:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                names += option_names(kind, f"{prefix}{name}.")
    return names


def put(values: dict[str, Any], name: str, value: Any) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        if not isinstance(values.get(parent), dict):
            values[parent] = {}
        values = values[parent]
    values[last] = value


def spoil_text(rng: random.Random, text: bytes) -> tuple[str, bytes]:
    """One fault of bytes."""
    at, lines = rng.randrange(len(text) + 1), text.split(b"\n")
    line = rng.randrange(len(lines))
    junk = rng.choice([b"\xff\xfe", b"\x00", b"\xed\xa0\x80", b"\t", b"&a *a", b"{", b"]]", b'"', b"\\", b"- ", b": "])
    kinds: dict[str, Callable[[], bytes]] = {
        f"cut at byte {at}": lambda: text[:at],
        f"byte {at} flipped": lambda: (
            text[:at] + bytes([(text[at] ^ (1 << rng.randrange(8)))]) + text[at + 1 :]
            if at < len(text)
            else text + b"\xff"
        ),
        f"{junk!r} at byte {at}": lambda: text[:at] + junk + text[at:],
        f"line {line} left out": lambda: b"\n".join(lines[:line] + lines[line + 1 :]),
        f"line {line} twice": lambda: b"\n".join([*lines[: line + 1], *lines[line:]]),
        "byte order mark": lambda: b"\xef\xbb\xbf" + text,
        "UTF-16": lambda: text.decode(errors="replace").encode("utf-16"),
        "CRLF": lambda: text.replace(b"\n", b"\r\n"),
        "empty": lambda: b"",
    }
    fault = rng.choice([*kinds])
    return fault, kinds[fault]()


class Maker:
    """Makes cases in a folder that holds a sound model, data and configuration."""

    def __init__(self, folder: Path) -> None:
        from repirl.config import Config

        self.folder = folder
        self.names = option_names(Config)
        make_model(folder / "model")
        made = make_data(folder)
        self.data = {name: made[name] for name in ("train", "eval", "solution_column")}
        self.values: dict[str, Any] = {
            "output_dir": "run",
            "steps": 1,
            "num_threads": 1,
            "policy": {"model": str(folder / "model")},
            "prm": {"reward": "logprob"},
            "data": self.data | {"max_prompt_tokens": 32, "max_expert_tokens": 32},
            "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_response_tokens": 6},
            "eval": {"every": 0},
            "checkpoint": {"every": 0},
            "log": {"tensorboard": False},
        }

    def sound(self, place: Path) -> Case:
        """A run without a fault, which has to be accepted: else the others say nothing."""
        values = self.values | {"output_dir": str(place / "run")}
        return Case([], ["train", "--config", str(self._write(place, values))])

    def _write(self, place: Path, values: dict[str, Any]) -> Path:
        path = place / "config.yaml"
        path.write_text(yaml.safe_dump(values, allow_unicode=True))
        return path

    def configs(self, rng: random.Random, place: Path) -> Case:
        values = json.loads(json.dumps(self.values))
        faults = []
        for _ in range(rng.choice([1, 1, 2, 3])):
            name, value = rng.choice(self.names), rng.choice(HOSTILE)
            put(values, name, value)
            faults.append(f"{name} = {value!r:.60}")
        path = self._write(place, values)
        if rng.random() < 0.2:
            fault, text = spoil_text(rng, path.read_bytes())
            path.write_bytes(text)
            faults.append(f"config.yaml: {fault}")
        arguments = ["train", "--config", str(path), "--dry-run"]
        if rng.random() < 0.2:
            name, value = rng.choice(self.names), rng.choice(HOSTILE)
            arguments += [f"--{name}", str(value)]
            faults.append(f"--{name} {value!r:.60}")
        return Case(faults, arguments)

    def data_files(self, rng: random.Random, place: Path) -> Case:
        rows = [json.loads(line) for line in Path(self.data["train"]).read_text().splitlines()]
        faults, name = [], "train.jsonl"
        if rng.random() < 0.6:
            column, row, value = rng.choice([*rows[0]]), rng.randrange(len(rows)), rng.choice(HOSTILE)
            rows[row][column] = value
            faults.append(f"row {row}, {column} = {value!r:.60}")
        text = "\n".join(json.dumps(row) for row in rows).encode() + b"\n"
        if not faults or rng.random() < 0.3:
            fault, text = spoil_text(rng, text)
            faults.append(fault)
        if rng.random() < 0.2:
            name, text = "train.jsonl.gz", gzip.compress(text)
            if rng.random() < 0.5:
                fault, text = spoil_text(rng, text)
                faults.append(f"compressed: {fault}")
        elif rng.random() < 0.15:
            name = rng.choice(["train.csv", "train.parquet", "train.txt", "train"])
            faults.append(f"named {name}")
        (place / name).write_bytes(text)
        values = json.loads(json.dumps(self.values))
        values["data"]["train"] = str(place / name)
        return Case(faults, ["train", "--config", str(self._write(place, values)), "--dry-run"])

    def models(self, rng: random.Random, place: Path) -> Case:
        model = place / "model"
        shutil.copytree(self.folder / "model", model)
        faults = []
        for _ in range(rng.choice([1, 1, 2])):
            path = rng.choice(sorted(path for path in model.iterdir() if path.is_file()))
            if path.suffix == ".json" and rng.random() < 0.6:
                try:
                    content = json.loads(path.read_text())
                    key, value = rng.choice(sorted(content)), rng.choice(HOSTILE)
                    content[key] = value
                    path.write_text(json.dumps(content))
                    faults.append(f"{path.name}: {key} = {value!r:.60}")
                    continue
                except (ValueError, IndexError):
                    pass
            if rng.random() < 0.15:
                path.unlink()
                faults.append(f"no {path.name}")
            elif path.suffix == ".safetensors" and rng.random() < 0.4:
                # The header: eight bytes with its length, then JSON.
                text = path.read_bytes()
                size = int.from_bytes(text[:8], "little")
                fault, header = spoil_text(rng, text[8 : 8 + size])
                header = header.ljust(size)[:size] if rng.random() < 0.7 else header
                path.write_bytes(text[:8] + header + text[8 + size :])
                faults.append(f"{path.name}, header: {fault}")
            else:
                fault, text = spoil_text(rng, path.read_bytes())
                path.write_bytes(text)
                faults.append(f"{path.name}: {fault}")
        values = json.loads(json.dumps(self.values))
        values |= {"policy": {"model": str(model)}, "output_dir": str(place / "run")}
        return Case(faults, ["train", "--config", str(self._write(place, values))])


def run_case(case: Case, place: Path) -> tuple[str, str]:
    """Give a case to the command line, in a child process.

    Returns:
        The outcome ("accepted", "refused", "ended", "TRACEBACK", "HANG", "KILLED") and what was printed.
    """
    printed = place / "printed.txt"
    child = os.fork()
    if child == 0:
        _child(case, place, printed)
    begin, status = time.monotonic(), 0
    while time.monotonic() - begin < TIMEOUT_SECONDS:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.02)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "HANG", printed.read_text(errors="replace")
    text = printed.read_text(errors="replace")
    if os.WIFSIGNALED(status):
        return "KILLED", text
    code = os.WEXITSTATUS(status)
    if "Traceback (most recent call last)" in text or code not in (0, 1, 2):
        return "TRACEBACK", text
    return {0: "accepted", 1: "ended", 2: "refused"}[code], text


def _child(case: Case, place: Path, printed: Path) -> None:
    code = 99
    try:
        out = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(place)
        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
        from repirl.cli import main

        code = main(case.arguments)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 2
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--configs", type=int, default=500)
    parser.add_argument("--data", type=int, default=100)
    parser.add_argument("--models", type=int, default=150)
    parser.add_argument("--case", help="one case alone, such as models/17")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # Once, before the children are forked.
    import repirl.data.preview
    import repirl.loop  # noqa: F401

    counts, bad = Counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        maker = Maker(Path(folder))
        place = Path(folder, "case")
        place.mkdir()
        outcome, text = run_case(maker.sound(place), place)
        if outcome != "accepted":
            print(f"the run without a fault is {outcome}:\n{text}")
            return 1
        shutil.rmtree(place)
        kinds = {"configs": maker.configs, "data": maker.data_files, "models": maker.models}
        chosen = [f"{kind}/{i}" for kind in kinds for i in range(getattr(options, kind))]
        for name in [options.case] if options.case else chosen:
            kind = name.partition("/")[0]
            place.mkdir()
            case = kinds[kind](random.Random(f"{options.seed}/{name}"), place)
            outcome, text = run_case(case, place)
            counts[kind, outcome] += 1
            lines = [line for line in text.strip().splitlines() if line.strip()] or [""]
            if outcome in ("TRACEBACK", "HANG", "KILLED"):
                bad += 1
                print(f"{outcome} {name}: {'; '.join(case.faults)}\n    {' | '.join(lines[-3:])}", flush=True)
            elif outcome == "accepted":
                print(f"accepted {name}: {'; '.join(case.faults)}", flush=True)
            if options.case:
                print(text)
            shutil.rmtree(place)
    print(f"seed {options.seed}")
    for (kind, outcome), count in sorted(counts.items()):
        print(f"{kind}: {count} {outcome}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
