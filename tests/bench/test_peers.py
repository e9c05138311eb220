"""Functions of one's own beside ours: what they may return, and what is refused."""

import json
import math
import sys

import pytest

from bench import run
from bench.cases import Case
from bench.contenders import CONTENDERS
from bench.peers import EXAMPLE, load_peer

CASE = Case("8x50", 12, "fp32", "policy+entropy")
OTHERS = """

def from_logits(logits, targets):
    return plain(logits, torch.eye(logits.shape[1]), targets)


def mean(hidden, weight, targets, label_smoothing=0.0):
    return torch.nn.functional.cross_entropy(hidden @ weight.T, targets)


def logprobs_only(hidden, weight, targets):
    return plain(hidden, weight, targets)[0]


def losses(hidden, weight, targets):
    return -plain(hidden, weight, targets)[0], plain(hidden, weight, targets)[1]


def not_a_number(hidden, weight, targets):
    logprob, entropy = plain(hidden, weight, targets)
    return logprob, entropy * float("nan")


def all_logits(hidden, weight, targets):
    return hidden @ weight.T


def refuses(hidden, weight, targets):
    raise NotImplementedError("V is not a power of two")


def alone(hidden):
    return hidden
"""


@pytest.fixture
def heads(tmp_path, monkeypatch):
    """The folder of my_heads.py: the example of the page, and others."""
    (tmp_path / "my_heads.py").write_text(EXAMPLE + OTHERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_heads", raising=False)  # another test's
    yield tmp_path
    sys.modules.pop("my_heads", None)


def measure(*names: str, case: Case = CASE, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict]:
    # In this process: another one is started by the test of the command.
    monkeypatch.setattr(run, "memory_of", lambda able, case, device: {contender.name: 0 for contender in able})
    contenders = [CONTENDERS[0], *(load_peer(f"my_heads:{name}") for name in names)]
    measured = run.measure_case(case, contenders, "cpu", seconds=0.001)
    return {row["contender"].removeprefix("my_heads:"): row for row in measured["rows"]}


@pytest.mark.parametrize("task", ["score", "sft", "policy", "policy+entropy"])
def test_the_example_of_the_page_runs_every_task(heads, monkeypatch, task):
    rows = measure("plain", case=CASE._replace(task=task), monkeypatch=monkeypatch)
    ours = rows[CONTENDERS[0].name]
    assert ours["errors"].keys() == rows["plain"]["errors"].keys()
    assert all(0 < error < 1e-5 for error in rows["plain"]["errors"].values())
    assert rows["plain"]["median"] > 0


def test_ignored_rows_do_not_count(heads, monkeypatch):
    for task in ("sft", "policy+entropy"):
        rows = measure("plain", "mean", case=CASE._replace(task=task, masked=0.5), monkeypatch=monkeypatch)
        assert "reason" not in rows["plain"]
    assert rows["mean"]["reason"] == "has a mean loss only"


def test_what_is_returned_says_which_tasks_can_be_run(heads, monkeypatch):
    rows = measure("mean", "logprobs_only", case=CASE._replace(task="sft"), monkeypatch=monkeypatch)
    assert "median" in rows["mean"]
    assert "median" in rows["logprobs_only"]
    rows = measure("logprobs_only", monkeypatch=monkeypatch)
    assert rows["logprobs_only"]["reason"] == "no entropy with a gradient"
    rows = measure("logprobs_only", case=CASE._replace(task="score"), monkeypatch=monkeypatch)
    assert rows["logprobs_only"]["reason"] == "no entropy"
    rows = measure("plain", "from_logits", case=CASE._replace(task="logits"), monkeypatch=monkeypatch)
    assert "median" in rows["from_logits"]
    assert "plain" not in rows


def test_wrong_results_are_told_with_their_error(heads, monkeypatch):
    rows = measure("losses", "not_a_number", "all_logits", "refuses", monkeypatch=monkeypatch)
    assert "not the same result" in rows["losses"]["reason"]
    assert rows["losses"]["errors"]["dhidden"] > 0.1
    assert "not the same result" in rows["not_a_number"]["reason"]
    assert rows["not_a_number"]["errors"]["dhidden"] is None
    assert rows["all_logits"]["reason"].startswith("ValueError: returned ([12, 50]); expected log-probs [N]")
    assert rows["refuses"]["reason"] == "NotImplementedError: V is not a power of two"
    assert not any("median" in row for name, row in rows.items() if not row["ours"])


def test_an_error_in_rows_that_are_not_compared_needs_more_rows(heads, monkeypatch):
    code = "def first_rows(h, w, t):\n    a, b = plain(h, w, t)\n    return torch.cat((a[:16], 2 * a[16:])), b\n"
    (heads / "first_heads.py").write_text(EXAMPLE + code)
    monkeypatch.setattr(run, "memory_of", lambda able, case, device: {contender.name: 0 for contender in able})
    case, peer = CASE._replace(num_rows=20), load_peer("first_heads:first_rows")
    for rows, wrong in ((16, False), (20, True)):
        measured = run.measure_case(case, [peer], "cpu", 0.001, checked_rows=rows)
        assert measured["checked_rows"] == rows
        assert ("reason" in measured["rows"][0]) == wrong


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_heads", "my_heads is not of the form module:function"),
        ("my_heads:absent", "my_heads:absent cannot be loaded: AttributeError"),
        ("absent_heads:plain", "absent_heads:plain cannot be loaded: ModuleNotFoundError"),
        ("my_heads:alone", "takes 1 arguments; expected (hidden, weight, targets) or (logits, targets)"),
    ],
)
def test_what_cannot_be_a_peer_is_refused(heads, capsys, name, message):
    with pytest.raises(SystemExit) as end:
        run.main(["--peer", name])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_measures_a_peer_and_a_shape_of_ones_own(heads, monkeypatch, capsys):
    monkeypatch.chdir(heads)
    options = ["--shape", "12", "x", "8", "x", "50", "--task", "policy+entropy", "--dtype", "fp32", "--threads", "1"]
    options += ["--peers", "linear_token_stats", "--peer", "my_heads:plain", "--peer", "my_heads:losses"]
    assert run.main([*options, "--seconds", "0.001", "--json", "ops.json", "--csv", "ops.csv"]) == 0
    result = json.loads((heads / "ops.json").read_text())
    assert result["profile"] == "own"
    [measured] = result["cases"]
    assert measured["name"] == "12x8x50 fp32 policy+entropy"
    ours, peer, wrong = measured["rows"]
    assert peer["contender"] == "my_heads:plain"
    assert peer["extra_bytes"] >= 0
    assert len(peer["seconds"]) == peer["rounds"] >= 3
    assert math.isclose(sorted(ours["seconds"])[len(ours["seconds"]) // 2], ours["median"]) or ours["rounds"] % 2 == 0
    assert "median" not in wrong
    assert (heads / "ops.csv").read_text().count("\n") == 4
    text = capsys.readouterr().out
    assert "12x8x50 fp32 policy+entropy" in text
    assert "products:  the median in multiples of one bare matrix product" in text
