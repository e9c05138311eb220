"""Kills a run at random moments, resumes it each time, and compares it with one that nothing has disturbed.

    python tests/support/random_kills.py [--kills 20] [--seed N] [--folder DIR]

It says at which moment each kill came, and exits with 1 if a metric or a weight differs in one bit.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from equal_runs import assert_equal_runs
from tiny import tiny_values

from repirl.checkpoint.manifest import list_checkpoints

OPTIONS = {"prm": {"reward": "logprob"}, "irl": {"use_outcome": False}, "eval": {"every": 0}}
# Until a run that is killed no more is taken to hang.
SECONDS_TO_END = 900


def start(file: Path, errors: Path, *options: str) -> subprocess.Popen[bytes]:
    """A run of the command line, whose output is added to a file."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "repirl.cli", "train", "--config", str(file), *options]
    with open(errors, "ab") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


def write(folder: Path, values: dict[str, Any]) -> Path:
    """A configuration file of a run."""
    file = folder / f"{Path(values['output_dir']).name}.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def kill_and_resume(folder: Path, values: dict[str, Any], generator: random.Random, kills: int, seconds: float) -> None:
    """Run to the end through `kills` kills.

    Args:
        folder: for the configuration and the output.
        values: options of the run.
        generator: of the moments.
        kills: how many.
        seconds: what the undisturbed run took. Kills come within what the rest of it may take.
    """
    file, errors, number = write(folder, values), folder / "output.txt", 0
    checkpoints = Path(values["output_dir"]) / "checkpoints"
    while True:
        done = [path.name for path in list_checkpoints(checkpoints)]
        process = start(file, errors, "--resume")
        began = time.monotonic()
        if number < kills:
            # A start alone takes a good part of it; later kills come early enough to leave turns for the rest.
            time.sleep(generator.uniform(0.0, seconds / 2))
            process.send_signal(signal.SIGKILL)
        code = process.wait(SECONDS_TO_END)
        if code == -signal.SIGKILL:
            number += 1
            left = sorted(path.name for path in checkpoints.glob("*")) if checkpoints.exists() else []
            print(f"kill {number:2d} after {time.monotonic() - began:5.1f} s, from {done[-1:]}: {left}", flush=True)
        elif code == 0:
            print(f"the run ended after {number} kills", flush=True)
            return
        else:
            raise SystemExit(f"exit code {code}:\n{errors.read_text()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="how many")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32), help="of the moments")
    parser.add_argument("--steps", type=int, default=60, help="turns of the run")
    parser.add_argument("--folder", type=Path, default=None, help="for both runs; a temporary one by default")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="random_kills_"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"seed {options.seed}, in {folder}", flush=True)
    changes = OPTIONS | {"steps": options.steps}
    whole = tiny_values(folder, output_dir=str(folder / "whole"), **changes)
    began = time.monotonic()
    if code := start(write(folder, whole), folder / "output.txt").wait(SECONDS_TO_END):
        raise SystemExit(f"exit code {code}:\n{(folder / 'output.txt').read_text()}")
    seconds = time.monotonic() - began
    print(f"undisturbed: {seconds:.1f} s", flush=True)
    values = tiny_values(folder, output_dir=str(folder / "killed"), **changes)
    kill_and_resume(folder, values, random.Random(options.seed), options.kills, seconds)
    assert_equal_runs(values, whole)
    print("all metrics and weights are equal, to the bit")


if __name__ == "__main__":
    main()
