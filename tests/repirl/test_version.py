"""The versions that a bug report needs."""

import platform
from types import SimpleNamespace

import pytest
import torch
from repirl_kernels import native

import repirl
from repirl import version
from repirl.cli import main


def test_version_prints_what_a_bug_report_needs(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"repirl {repirl.__version__}"
    told = dict(line.split("  ", 1) for line in lines)
    assert told["torch"].strip() == torch.__version__
    assert told["python"].strip() == platform.python_version()
    assert {"transformers", "triton", "platform", "native CPU kernels", "GPU"} <= set(told)


def test_what_is_not_there_is_said(monkeypatch):
    monkeypatch.setattr(native, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = version.environment()
    assert told["native CPU kernels"].startswith("not built: reinstall repirl with a C++17 compiler")
    assert told["GPU"] == "none that PyTorch sees"
    assert "vllm" not in told or version.version_of("vllm")


def test_gpus_are_named(monkeypatch):
    cuda = SimpleNamespace(is_available=lambda: True, device_count=lambda: 2, get_device_name=lambda i: f"GPU {i}")
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert version.environment()["GPU"] == "GPU 0, GPU 1 (CUDA 13.0)"
