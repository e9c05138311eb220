"""What ``bench/gpu.py wheels`` gathers, with wheels made here in place of a registry's."""

import subprocess
import tarfile
from pathlib import Path

import pytest

from bench import gpu, gpu_wheels

PYDANTIC = "Requires-Dist: typing-extensions>=4.14\nRequires-Dist: pydantic-core==2.50.5\n"


@pytest.fixture
def registry(monkeypatch, make_wheel):
    """Replaces pip: makes a wheel for every requirement, and records the commands."""
    commands: list[list[str]] = []

    def pip(command, check):
        words = [str(word) for word in command]
        commands.append(words)
        folder = Path(words[words.index("--dest" if "download" in words else "--wheel-dir") + 1])
        names = words[words.index(str(folder)) + 1 :]
        for name in names:
            name = name.replace(">", "=").split("=")[0].replace("-", "_")
            files = {f"{name}/library.so": "library", f"{name}/include/library.h": "header"}
            make_wheel(folder, name, files, PYDANTIC if name == "pydantic" else "")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(gpu_wheels.subprocess, "run", pip)
    monkeypatch.setattr(gpu_wheels, "tree_bytes", lambda root: gpu_wheels.MIB)
    return commands


def test_everything_is_gathered_for_the_machine_with_a_gpu(registry, tmp_path, capsys):
    assert gpu.main(["wheels", "--to", str(tmp_path / "wheels")]) == 0
    names = {file.name.split("-")[0] for file in (tmp_path / "wheels").glob("*.whl")}
    assert {"trl", "liger_kernel", "pydantic", "pydantic_core", "antlr4_python3_runtime"} < names
    assert [file.name for file in (tmp_path / "wheels").iterdir() if file.suffix != ".whl"] == [gpu_wheels.ARCHIVE]
    for words in registry:
        assert "--no-deps" in words
        if "download" in words:
            assert words[words.index("--python-version") + 1] == "3.12"
    assert any("pydantic-core==2.50.5" in words for words in registry)
    assert any("nvidia-cutlass-dsl-libs-cu13==4.8.1" in words for words in registry)
    output = capsys.readouterr().out
    assert "this takes minutes" in output
    assert "beside 1.00 MiB of the repository" in output
    with tarfile.open(tmp_path / "wheels" / gpu_wheels.ARCHIVE) as archive:
        libraries = {name.split("/")[0] for name in archive.getnames() if name.endswith("library.so")}
    assert libraries == {name.replace("-", "_") for name in gpu_wheels.ARCHIVED}


def test_the_archive_leaves_out_what_is_not_read(tmp_path, make_wheel):
    kept = {
        "dsl/core.py": "core",
        "dsl/lib/runtime.so": "runtime",
        "dsl/lib/stubs/x86_64/runtime.so": "stub",
        "dsl/data.a.json": "{}",
    }
    dropped = ("dsl/lib/stubs/aarch64-unknown-linux-gnu/runtime.so", "dsl/include/dsl.h", "dsl/lib/libruntime.a")
    wheels = [
        make_wheel(tmp_path / "wheels", "dsl", kept | dict.fromkeys(dropped, "")),
        make_wheel(tmp_path / "wheels", "dsl_libs", {"dsl/more.so": "more"}),
    ]
    gpu_wheels.pack(wheels, tmp_path / "dsl.tar.xz")
    with tarfile.open(tmp_path / "dsl.tar.xz") as archive:
        names = archive.getnames()
        archive.extractall(tmp_path / "unpacked", filter="data")
    for name, text in (kept | {"dsl/more.so": "more"}).items():
        assert (tmp_path / "unpacked" / name).read_text() == text
    assert not set(dropped) & set(names)
    assert [name.endswith(".so") for name in names] == sorted(name.endswith(".so") for name in names)
    assert [file.name for file in tmp_path.glob("dsl.tar.xz*")] == ["dsl.tar.xz"]


def test_what_is_too_large_to_be_carried_is_told(tmp_path, capsys):
    with (tmp_path / "large.whl").open("wb") as file:
        file.truncate(60 * gpu_wheels.MIB)
    assert gpu_wheels.report(tmp_path, 4 * gpu_wheels.MIB) == 0
    assert gpu_wheels.report(tmp_path, 5 * gpu_wheels.MIB) == 1
    assert "together 65.00 MiB, more than the 64 MiB that can be carried" in capsys.readouterr().out


def test_a_folder_that_is_not_empty_is_refused(tmp_path, capsys, make_wheel):
    make_wheel(tmp_path, "trl", {})
    with pytest.raises(SystemExit):
        gpu_wheels.main(["--to", str(tmp_path)])
    assert "must be an empty folder" in capsys.readouterr().err


def test_a_download_that_fails_is_told(tmp_path, monkeypatch, capsys):
    def fails(command, check):
        raise subprocess.CalledProcessError(7, command)

    monkeypatch.setattr(gpu_wheels.subprocess, "run", fails)
    assert gpu_wheels.main(["--to", str(tmp_path / "wheels")]) == 1
    assert "ended with 7" in capsys.readouterr().err


def test_a_version_that_is_not_pinned_is_told(tmp_path, make_wheel):
    make_wheel(tmp_path, "pydantic", {}, "Requires-Dist: pydantic-core>=2\n")
    with pytest.raises(ValueError, match=r"pydantic-1.0-py3-none-any.whl asks for no single version of pydantic-core"):
        gpu_wheels.pinned_version(tmp_path, "pydantic-core", "pydantic")


def test_the_repositorys_size_counts_what_git_does_not_ignore(tmp_path):
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / ".gitignore").write_text("ignored\n")
    (tmp_path / "new").write_text("x" * 100)
    (tmp_path / "ignored").write_text("x" * 1000)
    assert gpu_wheels.tree_bytes(tmp_path) == 100 + len("ignored\n")
