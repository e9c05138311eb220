"""What can go wrong at any moment, each really done: processes killed, a disk filled, files corrupted, NaN, hangs."""

import contextlib
import inspect
import itertools
import json
import logging
import multiprocessing
import os
import pkgutil
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from equal_runs import assert_equal_runs, metrics_of
from rank_processes import rank_processes
from tiny import make_model, objective, tiny_config, tiny_values

from repirl.batch import pack
from repirl.checkpoint import manifest
from repirl.checkpoint import save as saving
from repirl.checkpoint.load import load_checkpoint
from repirl.checkpoint.manifest import find_damage, list_checkpoints
from repirl.checkpoint.save import Checkpointer, CheckpointError
from repirl.cli import main
from repirl.config import ConfigError
from repirl.configfile import build_config
from repirl.distributed.world import World, join_world
from repirl.learner import Learner, TrainingError
from repirl.loop import train
from repirl.models import load_model, load_tokenizer
from repirl.objectives.rloo import RLOO
from repirl.options import CheckpointConfig, OptimizerConfig, VerifierConfig
from repirl.run import build
from repirl.verify.process import Verifier

OPTIONS = {"steps": 6, "prm": {"reward": "logprob"}, "irl": {"use_outcome": False}, "eval": {"every": 0}}
PATHS = [str(Path(__file__).parent), *sys.path]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(PATHS)}
if sys.platform == "linux":
    # The loopback device, whatever the host's name resolves to.
    ENVIRONMENT["GLOO_SOCKET_IFNAME"] = "lo"
# What a process does after another has died, or been told to end: far less than this.
SECONDS_TO_END = 60
# Killed processes are forked from one that has imported everything and done nothing, so each starts at once.
FORKS = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def _forks():
    FORKS.set_forkserver_preload([__name__])
    with mock.patch.dict(os.environ, ENVIRONMENT):
        forkserver.ensure_running()


def write(tmp_path, values):
    file = tmp_path / f"{Path(values['output_dir']).name}.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def die_at(owner, name, nth, number=signal.SIGKILL):
    """From now on this process sends itself a signal, by default one that kills it, at the n-th call of a function."""
    target = pkgutil.resolve_name(owner)
    function, calls = getattr(target, name), itertools.count(1)

    def dying(*arguments, **options):
        if next(calls) == nth:
            os.kill(os.getpid(), number)
        return function(*arguments, **options)

    setattr(target, name, dying)


def run(arguments, environment, errors, kill=None, largest_file=None):
    """One process of a run, by the command line."""
    os.environ.update(environment)
    with open(errors, "w") as file:
        os.dup2(file.fileno(), 2)
    Path(f"{errors}.pid").write_text(str(os.getpid()))
    if kill is not None:
        die_at(*kill)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    sys.exit(main(arguments))


def run_ranks(file, *options, num_ranks=1, kills=None, largest_files=None):
    """A run to its end: (exit code, stderr) of each process. By rank, kills: see die_at; largest_files: bytes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, errors = [], [f"{file}.errors_{rank}" for rank in range(num_ranks)]
    for rank in range(num_ranks):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        arguments = (["train", "--config", str(file), *options], environment if num_ranks > 1 else {}, errors[rank])
        faults = ((kills or {}).get(rank), (largest_files or {}).get(rank))
        processes.append(FORKS.Process(target=run, args=arguments + faults))
        processes[-1].start()
    try:
        processes[0].join(120)
        for process in processes:
            process.join(SECONDS_TO_END)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert None not in codes, f"hangs: {codes}"
    return [(code, Path(path).read_text()) for code, path in zip(codes, errors, strict=True)]


def run_torchrun(file, *options, kill, rank):
    """Two processes under torchrun, of which one kills itself: (exit code, stderr)."""
    script = file.with_suffix(".py")
    script.write_text(
        f"import importlib, os, sys\n"
        f"sys.path[:0] = {PATHS!r}\n"
        f"rank = int(os.environ['RANK'])\n"
        f"kill = {kill!r} if rank == {rank} else None\n"
        f"arguments = {['train', '--config', str(file), *options]!r}\n"
        f"importlib.import_module({__name__!r}).run(arguments, {{}}, {str(file)!r} + f'.torchrun_{{rank}}', kill)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*command, "--max-restarts", "0", str(script)],
        env=os.environ | ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=240)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, errors


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


CHECKPOINT = "repirl.checkpoint.save"


def test_kill_9_of_one_process_in_any_phase(tmp_path):
    """Killed in the rollouts, in either update, and in every part of a save, one process of two takes the other with
    it; after all resumes everything is as if nothing had happened."""
    whole = tiny_values(tmp_path, output_dir=str(tmp_path / "whole"), **OPTIONS)
    assert [code for code, _ in run_ranks(write(tmp_path, whole), num_ranks=2)] == [0, 0]
    values = tiny_values(tmp_path, output_dir=str(tmp_path / "killed"), **OPTIONS)
    file, folder = write(tmp_path, values), tmp_path / "killed" / "checkpoints"
    asynchronous = ["--checkpoint.asynchronous", "true"]
    deaths = [
        (1, ("repirl.rollout.sampler:Sampler", "_finish", 2), []),
        (0, ("repirl.objectives.irl:IRL", "select", 2), []),
        # The policy's tensors of a step, when the PRM's are written.
        (1, (f"{CHECKPOINT}:dcp", "save", 2), []),
        # In the thread that writes, a step later.
        (1, (f"{CHECKPOINT}:dcp", "save", 3), asynchronous),
        (0, (CHECKPOINT, "_flush", 1), asynchronous),
    ]
    for turn, (rank, kill, options) in enumerate(deaths):
        resume = ["--resume"] if turn else []
        results = run_ranks(file, *options, *resume, num_ranks=2, kills={rank: kill})
        assert results[rank][0] == -signal.SIGKILL, kill
        assert results[1 - rank][0] != 0, kill
        assert all(find_damage(path) is None for path in list_checkpoints(folder)), kill
    # The real thing once.
    code, errors = run_torchrun(file, "--resume", kill=("repirl.objectives.rloo:RLOO", "select", 1), rank=1)
    assert code != 0
    assert "Signal 9" in errors
    pids = [int(Path(f"{file}.torchrun_{rank}.pid").read_text()) for rank in range(2)]
    assert not any(is_alive(pid) for pid in pids)
    assert [code for code, _ in run_ranks(file, "--resume", num_ranks=2)] == [0, 0]
    assert_equal_runs(values, whole)


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_signal_to_one_process_ends_all_after_the_same_turn(tmp_path, asynchronous):
    values = tiny_values(tmp_path, objective="sft", steps=4, eval={"every": 0}, checkpoint={"every": 9})
    file = write(tmp_path, values)
    ask = ("repirl.objectives.sft:SFT", "select", 2, signal.SIGTERM)
    results = run_ranks(file, "--checkpoint.asynchronous", asynchronous, num_ranks=2, kills={1: ask})
    assert [code for code, _ in results] == [143, 143]
    # Said once.
    assert ["repirl: SIGTERM: turn 2 of 4 is done and saved" in errors for _, errors in results] == [True, False]
    assert not any("Traceback" in errors for _, errors in results)
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_2"]
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_log_that_cannot_grow_ends_all_processes(tmp_path, num_ranks):
    """The main process may not write files that are larger than run.json and some lines of the metrics."""
    values = tiny_values(tmp_path, objective="sft", steps=80, eval={"every": 0}, checkpoint={"every": 0})
    results = run_ranks(write(tmp_path, values), num_ranks=num_ranks, largest_files={0: 16_000})
    for code, errors in results:
        assert code == 1, errors
        last = errors.strip().splitlines()[-1]
        assert last.startswith(
            f"repirl: metrics cannot be written to '{tmp_path}/run/metrics.jsonl': File too large; make"
        )
        assert "Traceback" not in errors
    steps = [line["step"] for line in metrics_of(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1))
    assert 0 < len(steps) < 80


@pytest.mark.parametrize(("num_ranks", "asynchronous"), [(1, False), (1, True), (2, True)])
def test_kill_9_of_all_during_a_save(tmp_path, num_ranks, asynchronous):
    options = OPTIONS | {"checkpoint": {"every": 1, "keep_last": 1, "asynchronous": asynchronous}}
    whole = tiny_values(tmp_path, output_dir=str(tmp_path / "whole"), **options)
    assert {code for code, _ in run_ranks(write(tmp_path, whole), num_ranks=num_ranks)} == {0}
    values = tiny_values(tmp_path, output_dir=str(tmp_path / "killed"), **options)
    file, folder = write(tmp_path, values), tmp_path / "killed" / "checkpoints"
    # While tensors are written, before all is flushed, before the final name is given, before and while the one before
    # is removed; each a step further than where the run goes on from. Only the main process does the last four.
    places = [
        (f"{CHECKPOINT}:dcp", "save", 4),
        (CHECKPOINT, "_flush", 1),
        ("pathlib:Path", "rename", 1),
        (f"{CHECKPOINT}:Checkpointer", "_prune", 1),
        ("shutil", "rmtree", 2),
    ]
    left = set()
    for turn, kill in enumerate(places):
        resume = ["--resume"] if turn else []
        kills = dict.fromkeys(range(num_ranks if kill[1] == "save" else 1), kill)
        results = run_ranks(file, *resume, num_ranks=num_ranks, kills=kills)
        assert all(results[rank][0] == -signal.SIGKILL for rank in kills), kill
        actual = list_checkpoints(folder)
        assert actual, kill
        assert all(find_damage(path) is None for path in actual), kill
        left |= {path.name.split(".", 1)[1] for path in folder.glob("*.tmp")}
    # Half a checkpoint was left, and half of one that was to go.
    assert left == {"tmp", "pruned.tmp"}
    assert {code for code, _ in run_ranks(file, "--resume", num_ranks=num_ranks)} == {0}
    assert_equal_runs(values, whole)


@pytest.mark.parametrize("state_bits", [32, 8])
def test_an_asynchronous_save_holds_the_moment_that_it_was_asked_for(tmp_path, monkeypatch, state_bits):
    """Updates that are made while it is written do not get into it, whatever the moments are made of."""
    path = make_model(tmp_path / "model", head_dim=64)
    model = load_model(str(path), kind="causal", dtype=torch.float32, device=torch.device("cpu"))
    learner = Learner(model, OptimizerConfig(lr=1e-2, state_bits=state_bits), tokens_per_microbatch=99)
    batch, go_on, writing = pack([([3, 4], [5, 6, 7])]), threading.Event(), saving._write

    def state():
        moments = [s[k] for s in learner.optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
        moments = [m.dequantize() if hasattr(m, "codes") else m for m in moments]
        return [w.detach().clone() for w in (*learner.trained.values(), *moments)]

    def waiting(*arguments):
        assert go_on.wait(60)
        return writing(*arguments)

    def update():
        learner.update(batch, objective(lambda outputs, _: outputs["logprob"].sum()))

    monkeypatch.setattr(saving, "_write", waiting)
    world = World(torch.device("cpu"))
    writer = Checkpointer(tmp_path / "checkpoints", CheckpointConfig(asynchronous=True), world)
    update()
    before = state()
    writer.save(1, {"policy": learner}, {}, load_tokenizer(str(path)))
    update()
    assert not all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    writer.poll()
    assert not list_checkpoints(tmp_path / "checkpoints")
    go_on.set()
    writer.finish()
    load_checkpoint(writer.choose(), {"policy": learner}, world)
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))


def assert_says_what_it_could_not_write(code, errors, reason):
    assert code == 1, errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith("repirl: the checkpoint of step 2 could not be written into"), errors
    assert reason in last
    assert "newest complete one is step_1, go on from there with --resume" in last
    assert "Traceback" not in errors


def on_a_small_disk(disk, size, script):
    """Run a shell script where `disk` is a real file system of its own, of `size` bytes."""
    disk.mkdir()
    mount = f"mount -t tmpfs -o size={size} tmpfs {disk}"
    try:
        refused = subprocess.run(["unshare", "--mount", "sh", "-c", mount], capture_output=True, check=False).returncode
    except FileNotFoundError:
        refused = 1
    if refused:
        pytest.skip("a file system cannot be mounted here")
    environment = os.environ | ENVIRONMENT
    command = ["unshare", "--mount", "sh", "-c", f"{mount} && {{ {script}; }}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def size_of(folder):
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def test_a_full_disk_ends_the_run_and_costs_one_step(tmp_path):
    """With room for one checkpoint and a half."""
    values = tiny_values(tmp_path, output_dir=str(tmp_path / "whole"), **OPTIONS | {"steps": 3})
    train(build_config(values))
    size = size_of(tmp_path / "whole" / "checkpoints" / "step_3")
    disk = tmp_path / "disk"
    file = write(tmp_path, values | {"output_dir": str(disk / "run")})
    command = f"{sys.executable} -m repirl.cli train --config {file}"
    # Nothing half written takes the room that is left.
    look = f"echo code $? >&2; ls {disk}/run/checkpoints > {tmp_path}/left"
    grow = f"mount -o remount,size={10 * size} {disk}"
    keep = f"cp -r {disk}/run {tmp_path}/kept"
    result = on_a_small_disk(disk, int(1.6 * size), f"{command}; {look}; {grow}; {command} --resume; {keep}")
    first, rest = result.stderr.split("code ", 1)
    assert_says_what_it_could_not_write(int(rest.splitlines()[0]), first, "No space left on device")
    assert (tmp_path / "left").read_text().split() == ["step_1"]
    assert metrics_of(tmp_path / "kept") == metrics_of(tmp_path / "whole")


def save_with_little_room(disk, file, asynchronous):
    """Saves with more and more room on a disk, until one is written; prints (room, what was said, what was left)."""
    values = yaml.safe_load(Path(file).read_text()) | {"checkpoint": {"keep_last": 1, "asynchronous": asynchronous}}
    trained = build(build_config(values))
    trained.save(1)
    trained.checkpointer.finish()
    folder, filler = Path(values["output_dir"]) / "checkpoints", Path(disk) / "filler"
    size, seen = size_of(folder / "step_1"), []
    # A few pages for the small files that come first, and then through the tensors.
    for room in [*range(0, 1 << 16, 1 << 13), *range(1 << 16, 2 * size, size // 6)]:
        filler.unlink(missing_ok=True)
        with open(filler, "wb") as stream:
            if (fill := shutil.disk_usage(disk).free - room) > 0:
                os.posix_fallocate(stream.fileno(), 0, fill)
        said = "written"
        try:
            trained.save(2)
            trained.checkpointer.finish()
        except CheckpointError as error:
            said = str(error)
        sound = [path.name for path in folder.iterdir() if find_damage(path) is None]
        seen.append((room, said, sorted(path.name for path in folder.iterdir()), sound))
        if said == "written":
            break
    print(json.dumps(seen))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_wherever_in_a_checkpoint_the_disk_gets_full_it_is_told(tmp_path, asynchronous):
    disk = tmp_path / "disk"
    file = write(tmp_path, tiny_values(tmp_path, output_dir=str(disk / "run"), **OPTIONS))
    call = f"import {__name__} as m; m.save_with_little_room({str(disk)!r}, {str(file)!r}, {asynchronous})"
    result = on_a_small_disk(disk, 8 << 20, f'{sys.executable} -c "{call}"')
    assert result.returncode == 0, result.stderr
    *failed, written = json.loads(result.stdout.splitlines()[-1])
    assert len(failed) > 10
    for room, said, left, sound in failed:
        assert "the checkpoint of step 2 could not be written" in said, room
        assert "No space left on device" in said, room
        assert left == sound == ["step_1"], room
    assert written[1:] == ["written", ["step_2"], ["step_2"]]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_file_that_cannot_grow_is_a_full_disk_too(tmp_path, num_ranks):
    """As above where nothing can be mounted: one process may not write files as large as its tensors."""
    values = tiny_values(tmp_path, **OPTIONS | {"steps": 1})
    assert {code for code, _ in run_ranks(write(tmp_path, values), num_ranks=num_ranks)} == {0}
    largest = max(f.stat().st_size for f in (tmp_path / "run").rglob("*.distcp"))
    file = write(tmp_path, values | {"steps": 3})
    limits = {num_ranks - 1: largest // 2}
    for code, errors in run_ranks(file, "--resume", num_ranks=num_ranks, largest_files=limits):
        assert_says_what_it_could_not_write(code, errors, "File too large")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_1"]
    assert {code for code, _ in run_ranks(file, "--resume", num_ranks=num_ranks)} == {0}
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3]


def test_what_a_killed_run_left_does_not_take_the_room_of_the_next_save(tmp_path, monkeypatch):
    """It is gone before anything is written, not after."""
    train(tiny_config(tmp_path, **OPTIONS | {"steps": 1}))
    folder = tmp_path / "run" / "checkpoints"
    for name in ("step_7.tmp", "step_0.pruned.tmp"):
        shutil.copytree(folder / "step_1", folder / name)
    seen, save = [], saving.dcp.save

    def look(*arguments, **options):
        seen.append(sorted(p.name for p in folder.iterdir()))
        return save(*arguments, **options)

    monkeypatch.setattr(saving.dcp, "save", look)
    train(tiny_config(tmp_path, **OPTIONS | {"steps": 2}), resume=True)
    assert seen == [["step_1", "step_2.tmp"]] * 2


def damage_flip(path):
    file = max((path / "policy" / "tensors").glob("*.distcp"), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def damage_cut(path):
    file = path / "prm" / "tensors" / ".metadata"
    file.write_bytes(file.read_bytes()[:-10])


def damage_remove(path):
    (path / "run.pt").unlink()


def damage_description(path):
    (path / "trainer.json").unlink()


def damage_manifest(path):
    (path / "manifest.json").write_text("{")


def damage_manifest_entries(path):
    (path / "manifest.json").write_text('{"run.pt": 3}')


def damage_no_manifest(path):
    (path / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (damage_flip, "other content"),
        (damage_cut, "bytes"),
        (damage_remove, "run.pt is missing"),
        (damage_description, "trainer.json is missing"),
        (damage_manifest, "manifest.json cannot be read"),
        (damage_manifest_entries, "manifest.json cannot be read"),
        (damage_no_manifest, "manifest.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, damage, problem, caplog, capsys):
    options = OPTIONS | {"steps": 3}
    whole = tiny_config(tmp_path, output_dir=str(tmp_path / "whole"), **options)
    train(whole)
    values = tiny_values(tmp_path, **options | {"steps": 2})
    train(build_config(values))
    folder = Path(values["output_dir"]) / "checkpoints"
    damage(folder / "step_2")
    # Whoever names it is refused.
    named = ["--checkpoint", str(folder / "step_2")]
    assert main(["export", *named, "--output", str(tmp_path / "out")]) == 2
    assert main(["eval", *named, "--config", str(write(tmp_path, values))]) == 2
    refusals = capsys.readouterr().err.splitlines()
    assert all(f"step_2' is damaged: {problem}" in line or problem in line for line in refusals)
    assert len(refusals) == 2
    with caplog.at_level(logging.WARNING):
        train(tiny_config(tmp_path, **options), resume=True)
    assert f"checkpoint step_2 in {folder} is damaged" in caplog.text
    assert problem in caplog.text
    assert "using step_1" in caplog.text
    assert metrics_of(values["output_dir"]) == metrics_of(whole.output_dir)
    # It is set aside for whoever wants to look, and counts for nothing.
    assert sorted(p.name for p in folder.iterdir()) == ["step_2", "step_2.damaged", "step_3"]


def test_processes_agree_on_damage_that_one_of_them_sees(tmp_path):
    """Each reads a share of the files: the second file is only the second process's to look at."""
    options = OPTIONS | {"steps": 3}
    whole = tiny_values(tmp_path, output_dir=str(tmp_path / "whole"), **options)
    assert {code for code, _ in run_ranks(write(tmp_path, whole), num_ranks=2)} == {0}
    values = tiny_values(tmp_path, **options)
    assert {code for code, _ in run_ranks(write(tmp_path, values | {"steps": 2}), num_ranks=2)} == {0}
    newest = tmp_path / "run" / "checkpoints" / "step_2"
    second = newest / list(json.loads((newest / "manifest.json").read_text()))[1]
    second.write_bytes(second.read_bytes()[:-1])
    assert find_damage(newest, 0, 2) is None
    assert find_damage(newest, 1, 2) is not None
    results = run_ranks(write(tmp_path, values), "--resume", num_ranks=2)
    assert [code for code, _ in results] == [0, 0]
    # Said once.
    assert ["is damaged" in errors for _, errors in results] == [True, False]
    assert_equal_runs(values, whole)
    assert sorted(p.name for p in newest.parent.iterdir()) == ["step_2", "step_2.damaged", "step_3"]


@pytest.mark.parametrize("damage", [damage_description, lambda path: (path / "trainer.json").write_text("{")])
def test_damage_to_an_old_checkpoint_does_not_end_a_run_that_does_not_need_it(tmp_path, damage):
    checkpoints = {"checkpoint": {"every": 1, "keep_last": 2, "keep_best": 1}}
    train(tiny_config(tmp_path, **OPTIONS | checkpoints | {"steps": 2}))
    folder = tmp_path / "run" / "checkpoints"
    damage(folder / "step_1")
    train(tiny_config(tmp_path, **OPTIONS | checkpoints | {"steps": 4}), resume=True)
    assert sorted(p.name for p in folder.iterdir()) == ["step_3", "step_4"]


def test_a_file_that_the_disk_cannot_read_is_damage(tmp_path, monkeypatch):
    train(tiny_config(tmp_path, **OPTIONS | {"steps": 1}))

    def fail(file):
        raise OSError(5, "Input/output error", str(file))

    monkeypatch.setattr(manifest, "checksum", fail)
    problem = find_damage(tmp_path / "run" / "checkpoints" / "step_1")
    assert "cannot be read: [Errno 5] Input/output error" in problem


def rewritten(path, **changes):
    """As another version might have written a checkpoint: trainer.json changed (None: left out), sound all the same."""
    content = json.loads((path / "trainer.json").read_text()) | changes
    content = {name: value for name, value in content.items() if value is not None}
    (path / "trainer.json").write_text(json.dumps(content))
    with open(path / "config.yaml", "a") as file:
        file.write("an_option_of_another_version: 1\n")
    files = [file for file in path.rglob("*") if file.is_file() and file.name != "manifest.json"]
    (path / "manifest.json").write_text(json.dumps(manifest.make_manifest(path, files)))
    assert find_damage(path) is None
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # As checkpoints were before formats had numbers.
        ({"format": None, "repirl": None}, "has format 1, written by a repirl before 0.2; this repirl reads format 3"),
        ({"format": 4, "repirl": "9.1"}, "has format 4, written by repirl 9.1; this repirl reads format 3"),
    ],
)
def test_a_checkpoint_of_another_format_is_refused_by_name(tmp_path, capsys, changes, message):
    values = tiny_values(tmp_path, **OPTIONS | {"steps": 1})
    train(build_config(values))
    folder = tmp_path / "run" / "checkpoints"
    path = rewritten(folder / "step_1", **changes)
    file, named = str(write(tmp_path, values)), ["--checkpoint", str(path)]
    capsys.readouterr()
    for command in (
        ["train", "--config", file, "--resume", "--steps", "2"],
        ["eval", "--config", file, *named],
        ["export", *named, "--output", str(tmp_path / "out")],
    ):
        assert main(command) == 2, command
        error = capsys.readouterr().err
        assert f"checkpoint {str(path)!r} {message}" in error, command
        assert "finish or export the run with the version that wrote it" in error
        assert error.count("\n") == 1, error
    # It is left as it is.
    assert [p.name for p in folder.iterdir()] == ["step_1"]
    assert find_damage(path) is None
    assert not (tmp_path / "out").exists()


def test_without_any_sound_checkpoint_nothing_begins(tmp_path):
    config = tiny_config(tmp_path, **OPTIONS | {"steps": 2})
    train(config)
    folder = Path(config.output_dir) / "checkpoints"
    damage_flip(folder / "step_2")
    damage_remove(folder / "step_1")
    with pytest.raises(ConfigError, match=r"is sound \(step_2: .* other content .*; step_1: run.pt is missing\)"):
        train(config, resume=True)
    assert sorted(p.name for p in folder.iterdir()) == ["step_1", "step_2"]


def test_one_nan_costs_one_update_and_nothing_else(tmp_path, monkeypatch):
    """Through the real loop: neither weights nor the optimiser's state move in that step, and the run goes on."""
    options = {"objective": "rloo", "checkpoint": {"every": 1, "keep_last": 9}}
    config, calls = tiny_config(tmp_path, **OPTIONS | options | {"steps": 3}), itertools.count(1)

    class SometimesNaN(RLOO):
        def prepare(self, batch):
            self.factor = float("nan") if next(calls) == 2 else 1.0
            return super().prepare(batch)

        def loss(self, outputs, micro):
            loss, figures = super().loss(outputs, micro)
            return self.factor * loss, figures

    monkeypatch.setattr("repirl.objectives.rloo.RLOO", SometimesNaN)
    train(config)
    lines = metrics_of(config.output_dir)
    assert [line["policy/skipped_updates"] for line in lines] == [0, 1, 1]
    assert [line.get("nonfinite", []) for line in lines] == [[], ["policy/grad_norm", "policy/loss"], []]
    states = []
    for path in list_checkpoints(Path(config.output_dir) / "checkpoints"):
        restored = build(config)
        restored.restore(path)
        policy = restored.learners["policy"]
        state, trained = policy.optimizer.state, policy.trained.values()
        moments = [state[p][key] for p in trained for key in ("exp_avg", "exp_avg_sq", "step")]
        states.append([t.detach().clone() for t in (*trained, *moments)])
        assert policy.num_skipped_updates == (path.name != "step_1")
    first, second, third = states
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(second, third, strict=True))
    assert all(t.isfinite().all() for t in third)


def test_a_save_before_the_first_update_changes_nothing(tmp_path):
    """To write moments that are not there yet PyTorch makes a step of its own; it must not count as the first."""
    path = make_model(tmp_path / "model")
    batch = pack([([3, 4], [5, 6, 7])])
    updated = []
    for name in ("saved", "never", "loaded"):
        model = load_model(str(path), kind="causal", dtype=torch.float32, device=torch.device("cpu"))
        learner = Learner(model, OptimizerConfig(lr=1e-2), tokens_per_microbatch=99)
        writer = Checkpointer(tmp_path / "checkpoints", CheckpointConfig(), World(torch.device("cpu")))
        if name == "saved":
            writer.save(1, {"policy": learner}, {}, load_tokenizer(str(path)))
        if name == "loaded":
            load_checkpoint(writer.choose(), {"policy": learner}, World(torch.device("cpu")))
        for _ in range(2):
            learner.update(batch, objective(lambda outputs, _: outputs["logprob"].sum()))
        updated.append([w.detach().clone() for w in learner.trained.values()])
    saved, never, loaded = updated
    assert all(torch.equal(a, b) for a, b in zip(saved, never, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(loaded, never, strict=True))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_nan_for_good_ends_the_run(tmp_path, capsys, monkeypatch, asynchronous):
    """A weight that is NaN makes every update one that is skipped; the run says so and stops."""
    path = make_model(tmp_path / "broken")
    model = load_model(str(path), kind="causal", dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    shutil.rmtree(path)
    model.config._attn_implementation = "sdpa"
    model.save_pretrained(path)
    load_tokenizer(str(make_model(tmp_path / "sound"))).save_pretrained(path)
    changes = {
        "objective": "sft",
        "policy": {"model": str(path), "optimizer": {"max_skipped_updates": 3}},
        "checkpoint": {"every": 1, "asynchronous": asynchronous},
    }
    # Loading such a model is refused; what is tested is weights that become so later.
    monkeypatch.setattr("repirl.models.refuse_nonfinite", lambda *_: None)
    monkeypatch.setattr("repirl.models.check_packed", lambda *_: None)
    file = write(tmp_path, tiny_values(tmp_path, **OPTIONS | changes))
    assert main(["train", "--config", str(file)]) == 1
    errors = capsys.readouterr().err
    assert "repirl: 3 updates in a row of the policy had a loss or gradient that is not finite" in errors
    lines = metrics_of(tmp_path / "run")
    assert [line["policy/skipped_updates"] for line in lines] == [1, 2]
    actual = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [p.name for p in actual] == ["step_1", "step_2"][: None if not asynchronous else len(actual)]
    assert actual
    assert all(find_damage(p) is None for p in actual)


def skip_together(_group, values, path):
    """Only the process with the last sequence sees a NaN."""
    world = join_world(build_config(values))
    from repirl.distributed.load import load_sharded_model

    model = load_sharded_model(path, kind="causal", dtype=torch.float32, compute_dtype=torch.float32, world=world)
    optimizer = OptimizerConfig(lr=1e-2, max_skipped_updates=2)
    learner = Learner(model, optimizer, tokens_per_microbatch=99, world=world)
    batch = pack([([3, 4], [5, 6, 7]), ([3], [8, 9])])
    seen = []

    def loss(outputs, micro, bad=True):
        seen.append(int(micro.token_ids[-1]) == 9)
        return outputs["logprob"].sum() * (float("nan") if seen[-1] and bad else 1.0)

    def state():
        moments = [value for state in learner.optimizer.state.values() for value in state.values()]
        return [getattr(t, "_local_tensor", t).detach().clone() for t in (*learner.trained.values(), *moments)]

    def equal(before):
        return len(before) == len(state()) and all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))

    learner.update(batch, objective(lambda outputs, micro: loss(outputs, micro, bad=False)))
    before = state()
    skipped = learner.update(batch, objective(loss))["skipped_updates"]
    same = equal(before)
    learner.update(batch, objective(lambda outputs, micro: loss(outputs, micro, bad=False)))
    moved = not equal(before)
    learner.update(batch, objective(loss))
    try:
        learner.update(batch, objective(loss))
    except TrainingError as error:
        return skipped, same, moved, any(seen), str(error)


def test_all_processes_skip_what_one_of_them_cannot_use(tmp_path):
    path = make_model(tmp_path / "model")
    with rank_processes(2) as ranks:
        results = ranks.run(2, skip_together, tiny_values(tmp_path), str(path))
    assert sorted(saw for _, _, _, saw, _ in results) == [False, True]
    for skipped, same, moved, _, error in results:
        assert (skipped, same, moved) == (1, True, True)
        assert error.startswith("2 updates in a row")


def judge_half(response, answer):
    """Writes the beginning of a verdict to whoever may be listening, and hangs."""
    if "half" in response:
        for descriptor in range(1, 32):
            with contextlib.suppress(OSError):
                os.write(descriptor, b'{"reward": 1.')
        time.sleep(1000)
    return 1.0 if "right" in response else 0.0


def judge_once(response, answer):
    """Hangs on the first answer of all."""
    if not os.path.exists(f"{__file__}.began"):
        open(f"{__file__}.began", "w").close()
        time.sleep(1000)
    return float(len(response) % 2)


def judge_never(response, answer):
    return {}[response]


@pytest.fixture
def reward_module(tmp_path, monkeypatch):
    """The functions above in a module of their own, which imports as quickly as a real one."""
    functions = map(inspect.getsource, (judge_half, judge_once, judge_never))
    (tmp_path / "bad_rewards.py").write_text("\n\n".join(["import contextlib, os, time", *functions]))
    monkeypatch.syspath_prepend(tmp_path)
    return "bad_rewards"


def test_half_a_verdict_is_none(reward_module):
    """Of a worker that is killed over it; the rest of it does not come from the next one."""
    options = {"kind": "custom", "function": f"{reward_module}:judge_half", "timeout_seconds": 1.0}
    verifier = Verifier(VerifierConfig(**options))
    try:
        for number in (1, 2):
            pairs = [("right", "x"), ("half right", "x"), ("right", "x"), ("wrong", "x")]
            assert verifier.judge(pairs) == [1.0, 0.0, 1.0, 0.0]
            assert verifier.num_timeouts == number
    finally:
        verifier.close()


def test_a_reward_that_hangs_costs_the_run_one_answer(tmp_path, reward_module):
    verifier = {"kind": "custom", "function": f"{reward_module}:judge_once", "timeout_seconds": 2.0}
    config = tiny_config(tmp_path, **OPTIONS | {"steps": 3, "verifier": verifier})
    train(config)
    lines = metrics_of(config.output_dir)
    assert [line["step"] for line in lines] == [1, 2, 3]
    # Counted since the start.
    assert [line["rollout/verifier_timeouts"] for line in lines] == [1, 1, 1]
    assert all(0 <= line["rollout/outcome"] <= 1 for line in lines)


def test_a_reward_that_fails_ends_the_run_and_is_named(tmp_path, reward_module, capsys):
    verifier = {"kind": "custom", "function": f"{reward_module}:judge_never"}
    file = write(tmp_path, tiny_values(tmp_path, **OPTIONS | {"verifier": verifier}))
    assert main(["train", "--config", str(file)]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("repirl: the verifier's function 'bad_rewards:judge_never' failed on a response: KeyError")
    assert not list_checkpoints(tmp_path / "run" / "checkpoints")
