"""A checkpoint from somebody else runs no code when it is loaded."""

import json
import pathlib
import pickle
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_config

from repirl.checkpoint.load import load_weights
from repirl.checkpoint.manifest import checksum, resolve_checkpoint
from repirl.cli import main
from repirl.config import ConfigError
from repirl.loop import train
from repirl.run import build


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_config(folder, objective="sft", steps=1, data={"eval": None})
    train(config)
    return config


def rewrite(checkpoint: Path, file: Path, content: bytes) -> bytes:
    """Put other content into a file and make the manifest right again; returns what was there."""
    before = file.read_bytes()
    file.write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest[str(file.relative_to(checkpoint))] = [len(content), checksum(file)]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    return before


@pytest.mark.parametrize("kind", ["reduce", "global", "not an index", "damaged"])
def test_the_index_runs_nothing(trained, tmp_path, kind, capsys):
    path = resolve_checkpoint(trained.output_dir)
    file, mark = path / "policy" / "tensors" / ".metadata", tmp_path / "mark"
    content = {
        "reduce": pickle.dumps(Harmful(mark)),
        "global": b"cos\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR.",
        "not an index": pickle.dumps({"a": 1}),
        "damaged": file.read_bytes()[:100],
    }[kind]
    before = rewrite(path, file, content)
    try:
        assert main(["export", "--checkpoint", trained.output_dir, "--output", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert ".metadata' is no index of a checkpoint" in error
        assert "Traceback" not in error
        run = build(trained)
        with pytest.raises(ConfigError, match="is no index of a checkpoint"):
            run.restore(path)
        assert not mark.exists()
    finally:
        rewrite(path, file, before)


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_an_index_that_another_python_wrote_is_read(trained, monkeypatch, module):
    """In Python 3.13 the classes of paths are in a module of another name."""
    path = resolve_checkpoint(trained.output_dir)
    file = path / "policy" / "tensors" / ".metadata"
    index = pickle.loads(file.read_bytes())
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module, pathlib)
        patch.setattr(pathlib.PosixPath, "__module__", module)
        content = pickle.dumps(index)
    assert module.encode() in content
    before = rewrite(path, file, content)
    try:
        build(trained).restore(path)
    finally:
        rewrite(path, file, before)


def test_values_run_nothing(trained, tmp_path):
    """A number of the optimiser, replaced by a pickle of the same length in the same place."""
    path = resolve_checkpoint(trained.output_dir)
    index = pickle.loads((path / "policy" / "tensors" / ".metadata").read_bytes())
    entry = next(i for i in index.storage_data if "weight_decay" in i.fqn)
    place = index.storage_data[entry]
    file, mark = path / "policy" / "tensors" / place.relative_path, tmp_path / "mark"
    torch.save(Harmful(mark), tmp_path / "harmful.pt")
    harmful = (tmp_path / "harmful.pt").read_bytes()
    content = file.read_bytes() + harmful
    metadata = path / "policy" / "tensors" / ".metadata"
    place.offset, place.length = len(content) - len(harmful), len(harmful)
    before, before_index = file.read_bytes(), metadata.read_bytes()
    try:
        rewrite(path, file, content)
        rewrite(path, metadata, pickle.dumps(index))
        run = build(trained)
        with pytest.raises(ConfigError, match=r"weight_decay' is more than plain data; it was not loaded"):
            run.restore(path)
        assert not mark.exists()
    finally:
        rewrite(path, file, before)
        rewrite(path, metadata, before_index)


def test_sound_ones_are_read(trained):
    run = build(trained)
    assert run.restore(resolve_checkpoint(trained.output_dir)) == 1
    load_weights(resolve_checkpoint(trained.output_dir), "policy", run.learners["policy"])


def test_everything_a_checkpoint_can_hold_is_read(tmp_path):
    """Quantised moments, adapters, rollouts of an asynchronous checkpoint."""
    values = {"prm": {"optimizer": {"lr": 1e-3, "state_bits": 8}}, "checkpoint": {"every": 1, "asynchronous": True}}
    config = tiny_config(tmp_path, steps=1, adapters={"rank": 4}, **values)
    train(config)
    assert build(config).restore(resolve_checkpoint(config.output_dir)) == 1
