"""What can go wrong at any moment, each really done: processes killed, a disk filled, files corrupted, NaN, hangs."""

import contextlib
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from rank_processes import rank_processes
from tiny import make_model, tiny_config, tiny_values

from repirl.batch import pack
from repirl.cli import main
from repirl.config import ConfigError, OptimizerConfig, build_config
from repirl.dist.checkpoint import find_damage, list_checkpoints, resolve_checkpoint
from repirl.dist.world import join_world
from repirl.learner import Learner, TrainingError
from repirl.loop import train
from repirl.models import load_model
from repirl.report.metrics import read_metrics
from repirl.rewards.verifier import Verifier
from repirl.setup import build

SPEED = ("seconds/", "tokens_per_second/", "mfu/", "memory/")
OPTIONS = {"steps": 6, "prm": {"reward": "logprob"}, "irl": {"use_outcome": False}, "eval": {"every": 0}}
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
}
if sys.platform == "linux":
    # The loopback device, whatever the host's name resolves to.
    ENVIRONMENT["GLOO_SOCKET_IFNAME"] = "lo"


def metrics_of(folder):
    lines = read_metrics(Path(folder) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(SPEED)} for line in lines]


def weights_of(values):
    run = build(build_config(values))
    run.restore(resolve_checkpoint(values["output_dir"]))
    return {f"{n}.{k}": w.clone() for n, x in run.learners.items() for k, w in x.weights()}


def start(file, *, num_ranks=1, resume=False, kill="None", rank=0):
    """A run in processes of its own. kill: ("module.function", n): at its n-th call, process `rank` kills itself."""
    script = f"""
        import importlib, os, signal, sys, threading
        kill = {kill}
        if kill and int(os.environ.get("RANK", 0)) == {rank}:
            place, nth = kill
            module, _, name = place.rpartition(".")
            try:
                owner = importlib.import_module(module)
            except ModuleNotFoundError:
                module, _, kind = module.rpartition(".")
                owner = getattr(importlib.import_module(module), kind)
            function, calls = getattr(owner, name), []
            def dying(*args, **options):
                calls.append(1)
                if len(calls) == nth:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **options)
            setattr(owner, name, dying)
        from repirl.cli import main
        sys.exit(main(["train", "--config", {str(file)!r}] + ["--resume"] * {int(resume)}))
    """
    path = file.with_suffix(".py")
    path.write_text(textwrap.dedent(script))
    command = [sys.executable, str(path)]
    if num_ranks > 1:
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
        command = [*run, str(path)]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process, seconds=240):
    """(exit code, stderr); nothing of the run is left behind, and it ends within the time."""
    try:
        _, errors = process.communicate(timeout=seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, errors


def write(tmp_path, values):
    file = tmp_path / f"{Path(values['output_dir']).name}.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.mark.timeout(900)
def test_kill_9_of_one_process_in_any_phase(tmp_path):
    """Killed in the rollouts, in either update, and in a save, one rank of two takes the other with it; four resumes
    later everything is as if nothing had happened."""
    whole = tiny_values(tmp_path, output_dir=str(tmp_path / "whole"), **OPTIONS)
    assert finish(start(write(tmp_path, whole), num_ranks=2))[0] == 0
    values = tiny_values(tmp_path, output_dir=str(tmp_path / "killed"), **OPTIONS)
    file = write(tmp_path, values)
    deaths = [
        ("repirl.loop.finish_rollouts", 2, 1),
        ("repirl.loop.update_prm", 2, 0),
        ("repirl.loop.update_policy", 1, 1),
        ("repirl.dist.checkpoint.dcp.save", 2, 1),
    ]
    for turn, (place, nth, rank) in enumerate(deaths):
        code, errors = finish(start(file, num_ranks=2, resume=turn > 0, kill=repr((place, nth)), rank=rank))
        assert code != 0, place
        assert "Signal 9" in errors, place
    assert finish(start(file, num_ranks=2, resume=True))[0] == 0
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "whole")
    ours, theirs = weights_of(values), weights_of(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_kill_9_of_all_during_a_save(tmp_path, asynchronous):
    options = OPTIONS | {"checkpoint": {"every": 1, "asynchronous": asynchronous}}
    whole = tiny_values(tmp_path, output_dir=str(tmp_path / "whole"), **options)
    train(build_config(whole))
    values = tiny_values(tmp_path, output_dir=str(tmp_path / "killed"), **options)
    file = write(tmp_path, values)
    found = []
    # While tensors are written, before the files are listed, and between the renaming of an old one and its removal.
    places = {"repirl.dist.checkpoint._write": 2, "repirl.dist.checkpoint._checksum": 1, "shutil.rmtree": 3}
    for place, nth in places.items():
        code, _ = finish(start(file, resume=bool(found), kill=repr((place, nth))))
        assert code == -signal.SIGKILL, place
        found = list_checkpoints(tmp_path / "killed" / "checkpoints")
        assert all(find_damage(path) is None for path in found), place
    assert found
    assert finish(start(file, resume=True))[0] == 0
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "whole")
    ours, theirs = weights_of(values), weights_of(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list((tmp_path / "killed" / "checkpoints").glob("*.tmp"))


def assert_says_what_it_could_not_write(code, errors, reason):
    assert code == 1, errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith("repirl: the checkpoint of step 2 could not be written into"), errors
    assert reason in last
    assert "newest complete one is step_1, go on from there with --resume" in last
    assert "Traceback" not in errors


def test_a_full_disk_ends_the_run_and_costs_one_step(tmp_path):
    """A real file system of its own, with room for one checkpoint and a half."""
    values = tiny_values(tmp_path, output_dir=str(tmp_path / "whole"), **OPTIONS | {"steps": 3})
    train(build_config(values))
    checkpoint = tmp_path / "whole" / "checkpoints" / "step_3"
    size = sum(f.stat().st_size for f in checkpoint.rglob("*") if f.is_file())
    disk = tmp_path / "disk"
    disk.mkdir()
    file = write(tmp_path, values | {"output_dir": str(disk / "run")})
    mount = f"mount -t tmpfs -o size={int(1.6 * size)} tmpfs {disk}"
    if subprocess.run(["unshare", "--mount", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("a file system cannot be mounted here")
    command = f"{sys.executable} -m repirl.cli train --config {file}"
    # Nothing half written takes the room that is left.
    look = f"echo code $? >&2; ls {disk}/run/checkpoints > {tmp_path}/left"
    grow = f"mount -o remount,size={10 * size} {disk}"
    keep = f"cp -r {disk}/run {tmp_path}/kept"
    script = f"{mount} && {{ {command}; {look}; {grow}; {command} --resume; {keep}; }}"
    result = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    first, rest = result.stderr.split("code ", 1)
    assert_says_what_it_could_not_write(int(rest.splitlines()[0]), first, "No space left on device")
    assert (tmp_path / "left").read_text().split() == ["step_1"]
    assert metrics_of(tmp_path / "kept") == metrics_of(tmp_path / "whole")


def test_a_file_that_cannot_grow_is_a_full_disk_too(tmp_path):
    """As above where nothing can be mounted: the process may not write files larger than the weights."""
    values = tiny_values(tmp_path, **OPTIONS | {"steps": 3})
    file = write(tmp_path, values)
    train(build_config(values | {"steps": 1}))
    largest = max(f.stat().st_size for f in (tmp_path / "run").rglob("*") if f.is_file() and "tensors" in str(f))

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, resource.RLIM_INFINITY))

    command = [sys.executable, "-m", "repirl.cli", "train", "--config", str(file), "--resume"]
    result = subprocess.run(command, env=ENVIRONMENT, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert_says_what_it_could_not_write(result.returncode, result.stderr, "Error")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_1"]


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


def damage_manifest(path):
    (path / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (damage_flip, "other content"),
        (damage_cut, "bytes"),
        (damage_remove, "run.pt is missing"),
        (damage_manifest, "manifest.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, damage, problem, caplog, capsys):
    options = OPTIONS | {"steps": 4}
    whole = tiny_config(tmp_path, output_dir=str(tmp_path / "whole"), **options)
    train(whole)
    config = tiny_config(tmp_path, **options | {"steps": 3})
    train(config)
    folder = Path(config.output_dir) / "checkpoints"
    damage(folder / "step_3")
    # Whoever names it is refused.
    assert main(["export", "--checkpoint", str(folder / "step_3"), "--output", str(tmp_path / "out")]) == 2
    assert "is damaged" in capsys.readouterr().err
    with caplog.at_level(logging.WARNING):
        train(tiny_config(tmp_path, **options), resume=True)
    assert "step_3 is damaged" in caplog.text
    assert problem in caplog.text
    assert metrics_of(config.output_dir) == metrics_of(whole.output_dir)
    # It is set aside for whoever wants to look, and counts for nothing.
    assert sorted(p.name for p in folder.iterdir()) == ["step_3", "step_3.damaged", "step_4"]


def test_without_any_sound_checkpoint_nothing_begins(tmp_path):
    config = tiny_config(tmp_path, **OPTIONS | {"steps": 2})
    train(config)
    for path in list_checkpoints(Path(config.output_dir) / "checkpoints"):
        damage_flip(path)
    with pytest.raises(ConfigError, match=r"none of the checkpoints .* is sound: \['step_1', 'step_2'\]"):
        train(config, resume=True)


def test_one_bad_update_is_skipped_and_many_end_the_run(tmp_path, capsys):
    """A weight that is NaN makes every update one that is skipped; the run says so and stops."""
    path = make_model(tmp_path / "broken")
    model = load_model(str(path), kind="causal", dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    shutil.rmtree(path)
    model.config._attn_implementation = "sdpa"
    model.save_pretrained(path)
    from repirl.data.tasks.arithmetic import build_tokenizer

    build_tokenizer().save_pretrained(path)
    changes = {"objective": "sft", "policy": {"model": str(path), "optimizer": {"max_skipped_updates": 3}}}
    # Loading such a model is refused; what is tested is weights that become so later.
    patch = pytest.MonkeyPatch()
    patch.setattr("repirl.models.check_packed", lambda *_: None)
    with patch.context():
        file = write(tmp_path, tiny_values(tmp_path, **OPTIONS | changes))
        assert main(["train", "--config", str(file)]) == 1
    patch.undo()
    errors = capsys.readouterr().err
    assert "repirl: 3 updates in a row had a loss or gradient that is not finite" in errors
    lines = metrics_of(tmp_path / "run")
    assert [line["policy/skipped_updates"] for line in lines] == [1, 2]
    assert [p.name for p in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_1", "step_2"]


def skip_together(_group, values, path):
    """Only the process with the last sequence sees a NaN."""
    world = join_world(build_config(values))
    from repirl.dist.load import load_sharded_model

    model = load_sharded_model(path, kind="causal", dtype=torch.float32, compute_dtype=torch.float32, world=world)
    optimizer = OptimizerConfig(lr=1e-2, max_skipped_updates=2)
    learner = Learner(model, optimizer, tokens_per_microbatch=99, world=world)
    batch = pack([([3, 4], [5, 6, 7]), ([3], [8, 9])])
    before = {n: w.clone() for n, w in learner.weights()}
    seen = []

    def loss(outputs, micro, bad=True):
        seen.append(int(micro.token_ids[-1]) == 9)
        return outputs["logprob"].sum() * (float("nan") if seen[-1] and bad else 1.0)

    skipped = learner.step(batch, loss)["skipped_updates"]
    same = all(torch.equal(before[n], w) for n, w in learner.weights())
    learner.step(batch, lambda outputs, micro: loss(outputs, micro, bad=False))
    moved = not all(torch.equal(before[n], w) for n, w in learner.weights())
    learner.step(batch, loss)
    try:
        learner.step(batch, loss)
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


def sleep_forever(response, answer):
    import time

    if "slow" in response:
        time.sleep(1000)
    if "crash" in response:
        os._exit(3)
    return 1.0


def test_a_verifier_that_hangs_or_dies_costs_one_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
    verifier = Verifier(1.0, reward="test_faults:sleep_forever")
    assert verifier.judge("fine", "x") == 1.0
    first = verifier._process.pid
    for number, response in enumerate(["slow", "crash"], 1):
        assert verifier.judge(response, "x") == 0.0
        assert verifier.num_timeouts == number
        assert verifier.judge("fine", "x") == 1.0
    assert verifier._process.pid != first
    # One that was stopped from outside.
    os.kill(verifier._process.pid, signal.SIGSTOP)
    assert verifier.judge("fine", "x") == 0.0
    # Plain numbers need no process at all.
    verifier.close()
    assert verifier.judge("#### 1,234", "1234") == 1.0
    assert verifier._process is None
    verifier.close()


def test_the_real_verifier_survives_a_tower_of_powers():
    verifier = Verifier(20.0)
    assert verifier.judge(r"\boxed{9^{9^{9^{9^{9}}}}}", "x + 1") == 0.0
    assert verifier.judge(r"\boxed{\frac{2}{4}}", "\\frac{1}{2}") == 1.0
    verifier.close()
