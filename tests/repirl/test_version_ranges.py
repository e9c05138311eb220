"""The releases that pyproject.toml declares for the extra `train` work: the oldest (all together, and single ones
beside newer packages), the newest, and what is newer still, which no user can get by accident.

Each lot goes into an environment of its own on top of the running one, whose packages stay as they are.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from shared import ROOT

SUPPORT = ROOT / "tests" / "support"
EXTRA = [
    Requirement(text)
    for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["train"]
]


def lower_bound(requirement: Requirement) -> str:
    [version] = [part.version for part in requirement.specifier if part.operator == ">="]
    return version


def with_specifier(requirement: Requirement, specifier: str) -> str:
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{specifier}"


def pip(python: Path, *arguments: str, beside_torch: bool = True) -> subprocess.CompletedProcess[str]:
    """Install wheels into the environment of `python`; beside_torch: and keep the torch that runs here."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--no-compile"]
    command += [f"torch=={torch.__version__}"] * beside_torch
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, timeout=200)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


@pytest.fixture(scope="module")
def index() -> None:
    """Skips where nothing can be installed."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("pip is not installed here")
    # The smallest package of the extra tells whether there is an index.
    options = ["--dry-run", "--no-deps", "--ignore-installed", "--retries=0", "--timeout=15"]
    probe = pip(Path(sys.executable), *options, "jinja2", beside_torch=False)
    if probe.returncode:
        pytest.skip(f"no package index can be reached: {last_line(probe.stderr)}")


@pytest.fixture
def environment(index, tmp_path) -> Iterator[Path]:
    """The interpreter of an environment that sees the packages of the running one; what it holds comes first."""
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=False)
    own = next((folder / "lib").glob("python*")) / "site-packages"
    (own / "main_environment.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    before = [importlib.metadata.version(requirement.name) for requirement in EXTRA]
    yield folder / "bin" / "python"
    assert [importlib.metadata.version(requirement.name) for requirement in EXTRA] == before
    # Some hundred megabytes, of which pytest would keep three copies.
    shutil.rmtree(folder)


def trains(python: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run range_script.py with an interpreter, which ends with the versions that it had."""
    names = [requirement.name for requirement in EXTRA]
    command = [str(python), "-W", "error::FutureWarning", str(SUPPORT / "range_script.py")]
    variables = {"PYTHONPATH": f"{ROOT}{os.pathsep}{SUPPORT}"}
    (folder / "run").mkdir()
    return subprocess.run(
        [*command, str(folder / "run"), *names],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def check(result: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """The versions that trained, without a word of what is deprecated."""
    assert result.returncode == 0, result.stderr
    assert "deprecated" not in result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_the_oldest_releases_train(environment, tmp_path):
    done = pip(environment, *(with_specifier(r, f"=={lower_bound(r)}") for r in EXTRA))
    assert done.returncode == 0, done.stderr
    versions = check(trains(environment, tmp_path))
    assert all(Version(versions[r.name]) == Version(lower_bound(r)) for r in EXTRA), versions


@pytest.mark.parametrize("name", ["transformers", "peft", "torchao"])
def test_an_old_release_trains_beside_those_that_run_here(environment, tmp_path, name):
    """As for a user who has it already: pip leaves alone what the ranges admit. These import one another."""
    [old] = [f"{r.name}=={lower_bound(r)}" for r in EXTRA if r.name == name]
    done = pip(environment, old)
    assert done.returncode == 0, done.stderr
    versions = check(trains(environment, tmp_path))
    assert Requirement(old).specifier.contains(versions[name]), versions


def test_the_newest_releases_train(environment, tmp_path):
    done = pip(environment, "--upgrade", *map(str, EXTRA))
    assert done.returncode == 0, done.stderr
    versions = check(trains(environment, tmp_path))
    assert all(r.specifier.contains(versions[r.name]) for r in EXTRA), versions


def test_releases_beyond_the_bounds_are_tried(environment, tmp_path):
    """Not a failure of this revision, since no user gets them: it says whether a bound can be raised."""
    newer = [with_specifier(r, f">={lower_bound(r)}") for r in EXTRA]
    report = pip(environment, "--upgrade", "--dry-run", "--report", "-", *newer)
    assert report.returncode == 0, report.stderr
    versions = {
        item["metadata"]["name"].lower(): item["metadata"]["version"] for item in json.loads(report.stdout)["install"]
    }
    beyond = [
        f"{r.name} {versions[r.name]}"
        for r in EXTRA
        if r.name in versions and not r.specifier.contains(versions[r.name])
    ]
    if not beyond:
        pytest.skip("the bounds admit all that is out")
    done = pip(environment, "--upgrade", *newer)
    assert done.returncode == 0, done.stderr
    result = trains(environment, tmp_path)
    if result.returncode:
        pytest.xfail(f"not ready for {', '.join(beyond)}: {last_line(result.stderr)}")
    print(f"works with {', '.join(beyond)}: the upper bounds can be raised")
