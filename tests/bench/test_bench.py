"""The benchmark command, its refusal of wrong results, and its page."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import compare, measure, report, run, schema
from bench.cases import PROFILES, Case, make_inputs, own_cases
from bench.contenders import CONTENDERS, Contender, Values
from bench.measure import extra_bytes_of, spread, times_of
from bench.peers import EXAMPLE
from repirl.cli import main as repirl

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "bench" / "results" / "cpu"
OURS = CONTENDERS[0]
EAGER = next(contender for contender in CONTENDERS if contender.name == "eager")
CASE = Case("tiny", 32, "fp32", "policy+entropy")


def _measure(*contenders: Contender, case: Case = CASE) -> dict[str, dict]:
    measured = run.measure_case(case, list(contenders), "cpu", seconds=0.01)
    json.dumps(measured)
    return {row["contender"]: row for row in measured["rows"]}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Folder with the JSON of the whole command over all contenders on small shapes."""
    folder = tmp_path_factory.mktemp("results")
    options = ["--profile", "test", "--task", "sft", "policy+entropy", "logits", "--dtype", "fp32"]
    options += ["--seconds", "0.01", "--threads", "1", "--json", str(folder / "here" / "ops.json")]
    assert repirl(["bench", *options]) == 0
    return folder


@pytest.mark.timeout(600)
def test_the_command_measures_every_contender_or_says_why_not(results):
    result = json.loads((results / "here" / "ops.json").read_text())
    assert {"date", "revision", "cpu", "cores", "threads", "memory_gib", "versions", "command"} <= result.keys()
    assert result["versions"]["torch"] == torch.__version__
    assert "--threads 1" in result["command"]
    assert result["format"] == 2
    assert schema.problems(result) == []
    assert [measured["case"]["task"] for measured in result["cases"]] == ["sft", "policy+entropy", "logits"]
    seen = set()
    for measured in result["cases"]:
        assert measured["yardstick"]["median"] > 0
        for row in measured["rows"]:
            seen.add(row["contender"])
            if "reason" in row:
                assert row["reason"]
                assert not row["ours"] or row["reason"] == "no entropy with a gradient"
                assert row["contender"] not in ("eager", "eager from logits")
                continue
            assert 0 < row["low"] <= row["median"] <= row["high"]
            assert row["products"] == pytest.approx(row["median"] / measured["yardstick"]["median"])
            assert row["extra_bytes"] >= 0
            assert set(row["errors"]) == {"dhidden"} | ({"dweight"} if measured["case"]["task"] != "logits" else set())
            assert all(0 < error < 1e-4 for error in row["errors"].values())
    assert seen == {contender.name for contender in CONTENDERS}


def test_the_page_is_made_from_the_results_alone(results, tmp_path, capsys):
    page = tmp_path / "README.md"
    made = []
    (results / "here" / "trainers.md").write_text("# Beside a peer\n\n| phase |\n")
    (results / "untitled.md").write_text("| phase |\n")
    for _ in range(2):
        assert report.main(["--results", str(results), "--page", str(page)]) == 0
        plots = sorted((tmp_path / "plots" / "here").iterdir())
        made.append((page.read_text(), [plot.read_bytes() for plot in plots]))
    assert made[0] == made[1]
    assert [plot.name for plot in plots] == ["ops_error.svg", "ops_memory.svg", "ops_time.svg"]
    # Nothing beside the results, which may be another's.
    assert not list(results.glob("**/*.svg"))
    text = made[0][0]
    there = os.path.relpath(results, tmp_path)
    assert f"* [Beside a peer]({there}/here/trainers.md)\n* [untitled]({there}/untitled.md)\n" in text
    for measured in json.loads((results / "here" / "ops.json").read_text())["cases"]:
        assert f"### {measured['name']}\n" in text
        for row in measured["rows"]:
            assert row["contender"] in text
            assert row.get("reason", "") in text
    assert "](plots/here/ops_time.svg)" in text
    assert report.main(["--results", str(tmp_path / "none"), "--page", str(page)]) == 2
    assert "none has no */ops*.json" in capsys.readouterr().err


def test_the_page_is_written_in_the_callers_folder_alone(tmp_path, monkeypatch, capsys):
    own = tmp_path / "bench" / "results" / "here"
    monkeypatch.chdir(tmp_path)
    assert report.main([]) == 2
    assert f"{tmp_path} has no bench/results: call this in the top folder of a clone" in capsys.readouterr().err
    own.mkdir(parents=True)
    shutil.copy(COMMITTED / "ops_memory.json", own)
    before = {path: path.stat().st_mtime_ns for path in COMMITTED.parents[1].rglob("*")}
    assert report.main(["--csv", "all.csv"]) == 0
    assert {path.name for path in own.iterdir()} == {"ops_memory.json", "ops_memory_memory.svg", "ops_memory_error.svg"}
    text = (tmp_path / "bench" / "README.md").read_text()
    assert "](results/here/ops_memory_memory.svg)" in text
    assert (tmp_path / "all.csv").read_text().startswith("file,date,")
    assert before == {path: path.stat().st_mtime_ns for path in COMMITTED.parents[1].rglob("*")}
    (own / "ops_other.json").write_text("{}")
    assert report.main([]) == 2
    assert "ops_other.json is not what bench.run --json writes" in capsys.readouterr().err


def test_the_committed_page_is_what_is_made_from_the_committed_results(tmp_path):
    bench = COMMITTED.parents[1]
    folder = tmp_path / "bench"
    shutil.copytree(bench / "results", folder / "results", ignore=shutil.ignore_patterns("*.svg"))
    assert report.main(["--results", str(folder / "results"), "--page", str(folder / "README.md")]) == 0
    made, committed = ((where / "README.md").read_text().splitlines() for where in (folder, bench))
    # The list of other results' pages may be behind for a commit; what it names is there.
    other_pages = re.compile(r"\* \[.*\]\((results/.*\.md)\)")
    assert all((bench / link[1]).exists() for line in committed if (link := other_pages.fullmatch(line)))
    made, committed = ([line for line in lines if not other_pages.fullmatch(line)] for lines in (made, committed))
    assert made == committed
    drawn = sorted(path.relative_to(folder) for path in folder.rglob("ops*.svg"))
    assert drawn == sorted(path.relative_to(bench) for path in bench.rglob("results/*/ops*.svg"))
    for path in drawn:
        assert (folder / path).read_bytes() == (bench / path).read_bytes(), path


def test_every_command_that_the_pages_show_runs(tmp_path, monkeypatch, capsys):
    """With small sizes, one dtype and one task."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(run, "memory_of", measure._memory_here)  # no process of its own for each case
    monkeypatch.delitem(sys.modules, "my_heads", raising=False)  # another test's
    (tmp_path / "my_heads.py").write_text(EXAMPLE)
    small = [
        "--task",
        "sft",
        "--dtype",
        "fp32",
        "--threads",
        "1",
        "--seconds",
        "0.001",
        "--peers",
        "linear_token",
        "eager",
    ]
    for page in (ROOT / "README.md", ROOT / "bench" / "README.md"):
        lines = [
            shlex.split(line, comments=True) for line in re.findall(r"^    repirl (bench .*)", page.read_text(), re.M)
        ]
        assert [words[1] for words in lines] == ["--shape", "--shape", "compare"], page
        for words in lines:
            if words[1] == "compare":
                # Small cases on a busy machine are not what a ratio is for.
                assert compare.main(["0" if word == "0.95" else word for word in words[2:]]) == 0
            else:
                sizes = iter(("12x8x50", "16x8x60"))
                assert run.main([next(sizes) if re.match(r"\d+x", word) else word for word in words[1:]] + small) == 0
        assert "my_heads:plain" in (tmp_path / "after.csv").read_text()
        assert f"```python\n{EXAMPLE}```" in (ROOT / "bench" / "README.md").read_text()
    assert "A/B above 1: B is better" in capsys.readouterr().out


def test_bench_runs_the_benchmarks_beside_the_package(tmp_path, monkeypatch, capfd):
    other = tmp_path / "bench"
    other.mkdir()
    for name in ("__init__.py", "compare.py", "run.py"):
        (other / name).write_text("raise SystemExit('those of another clone')")
    monkeypatch.chdir(tmp_path)
    assert repirl(["bench", "compare", "A.json", "B.json"]) == 2
    assert "A.json cannot be read" in capfd.readouterr().err


def test_the_revision_is_that_of_the_checkout_of_the_ops(tmp_path):
    assert re.fullmatch(r"[0-9a-f]{12}(\+changes)?", run._revision(ROOT / "repirl" / "cli.py"))
    # A copy that is installed inside a checkout is not a part of it.
    copy = tmp_path / "clone" / "site-packages" / "ops.py"
    copy.parent.mkdir(parents=True)
    copy.write_text("")
    subprocess.run(["git", "init", "--quiet", tmp_path / "clone"], check=True)
    assert run._revision(copy) == "unknown"


def _half_entropy(inputs) -> Values:
    values = EAGER.values(inputs)
    return values._replace(entropy=0.5 * values.entropy)


def _detached_entropy(inputs) -> Values:
    values = EAGER.values(inputs)
    return values._replace(entropy=values.entropy.detach())


@pytest.mark.parametrize("task", ["score", "policy+entropy"])
def test_wrong_results_are_not_timed(task):
    wrong = Contender("wrong", (), values=lambda inputs: Values(*(2 * v for v in EAGER.values(inputs))))
    half = Contender("half", (), values=_half_entropy)
    rows = _measure(OURS, wrong, half, case=CASE._replace(task=task))
    assert "median" in rows[OURS.name]
    for name in ("wrong", "half"):
        assert "not the same result" in rows[name]["reason"]
        assert "median" not in rows[name]
        assert "extra_bytes" not in rows[name]


def test_a_missing_gradient_is_not_a_result():
    no_dweight = Contender(
        "no dweight", (), values=lambda inputs: EAGER.values(inputs._replace(weight=inputs.weight.data))
    )
    assert "gives no dweight" in _measure(no_dweight)["no dweight"]["reason"]
    detached = Contender("detached", (), values=_detached_entropy)
    for dtype in ("fp32", "bf16"):
        assert "not the same result" in _measure(detached, case=CASE._replace(dtype=dtype))["detached"]["reason"]


def test_why_a_contender_cannot_run_is_told():
    def fails(inputs):
        raise NotImplementedError("only for even numbers\nof rows")

    def absent(inputs):
        import a_peer_that_nobody_has  # noqa: F401

    rows = _measure(
        Contender("fails", (), values=fails),
        Contender("absent", (), values=absent),
        Contender("mean", (), mean_loss=fails),
    )
    assert rows["fails"]["reason"] == "NotImplementedError: only for even numbers"
    assert rows["absent"]["reason"] == "not installed: No module named 'a_peer_that_nobody_has'"
    assert rows["mean"]["reason"] == "has a mean loss only"


def test_one_that_fails_at_full_size_is_told_and_the_others_are_timed():
    def fails(inputs):
        raise MemoryError("too large")

    times, reasons = times_of([OURS, Contender("large", (), values=fails)], CASE, "cpu", 0.01)
    assert reasons == {"large": "MemoryError: too large"}
    assert set(times) == {"", OURS.name}
    assert len(times[OURS.name]) >= 3


def test_memory_is_the_transient_peak_beyond_gradients():
    def wasteful(inputs):
        torch.ones(16 << 20)  # 64 MiB, freed at once
        return EAGER.values(inputs)

    case = Case("tiny", 32, "fp32", "policy+entropy")
    extra = extra_bytes_of(Contender("wasteful", (), values=wasteful), case, "cpu")
    assert 60 << 20 < extra < 80 << 20


def test_spread_is_median_and_quartiles():
    rounds = [5.0, 1.0, 2.0, 3.0, 4.0]
    assert spread(rounds) == {"median": 3.0, "low": 2.0, "high": 4.0, "rounds": 5, "seconds": rounds}


def test_shapes_of_ones_own():
    cases = own_cases("12 x 8 X 50")
    assert {case.name for case in cases} >= {"12x8x50 bf16 score", "12x8x50 fp32 policy+entropy"}
    assert {case.task for case in cases} == {"score", "sft", "policy", "policy+entropy"}
    inputs = make_inputs(cases[0], "cpu")
    assert (inputs.hidden.shape, inputs.weight.shape) == ((12, 8), (50, 8))
    named, own = run._shapes(run._parser(), [["12", "x", "8", "x", "50", "tiny"], ["4x2x9"]])
    assert named == ["tiny"]
    assert [case.shape for case in own[:: len(cases)]] == ["8x50", "2x9"]


def test_inputs_are_those_of_the_case():
    inputs = make_inputs(CASE._replace(masked=0.75, frozen=True, dtype="bf16"), "cpu")
    assert inputs.hidden.shape == (32, 64)
    assert inputs.hidden.dtype == torch.bfloat16
    assert inputs.counts.sum() == 8
    (leaf,) = inputs.leaves()
    assert leaf is inputs.hidden
    again = make_inputs(CASE._replace(masked=0.75, frozen=True, dtype="bf16"), "cpu")
    assert torch.equal(inputs.hidden, again.hidden)
    assert torch.equal(inputs.targets, again.targets)


def test_filters(capsys):
    with pytest.raises(SystemExit):
        run.main(["--shape", "GPT-5"])
    assert (
        "GPT-5 is not of the form NxDxV: expected NxDxV, such as 1024x576x49152, or SmolLM2" in capsys.readouterr().err
    )
    for sizes in ("0x8x50", "12x8x1"):
        with pytest.raises(SystemExit):
            run.main(["--shape", sizes])
        assert f"{sizes} needs N and D of at least 1 and V of at least 2" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.main(["--check-rows", "0"])
    assert run.main(["--profile", "test", "--rows", "7"]) == 2
    assert "nothing is left to measure" in capsys.readouterr().err


def test_profiles_cover_shapes_masks_and_a_frozen_head():
    gpu = PROFILES["gpu"]
    assert {case.shape for case in gpu} >= {"SmolLM2-135M", "Qwen2.5-3B", "Qwen3-4B", "Llama-3-8B", "4096x131072"}
    assert {case.masked for case in gpu} == {0.0, 0.6, 0.9} == {case.masked for case in PROFILES["cpu"]}
    for profile in ("cpu", "gpu"):
        assert any(case.frozen for case in PROFILES[profile])
        assert {case.dtype for case in PROFILES[profile]} == {"bf16", "fp32"}


def test_without_a_checkout_the_command_says_where_benchmarks_are(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("repirl.cli.__file__", str(tmp_path / "repirl" / "cli.py"))
    assert repirl(["bench"]) == 2
    assert f"{tmp_path} has no bench/run.py" in capsys.readouterr().err
