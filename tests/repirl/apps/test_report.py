"""`repirl report`: the page of runs."""

import json
import re

import pytest
from pages import Page

from repirl.apps.report import page_of, report
from repirl.cli import main
from repirl.config import ConfigError
from repirl.report.html import render
from repirl.report.runs import read_runs, run_names

START = {
    "step": 0,
    "time": "2026-11-28T13:20:00+00:00",
    "version": "9.9",
    "revision": "0123456789ab+changes",
    "machine": {"cpu": "A CPU", "cores": 2, "memory_gib": 8.0, "gpu": None, "processes": 1, "system": "Linux"},
    "packages": {"python": "3.11", "torch": "2.8"},
    "command": "repirl train --config my.yaml",
}


def lines(turns, **changes):
    rows = [{"step": 0, "eval/accuracy": 0.25, "seconds/step": 1.0}]
    for step in range(1, turns + 1):
        row = {"step": step, "prm/reward_gap": 0.1 * step, "prm/ess_fraction": 0.5, "prm/log_z": -0.1, "tokens": 1000}
        row |= {"prm/reward_mean": -0.2, "policy/entropy": 0.3, "policy/approx_kl": 0.01, "rollout/length": 20.0}
        row |= {"rollout/outcome": 0.5, "prm/loss": 0.4, "policy/loss": -0.1, "seconds/step": 2.0, "prm/pareto_k": 0.5}
        rows.append(row | ({"eval/accuracy": 0.25 + 0.5 * step / turns} if step % 5 == 0 or step == turns else {}))
    return [row | changes if row["step"] else row for row in rows]


def make_run(folder, rows=None, options=None, start=START, samples=()):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows or lines(6)))
    if start is not None:
        configuration = {"objective": "repirl", "steps": 6, "prm": {"reward": "logprob"}, "output_dir": str(folder)}
        configuration |= {"data": {"step_separator": "; "}} | (options or {})
        (folder / "run.json").write_text(json.dumps({"starts": [start | {"configuration": configuration}]}))
    if samples:
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    return folder


def sample(step, text="1+1=2; 2", **changes):
    tokens = [*re.findall(r"\d|\S|\s", text), "<eos>"]
    return {
        "step": step,
        "kind": "train",
        "index": 0,
        "prompt": "1+1=",
        "response": text,
        "token_texts": tokens,
        "token_rewards": [-0.1 * (i % 7) for i in range(len(tokens))],
        "token_logprobs": [-0.1] * len(tokens),
        "outcome": 1.0,
        "length": len(tokens),
        "end_reason": "end",
    } | changes


def test_page_of_one_run(tmp_path, capsys):
    folder = make_run(tmp_path / "mine", samples=[sample(1), sample(2, outcome=0.0)])
    assert main(["report", "--run", str(folder)]) == 0
    assert str(folder / "report.html") in capsys.readouterr().out
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert page.all("h1")[0][1] == "mine"
    assert [text for _, text in page.all("h2")] == ["Results", "Learning curves", "Responses", "How it was made"]
    titles = [text for _, text in page.all("h3")]
    for title in ("Held-out accuracy", "Reward gap", "Effective sample size", "log Z", "Entropy of the policy",
                  "KL of an update", "Response length", "PRM loss", "Policy loss", "Throughput"):  # fmt: skip
        assert title in titles
    assert "Critic loss" not in titles
    units = [text for _, text in page.all("p", "axis")]
    assert {"experts minus policy, nats per token", "tokens/s", "nats", "tokens"} <= {
        part for unit in units for part in (unit, unit.split(", ")[-1])
    } | {"tokens"}
    shown = " ".join(text for _, text in page.all("td"))
    for fact in ("9.9", "0123456789ab+changes", "A CPU, 2 cores, 8.0 GiB", "2026-11-28 13:20 UTC", "6 of 6 turns",
                 ):  # fmt: skip
        assert fact in shown
    assert page.all("pre")[0][1].startswith("# repirl train --config my.yaml\nobjective: repirl\n")
    assert [text for _, text in page.all("span", "badge")] == ["\u2713 right", "\u2717 wrong"]
    assert page.all("details", "steps")
    assert "Options that differ" not in titles


def test_several_runs_stand_beside_each_other(tmp_path):
    first = make_run(tmp_path / "a", samples=[sample(1)])
    second = make_run(tmp_path / "b", lines(3), {"objective": "rloo", "loss": {"clip_low": 0.3}}, samples=[sample(1)])
    path = report([first, second], tmp_path / "page.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert len(page.all("g", "series")) % 2 == 0
    figure = page.all("figure")[0][1]
    assert "a 75.0%" in figure
    assert "b 75.0%" in figure
    rows = [text for _, text in page.all("tr")]
    assert "objectiverepirlrloo" in rows
    assert "loss.clip_low-0.3" in rows
    assert not any(row.startswith("output_dir") for row in rows)
    # Both runs answered the same prompt in the same turn.
    assert len(page.all("article")) == 1
    assert len(page.all("div", "variant")) == 2


def test_a_run_without_a_record_or_samples_says_so(tmp_path):
    folder = make_run(tmp_path / "old", start=None)
    page = Page(report([folder]).read_text(encoding="utf-8"))
    cells = [text for _, text in page.all("td")]
    assert cells.count("not recorded") >= 5
    assert "old kept no sampled responses (samples.jsonl)." in [text for _, text in page.all("li")]


def test_a_run_that_went_on_says_when(tmp_path):
    folder = make_run(tmp_path / "mine")
    content = json.loads((folder / "run.json").read_text())
    content["starts"].append(content["starts"][0] | {"step": 4, "time": "2026-11-29T08:00:00+00:00", "version": "10"})
    (folder / "run.json").write_text(json.dumps(content))
    cells = [text for _, text in Page(report([folder]).read_text(encoding="utf-8")).all("td")]
    assert "2026-11-28 13:20 UTC; went on 1 time, at turn 4 on 2026-11-29 08:00 UTC" in cells
    assert "10" in cells


def test_what_is_easily_overlooked_is_said(tmp_path):
    rows = lines(4, **{"prm/pareto_k": 1.5, "prm/ess_fraction": 0.01, "policy/skipped_updates": 2, "prm/loss": None})
    page = page_of(read_runs([make_run(tmp_path / "a", rows)]))
    notes = " ".join(page["notes"])
    assert "in 4 of 4 turns importance weights were uneven, with a Pareto k above 0.7" in notes
    assert "below 5% of the samples in 4 of 4 turns" in notes
    assert "2 updates of the policy were skipped" in notes
    [loss] = [curve for curve in page["curves"] if curve["title"] == "PRM loss"]
    assert loss["note"] == "4 values not finite: a gap in the line."


def test_a_long_run_gives_a_page_of_sensible_size(tmp_path):
    rows = [{"step": i, "prm/loss": i % 97} for i in range(1, 100_001)]
    rewards = [-1 / (1 + i) for i in range(1500)]
    samples = [
        sample(i, token_texts=["word "] * 1500, token_rewards=rewards, token_logprobs=rewards, length=1500, index=i)
        for i in range(1, 21)
    ]
    text = render(page_of(read_runs([make_run(tmp_path / "long", rows, samples=samples)]), responses=10))
    assert len(text) < 1_000_000
    assert "Of a line of more than 400 turns at most 400 points are drawn" in text
    assert "long: 10 of 20 kept responses are on this page." in text


def test_further_metrics_can_be_named(tmp_path, capsys):
    folder = make_run(tmp_path / "a", lines(3, **{"gate/score": 2.5}))
    assert main(["report", "--run", str(folder), "--metric", "gate/score", "--responses", "0"]) == 0
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert "gate/score" in [text for _, text in page.all("h3")]
    assert main(["report", "--run", str(folder), "--metric", "gate/skore"]) == 2
    assert "'gate/skore' is in no metrics.jsonl of these runs; there are" in capsys.readouterr().err


def test_mistakes_are_named(tmp_path, capsys):
    folder = make_run(tmp_path / "runs" / "a")
    for arguments, message in (
        ([str(tmp_path / "none")], "is no folder"),
        ([str(tmp_path / "runs")], "has no metrics.jsonl: expected the output_dir of a run; there are runs in it: a"),
        ([str(folder), str(folder)], "is given twice"),
    ):  # fmt: skip
        assert main(["report", *(part for run in arguments for part in ("--run", run))]) == 2
        assert message in capsys.readouterr().err
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="has no records yet"):
        report([folder])
    with pytest.raises(ConfigError, match="give --run"):
        report([])
    assert main(["report", "--run", str(folder), "--responses", "-1"]) == 2
    assert "--responses is -1" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_named(tmp_path, capsys):
    folder = make_run(tmp_path / "a")
    (tmp_path / "file").write_text("")
    assert main(["report", "--run", str(folder), "--output", str(tmp_path / "file" / "page.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    (tmp_path / "folder").mkdir()
    for output, said in (("folder", "is a folder, expected the name of a file"), ("p.md", "would hold an HTML page")):
        assert main(["report", "--run", str(folder), "--output", str(tmp_path / output)]) == 2
        assert said in capsys.readouterr().err


def test_a_page_of_several_runs_replaces_no_runs_own(tmp_path):
    runs = [make_run(tmp_path / name) for name in "ab"]
    own = report(runs[:1]).read_bytes()
    with pytest.raises(ConfigError, match="a page of 2 runs is none of these runs' own"):
        report(runs)
    assert report(runs, tmp_path / "pages" / "both.html").exists()
    assert (runs[0] / "report.html").read_bytes() == own


def test_runs_are_called_by_what_tells_them_apart(tmp_path):
    assert run_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert run_names([tmp_path / "x" / "a", tmp_path / "y" / "a"]) == ["x/a", "y/a"]


def test_the_same_runs_give_the_same_bytes(tmp_path):
    folder = make_run(tmp_path / "a", samples=[sample(1), sample(2)])
    first = report([folder], tmp_path / "1.html").read_bytes()
    assert report([folder], tmp_path / "2.html").read_bytes() == first
