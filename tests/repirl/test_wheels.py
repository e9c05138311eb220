"""What `make wheels` and pip make of the repository: built here without a compiler, which takes seconds."""

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser

import pytest
from check_wheels import INSTRUCTION_SETS, check_source, check_wheel
from check_wheels import main as check_folder
from shared import ROOT


def run(folder, code_or_module, *arguments, **environment):
    return subprocess.run(
        [sys.executable, *code_or_module, *map(str, arguments)],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of what git knows: a source distribution looks at every file below, and here are virtual environments."""
    folder = tmp_path_factory.mktemp("sources")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if os.path.lexists(ROOT / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name, follow_symlinks=False)
    return folder


@pytest.fixture(scope="module")
def built(sources, tmp_path_factory):
    """The folder of a wheel that was built where no C++ compiler works, and what pip printed."""
    folder = tmp_path_factory.mktemp("wheel")
    done = run(
        sources,
        ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"],
        *("--wheel-dir", folder, "."),
        CXX="/nowhere/c++",
    )
    return folder, done.stdout


@pytest.fixture(scope="module")
def wheel(built):
    [path] = built[0].glob("*.whl")
    return path


@pytest.fixture
def with_kernels(wheel, tmp_path):
    """with_kernels(content, tag) copies the wheel as if it had a module of this content."""

    def copy(content, tag="cp312-abi3-manylinux_2_34_x86_64", **others):
        path = shutil.copy(wheel, tmp_path / f"repirl-0.1.0-{tag}.whl")
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("repirl_kernels/_native.abi3.so", content)
            for name, text in others.items():
                archive.writestr(name.replace("__", "/"), text)
        return tmp_path / path.name

    return copy


KERNELS = b"\0" + b"\0".join(name.encode() for name in INSTRUCTION_SETS) + b"\0"


def test_pip_says_that_there_is_no_compiler(built, wheel):
    assert f"Created wheel for repirl: filename={wheel.name}" in built[1]
    assert wheel.name == "repirl-0.1.0-0_without_cpp_kernels-py3-none-any.whl"


def test_metadata_is_whole(wheel):
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Author"] == "repirl developers"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == "<3.14,>=3.11"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    versions = {c for c in metadata.get_all("Classifier") if c.startswith("Programming Language :: Python :: 3.")}
    assert versions == {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)}
    assert "Project-URL" not in metadata  # There is no public address yet.


def test_a_wheel_without_kernels_is_no_release(wheel):
    [message] = check_wheel(wheel)
    assert "it has no C++ kernels: pip wheel --verbose . shows why" in message


def test_a_wheel_is_accepted(with_kernels):
    assert check_wheel(with_kernels(KERNELS)) == []


def test_what_is_wrong_with_a_wheel_is_told(with_kernels):
    path = with_kernels(KERNELS.replace(b"avx2\0", b"") + b"/build/env-1/nanobind/src/nb_func.cpp\0")
    assert sorted(check_wheel(path)) == [
        "repirl_kernels/_native.abi3.so has no kernels for avx2",
        "repirl_kernels/_native.abi3.so names a folder of the build: /build/env-1/nanobind/src/nb_func.cpp",
    ]
    path = with_kernels(KERNELS, "cp312-abi3-linux_x86_64", tests__test_x="", repirl__results__a="")
    assert check_wheel(path) == [
        "tests does not belong into it",
        "tests/test_x does not belong into it",
        "repirl/results/a does not belong into it",
        "its platform is no manylinux, so package indexes refuse it",
    ]


def test_the_source_distribution_has_what_a_build_needs(sources, tmp_path, with_kernels, capsys):
    code = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    run(sources, ["-c", code], tmp_path)
    [path] = tmp_path.glob("*.tar.gz")
    assert path.name == "repirl-0.1.0.tar.gz"
    assert check_source(path) == []
    # The folder as a whole: a wheel for 3.11 is missing.
    with_kernels(KERNELS)
    assert check_folder(str(tmp_path)) == 1
    assert f"{tmp_path} has no wheel cp311-cp311\n" in capsys.readouterr().out
    with_kernels(KERNELS, "cp311-cp311-manylinux_2_34_x86_64")
    assert check_folder(str(tmp_path)) == 0
    assert "2 wheels, 1 source distributions: no problems" in capsys.readouterr().out
