"""Signals that ask a run to end: the turn is finished and saved, and resuming goes on as if nothing had been."""

import itertools
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from equal_runs import assert_equal_runs
from tiny import tiny_values

from repirl.checkpoint.manifest import list_checkpoints
from repirl.cli import main
from repirl.configfile import build_config
from repirl.interrupt import Interrupted, Signals
from repirl.loop import train
from repirl.objectives.rloo import RLOO

OPTIONS = {"objective": "rloo", "steps": 4, "eval": {"every": 0}, "checkpoint": {"every": 3}}
CODES = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143)]
SECONDS_TO_END = 30


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The options of a run that nothing has disturbed, in a folder with its model and data."""
    folder = tmp_path_factory.mktemp("whole")
    values = tiny_values(folder, output_dir=str(folder / "whole"), **OPTIONS)
    train(build_config(values))
    return values


@pytest.fixture
def command(whole, tmp_path):
    """The command line of another run with the same options, and those."""
    values = whole | {"output_dir": str(tmp_path / "run")}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    return ["train", "--config", str(file)], values


def send_in_turn(monkeypatch, turn, *numbers):
    """Signals to this process before the policy's update of a turn."""
    select, calls = RLOO.select, itertools.count(1)

    def signalled(self, *arguments):
        if next(calls) == turn:
            for number in numbers:
                os.kill(os.getpid(), number)
        return select(self, *arguments)

    monkeypatch.setattr(RLOO, "select", signalled)


def names(values):
    return [path.name for path in list_checkpoints(f"{values['output_dir']}/checkpoints")]


@pytest.mark.parametrize(("number", "code"), CODES)
def test_a_signal_ends_the_run_after_its_turn(whole, command, monkeypatch, capfd, number, code):
    arguments, values = command
    with monkeypatch.context() as patch:
        send_in_turn(patch, 2, number)
        assert main(arguments) == code
    errors = capfd.readouterr().err
    name = signal.Signals(number).name
    assert f"repirl: {name}: the run ends after this turn; once more, and it ends at once\n" in errors
    assert f"repirl: {name}: turn 2 of 4 is done and saved in {values['output_dir']!r}; go on with --resume\n" in errors
    assert "Traceback" not in errors
    # Between the saves that the options ask for.
    assert names(values) == ["step_2"]
    if number == signal.SIGTERM:
        assert main([*arguments, "--resume"]) == 0
        assert_equal_runs(values, whole)
    # As before.
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_that_is_at_its_last_turn_is_done(command, monkeypatch):
    arguments, values = command
    send_in_turn(monkeypatch, 4, signal.SIGTERM)
    assert main(arguments) == 0
    assert names(values) == ["step_3", "step_4"]


def test_a_second_signal_gives_the_turn_up(whole, command, monkeypatch, capfd):
    arguments, values = command
    with monkeypatch.context() as patch:
        send_in_turn(patch, 4, signal.SIGTERM, signal.SIGINT)
        assert main(arguments) == 130
    errors = capfd.readouterr().err
    assert (
        "repirl: SIGINT: the turn was given up; of the checkpoints the newest complete one is step_3, go on" in errors
    )
    assert "Traceback" not in errors
    assert names(values) == ["step_3"]
    assert main([*arguments, "--resume"]) == 0
    assert_equal_runs(values, whole)


def test_under_torchrun_two_signals_at_once_are_one(command, monkeypatch):
    """The scheduler's to all processes, and torchrun's."""
    arguments, values = command
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr("repirl.loop.end_with_torchrun", lambda: None)
    monkeypatch.setattr("repirl.cli.end_with_torchrun", lambda: None)
    send_in_turn(monkeypatch, 2, signal.SIGTERM, signal.SIGTERM)
    assert main(arguments) == 143
    assert names(values) == ["step_2"]


def test_where_nothing_is_to_be_saved_it_says_so(command, monkeypatch, capfd):
    arguments, values = command
    send_in_turn(monkeypatch, 2, signal.SIGTERM)
    assert main([*arguments, "--checkpoint.every", "0"]) == 143
    assert "turn 2 of 4 is done; nothing was saved, because checkpoint.every is 0" in capfd.readouterr().err
    assert names(values) == []


@pytest.mark.parametrize("place", ["repirl.loop.build", "repirl.evaluate.evaluate_checkpoint", "repirl.cli._load"])
def test_before_the_first_turn_a_signal_ends_at_once(command, monkeypatch, capsys, place):
    arguments, values = command
    arguments = ["eval" if "evaluate" in place else "train", *arguments[1:]]
    monkeypatch.setattr(place, lambda *_, **__: os.kill(os.getpid(), signal.SIGUSR1))
    assert main(arguments) == 143
    assert capsys.readouterr().err == "repirl: SIGUSR1: stopped; nothing was saved\n"
    assert names(values) == []


def run_python(code, ignored=()):
    def ignore():
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    code = f"import os, signal\nfrom repirl.interrupt import *\nown = os.getpid()\n{code}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, preexec_fn=ignore, capture_output=True, text=True, check=False)


def test_the_third_signal_ends_the_process_whatever_it_does():
    code = (
        "with Signals(defer=True):\n"
        "    for _ in range(3):\n"
        "        try: os.kill(own, signal.SIGTERM)\n"
        "        except Interrupted: print('given up', flush=True)\n"
        "print('not here')"
    )
    result = run_python(code)
    assert (result.returncode, result.stdout) == (143, "given up\n")


def test_what_is_ignored_stays_ignored():
    """In the background of a script SIGINT is, and is meant for whatever is in front."""
    result = run_python("with Signals(defer=False): os.kill(own, signal.SIGINT); print('on')", ignored=[signal.SIGINT])
    assert (result.returncode, result.stdout) == (0, "on\n")


def test_interrupts_are_keyboard_interrupts():
    """For whoever calls train from a program or a notebook."""
    with pytest.raises(KeyboardInterrupt) as raised, Signals(defer=False):
        os.kill(os.getpid(), signal.SIGTERM)
    assert isinstance(raised.value, Interrupted)
    assert raised.value.exit_code == 143


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux does this")
@pytest.mark.parametrize("under_torchrun", [True, False])
def test_a_process_ends_with_torchrun_and_only_with_torchrun(under_torchrun):
    child = (
        "import os, time; from repirl.interrupt import end_with_torchrun; end_with_torchrun(); "
        "print(os.getpid(), flush=True); time.sleep(1000)"
    )
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    if under_torchrun:
        environment["TORCHELASTIC_RUN_ID"] = "none"
    process = subprocess.Popen([sys.executable, "-c", launcher], env=environment, stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    deadline = time.monotonic() + (SECONDS_TO_END if under_torchrun else 1)
    while (alive := is_alive(pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    if alive:
        os.kill(pid, signal.SIGKILL)
    process.stdout.close()
    assert alive is not under_torchrun


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
