"""One run in a folder: a second one is refused, and whoever was killed leaves no lock."""

import errno
import logging
import os
import signal
import subprocess
import sys

import pytest
import yaml
from equal_runs import assert_equal_runs
from tiny import tiny_values

from repirl.cli import main
from repirl.config import ConfigError
from repirl.configfile import build_config
from repirl.lock import locked
from repirl.loop import train
from repirl.report.log import MetricsLogger

HOLD = """
import sys
from repirl.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path / "run"."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path, holder):
    message = rf"output_dir '.*/run' is in use by another run \(process {holder.pid} on .*, since .*\): wait until"
    with pytest.raises(ConfigError, match=message), locked(tmp_path / "run"):
        pass
    # The lock is in the kernel, so nothing is left of it.
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(tmp_path / "run"), pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
        locked(tmp_path / "run").__enter__()
    with locked(tmp_path / "run"):
        pass


def test_other_processes_of_the_same_run_take_no_lock(tmp_path, holder, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with locked(tmp_path / "run"):
        pass


def test_a_second_run_leaves_the_first_alone(tmp_path, monkeypatch, capsys):
    options = {"objective": "sft", "steps": 2, "eval": {"every": 0}, "data": {"eval": None}}
    whole = tiny_values(tmp_path, output_dir=str(tmp_path / "whole"), **options)
    train(build_config(whole))
    values = tiny_values(tmp_path, **options)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    codes = []

    def log(self, *arguments):
        for more in ([], ["--resume"]):
            codes.append(main(["train", "--config", str(file), *more]))
        return plain(self, *arguments)

    plain = MetricsLogger.log
    monkeypatch.setattr(MetricsLogger, "log", log)
    train(build_config(values))
    assert codes == [2] * 4
    assert capsys.readouterr().err.count(f"is in use by another run (process {os.getpid()} on ") == 4
    assert_equal_runs(values, whole)


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with caplog.at_level(logging.WARNING), locked(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert "has no locks (No locks available): nothing keeps a second run out" in caplog.text


@pytest.mark.parametrize("path", ["file", "file/run"])
def test_a_file_is_no_output_folder(tmp_path, path, capsys):
    (tmp_path / "file").write_text("precious")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tiny_values(tmp_path, output_dir=str(tmp_path / path))))
    assert main(["train", "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert f"output_dir {str(tmp_path / path)!r} cannot be made: it is a file, or a part of the path is" in error
    assert error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
@pytest.mark.parametrize("call", ["pathlib.Path.mkdir", "os.open", "os.pwrite"])
def test_a_folder_that_cannot_be_written_to_is_told(tmp_path, monkeypatch, number, call):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(call, fail)
    message = f"cannot be written to: {os.strerror(number)}; give a folder that can"
    with pytest.raises(ConfigError, match=message), locked(tmp_path / "run"):
        pass
