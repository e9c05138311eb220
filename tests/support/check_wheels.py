"""Look at wheels and a source distribution before anyone installs them (make wheels):

    python tests/support/check_wheels.py dist

Needs nothing but Python. Says what is wrong with them, and ends with 1 if there is something.
"""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from email.parser import BytesParser
from pathlib import Path

# One wheel for Python 3.11, one of the stable ABI for what is newer.
TAGS = ("cp311-cp311", "cp312-abi3")
INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512bf16")
FIELDS = ("Name", "Version", "Summary", "Author", "License-Expression", "License-File", "Requires-Python", "Classifier")
# Folders of the machine that a wheel was built on. A path of a program goes through none of them.
MACHINE_PATH = re.compile(rb"/(?:home|root|tmp|Users|work|build|mnt|opt|var)/[\w.+/-]+")
SOURCES = ("CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "csrc/module.cpp", "repirl/cli.py")


def check_wheel(path: Path) -> list[str]:
    """What is wrong with the wheel."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        problems = _check_names(names)
        [metadata] = [archive.read(name) for name in names if name.endswith(".dist-info/METADATA")]
        problems += _check_metadata(metadata)
        modules = [name for name in names if name.endswith(".so")]
        if "without_cpp_kernels" in path.name or not modules:
            return [*problems, "it has no C++ kernels: pip wheel --verbose . shows why they could not be built"]
        for name in modules:
            problems += _check_module(name, archive.read(name), path.name)
    if "manylinux" not in path.name:
        problems.append("its platform is no manylinux, so package indexes refuse it")
    return problems


def _check_names(names: list[str]) -> list[str]:
    tops = {name.split("/")[0] for name in names}
    others = {top for top in tops if top not in ("repirl", "repirl_kernels") and not top.endswith(".dist-info")}
    unwanted = [
        name for name in names if re.search(r"(^|/)(tests?|bench|results|__pycache__)/|\.pyc$|/test_\w+\.py$", name)
    ]
    wanted = ["repirl/py.typed", "repirl_kernels/py.typed", "repirl/cli.py", "repirl_kernels/triton/tiles.py"]
    return (
        [f"{top} does not belong into it" for top in sorted(others)]
        + [f"{name} does not belong into it" for name in unwanted]
        + [f"{name} is missing" for name in wanted if name not in names]
    )


def _check_metadata(content: bytes) -> list[str]:
    metadata = BytesParser().parsebytes(content)
    problems = [f"its metadata has no {field}" for field in FIELDS if field not in metadata]
    if "# repirl" not in str(metadata.get_payload()):
        problems.append("its metadata has no description (README.md)")
    return problems


def _check_module(name: str, content: bytes, wheel: str) -> list[str]:
    problems = [f"{name} names a folder of the build: {path.decode()}" for path in set(MACHINE_PATH.findall(content))]
    if "x86_64" in wheel:
        absent = [isa for isa in INSTRUCTION_SETS if not re.search(rb"(?<!\w)%b\0" % isa.encode(), content)]
        problems += [f"{name} has no kernels for {isa}" for isa in absent]
    return problems


def check_source(path: Path) -> list[str]:
    """What is wrong with the source distribution."""
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    unwanted = [name for name in sorted(names) if re.match(r"(\.ci|bench|tests|runs|dist|build|\.venv)", name)]
    return [f"{name} does not belong into it" for name in unwanted] + [
        f"{name} is missing" for name in SOURCES if name not in names
    ]


def main(folder: str) -> int:
    """The exit code."""
    wheels, sources = sorted(Path(folder).glob("*.whl")), sorted(Path(folder).glob("*.tar.gz"))
    problems = [f"{path.name}: {text}" for path in wheels for text in check_wheel(path)]
    problems += [f"{path.name}: {text}" for path in sources for text in check_source(path)]
    problems += [f"{folder} has no wheel {tag}" for tag in TAGS if not any(tag in path.name for path in wheels)]
    problems += [] if len(sources) == 1 else [f"{folder} has {len(sources)} source distributions, expected 1"]
    for problem in problems:
        print(problem)
    print(f"{len(wheels)} wheels, {len(sources)} source distributions: {len(problems) or 'no'} problems")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
