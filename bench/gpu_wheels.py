"""Gathers the packages that ``bench/gpu.py`` needs besides the repository, as files for a machine without network.

    python bench/gpu.py wheels --to DIR

``DIR`` gets wheels of the peers, wheels of packages that the machine's image lacks, for Python 3.12 on x86-64 Linux,
and an archive of NVIDIA's CuTe DSL, which Liger's kernel for Hopper needs. The DSL's library has 92 MB as a wheel and
52 MiB in this archive. Packing takes five to ten minutes of one core and 3 GiB of memory; the rest takes seconds.
"""

import argparse
import lzma
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
# The largest size of the folder and the repository's files together, in bytes.
LARGEST = 64 * MIB

# Requirements, each with what needs it. The image has PyTorch, Triton, transformers, peft and pytest. torchao is left
# out: it is large, and what runs on a GPU does not use it.
PACKAGES = {
    "liger-kernel>=0.8.5": "a peer",
    "cut-cross-entropy>=25.1": "a peer",
    "trl>=1.16,<1.17": "a peer",
    "datasets": "trl",
    "dill": "datasets",
    "multiprocess==0.70.19": "datasets, which needs this version",
    "gguf": "repirl",
    "math-verify": "repirl",
    "latex2sympy2-extended": "math-verify",
    "pydantic": "repirl",
    "annotated-types": "pydantic",
    "typing-extensions": "pydantic",
    "typing-inspection": "pydantic",
}
# Packages in the version that the other package pins.
PINNED = {"pydantic-core": "pydantic"}
# Packages that have no wheel to download; one is built here.
BUILT = {"antlr4-python3-runtime==4.13.2": "math-verify"}
ARCHIVED = ("nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-base", "nvidia-cutlass-dsl-libs-core")
ARCHIVED += ("nvidia-cutlass-dsl-libs-cu13",)
ARCHIVE_VERSION = "4.8.1"
ARCHIVE = f"nvidia_cutlass_dsl-{ARCHIVE_VERSION}-cu13-cp312.tar.xz"
# Files for other processors, and for compiling C++ against the library.
_DROPPED = re.compile(r"/stubs/aarch64-|\.(a|h)$")
# The dictionary is larger than the largest library: with the preset's 64 MiB, the archive is 7 MiB larger.
_STRONGEST = {"preset": 9 | lzma.PRESET_EXTREME, "dict_size": 256 * MIB, "nice_len": 273}
_FILTERS = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, **_STRONGEST}]
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
_PLATFORMS += ("manylinux1_x86_64",)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu.py wheels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="an empty folder, or one to be made")
    options = parser.parse_args(arguments)
    if options.to.exists() and (not options.to.is_dir() or any(options.to.iterdir())):
        parser.error(f"--to: {options.to} must be an empty folder: two versions of a wheel cannot be installed")
    options.to.mkdir(parents=True, exist_ok=True)
    try:
        gather(options.to)
    except subprocess.CalledProcessError as error:
        print(f"{' '.join(map(str, error.cmd))}\nended with {error.returncode}", file=sys.stderr)
        return 1
    return report(options.to, tree_bytes(ROOT))


def gather(folder: Path) -> None:
    download(folder, list(PACKAGES))
    download(folder, [f"{name}=={pinned_version(folder, name, by)}" for name, by in PINNED.items()])
    _pip("wheel", "--no-deps", "--wheel-dir", folder, *BUILT)
    with tempfile.TemporaryDirectory() as unpacked:
        download(Path(unpacked), [f"{name}=={ARCHIVE_VERSION}" for name in ARCHIVED])
        print(f"packing {ARCHIVE}: this takes minutes", flush=True)
        pack(sorted(Path(unpacked).glob("*.whl")), folder / ARCHIVE)


def download(folder: Path, requirements: Sequence[str]) -> None:
    """Download wheels for the image's Python, which may differ from this one."""
    target = ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    target += [word for platform in _PLATFORMS for word in ("--platform", platform)]
    _pip("download", "--no-deps", *target, "--dest", folder, *requirements)


def _pip(*words: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words], check=True)


def pinned_version(folder: Path, name: str, by: str) -> str:
    """The version of ``name`` that the wheel of ``by`` in ``folder`` pins. ValueError if it pins none."""
    wheel = next(folder.glob(f"{by.replace('-', '_')}-*.whl"))
    with zipfile.ZipFile(wheel) as files:
        metadata = next(member for member in files.namelist() if member.endswith(".dist-info/METADATA"))
        text = files.read(metadata).decode()
    requirement = re.search(rf"^Requires-Dist: {re.escape(name)} ?\(?==([\w.]+)", text, re.MULTILINE)
    if requirement is None:
        raise ValueError(f"{wheel.name} asks for no single version of {name}")
    return requirement[1]


def pack(wheels: Sequence[Path], archive: Path) -> None:
    """Pack the wheels' files into one archive, without files that are not needed, similar ones side by side."""
    contents: dict[str, bytes] = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as files:
            kept = [
                member for member in files.infolist() if not member.is_dir() and not _DROPPED.search(member.filename)
            ]
            contents |= {member.filename: files.read(member) for member in kept}
    names = sorted(contents, key=lambda name: (name.endswith(".so"), Path(name).suffix, name))
    partial = archive.with_name(archive.name + ".partial")
    with (
        lzma.open(partial, "wb", filters=_FILTERS) as compressed,
        tarfile.open(fileobj=compressed, mode="w|", format=tarfile.GNU_FORMAT) as tar,
    ):
        for name in names:
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(contents[name]), 0o755 if name.endswith(".so") else 0o644
            tar.addfile(member, BytesIO(contents[name]))
    partial.replace(archive)


def tree_bytes(root: Path) -> int:
    """Size of the repository's files that git tracks or does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    return sum((root / name).lstat().st_size for name in names if name and (root / name).is_file())


def report(folder: Path, tree: int) -> int:
    """Print the sizes; return 1 if folder and tree together exceed LARGEST."""
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    for name, size in sorted(sizes.items(), key=lambda entry: -entry[1]):
        print(f"{size / MIB:8.2f} MiB  {name}")
    total = sum(sizes.values())
    print(f"{total / MIB:8.2f} MiB  in {folder}, beside {tree / MIB:.2f} MiB of the repository")
    if total + tree > LARGEST:
        print(f"together {(total + tree) / MIB:.2f} MiB, more than the {LARGEST / MIB:.0f} MiB that can be carried")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
