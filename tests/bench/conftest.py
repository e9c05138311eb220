"""Shared by the benchmarks' tests."""

import base64
import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def make_wheel() -> Callable[..., Path]:
    """``make_wheel(folder, name, {member: text}, metadata="", tag="py3-none-any")`` writes a wheel and returns its
    path."""
    return _make_wheel


def _make_wheel(folder: Path, name: str, files: dict[str, str], metadata: str = "", tag: str = "py3-none-any") -> Path:
    folder.mkdir(exist_ok=True)
    information = f"{name}-1.0.dist-info"
    head = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n"
    files = {
        **files,
        f"{information}/METADATA": head + metadata,
        f"{information}/WHEEL": f"Wheel-Version: 1.0\nGenerator: by hand\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    record = ""
    with zipfile.ZipFile(folder / f"{name}-1.0-{tag}.whl", "w") as wheel:
        for member, text in files.items():
            wheel.writestr(member, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            record += f"{member},sha256={digest},{len(text)}\n"
        wheel.writestr(f"{information}/RECORD", record + f"{information}/RECORD,,\n")
    return folder / f"{name}-1.0-{tag}.whl"
