"""`repirl label`: labels with known chances, what is counted, kills, and what it refuses."""

import json
import re
from pathlib import Path

import pytest
from tiny import tiny_config, tiny_values

from repirl.apps.label import Labels, label, summary
from repirl.cli import main
from repirl.config import ConfigError, RunError
from repirl.configfile import build_config, merge
from repirl.data.steps import load_steps
from repirl.data.tasks.arithmetic import build_tokenizer
from repirl.loop import train
from repirl.report.log import read_metrics
from repirl.rollout.engine import Response

TOKENIZER = build_tokenizer()
END = TOKENIZER.eos_token_id


class KnownChances:
    """An engine that goes on from a prefix with the right answer for as many of the seeds as is said, in turn.

    rights: for each text that a prompt and a prefix come to, how many completions of 8 are right.
    """

    def __init__(self, answer, rights):
        self.answer, self.rights, self.limits, self.num_sampled = answer, rights, [], 0

    def generate(self, prompts, seeds, sampling):
        seen, made = {}, []
        for prompt in prompts:
            text = TOKENIZER.decode(list(prompt))
            number = seen[text] = seen.get(text, -1) + 1
            right = number % 8 < self.rights[text]
            # Wrong by one, with the answer to be told from the end.
            ids = [*TOKENIZER(f"#### {self.answer if right else 99}").input_ids, END]
            assert len(ids) <= sampling.max_response_tokens
            made.append(Response(ids, [0.0] * len(ids), True))
            self.num_sampled += len(ids)
        self.limits.append(sampling.max_response_tokens)
        return made

    def update_weights(self, policy):
        pass

    wake = sleep = close = lambda self: None


def use(monkeypatch, engine):
    monkeypatch.setattr("repirl.apps.label.make_engine", lambda *_: engine)
    return engine


def values(folder, **changes):
    """Labels of given responses."""
    rows = [
        {"prompt": "8+7-3=", "answer": "12", "response": "8+7=15; 15-3=12; #### 12"},
        {"prompt": "8+7-3=", "answer": "12", "response": ["8+7=14; 14-3=11; #### 11", "8+7=15; #### 12"]},
    ]
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = {
        "objective": "math-shepherd",
        "data": {"train": str(folder / "rows.jsonl"), "eval": None, "steps": str(folder / "made" / "steps.jsonl")},
        "label": {"response_column": "response", "samples": 8},
        "rollout": {"max_response_tokens": 32},
    }
    return tiny_values(folder, **merge(plain, changes))


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


RIGHTS = {"8+7-3=8+7=15; ": 6, "8+7-3=8+7=15; 15-3=12; ": 8, "8+7-3=8+7=14; ": 2, "8+7-3=8+7=14; 14-3=11; ": 0}


def test_labels_are_the_shares_and_what_they_cost_is_counted(tmp_path, monkeypatch):
    engine = use(monkeypatch, KnownChances("12", RIGHTS))
    config = build_config(values(tmp_path))
    counts, path = label(config)
    assert path == tmp_path / "made" / "steps.jsonl"
    first, second, third = rows = lines(path)
    assert first == {
        "prompt": "8+7-3=",
        "completions": ["8+7=15", "15-3=12", "#### 12"],
        "labels": [True, True, True],
        "soft_labels": [0.75, 1.0, 1.0],
        "finished": True,
        "outcome": 1.0,
        "row": 0,
    }
    assert (second["soft_labels"], second["labels"]) == ([0.25, 0.0, 0.0], [True, False, False])
    assert (third["soft_labels"], third["outcome"], third["row"]) == ([0.75, 1.0], 1.0, 1)
    # 8 completions behind each step but the last ones.
    assert (counts.prompts, counts.responses, counts.steps, counts.right) == (2, 3, 8, 6)
    assert (counts.completions, counts.tokens_sampled) == (5 * 8, engine.num_sampled)
    meta = json.loads((tmp_path / "made" / "steps.jsonl.meta.json").read_text())
    assert meta["counts"]["tokens_sampled"] == engine.num_sampled == 5 * 8 * 4
    assert meta["counts"]["seconds"] > 0
    assert meta["bytes"] == path.stat().st_size
    assert re.search(r"8 labelled steps \(75.0% right\) of 3 responses to 2 prompts; 160 tokens", summary(counts, "x"))
    # Prefixes have 7 and 15 tokens of the 32 that a response may have; limits are even.
    assert engine.limits == [16, 24]

    # What was written is what training reads, soft labels too.
    [one, *_] = load_steps(config.data, TOKENIZER, "train")
    assert TOKENIZER.decode(one.response_ids) == "8+7=15; 15-3=12; #### 12<eos>"
    assert (one.ends, one.labels) == ((6, 14, 18), (1.0, 1.0, 1.0))
    soft = build_config(
        merge(values(tmp_path), {"data": {"steps": {"path": str(path), "labels_column": "soft_labels"}}})
    )
    assert load_steps(soft.data, TOKENIZER, "train")[1].labels == (0.25, 0.0, 0.0)
    assert len(rows) == 3


def test_steps_of_a_list_and_a_verifier_of_ones_own(tmp_path, monkeypatch):
    """A list's steps need no separator in the text; verdicts between 0 and 1 are averaged, others refused."""
    config = values(tmp_path, label={"response_column": None, "steps_column": "steps"})
    row = {"prompt": "8+7-3=", "answer": "12", "steps": ["8+7=15", "15-3=12; #### 12"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    use(monkeypatch, KnownChances("12", {"8+7-3=8+7=15; ": 4}))
    label(build_config(config))
    [made] = lines(tmp_path / "made" / "steps.jsonl")
    assert (made["completions"], made["soft_labels"]) == (row["steps"], [0.5, 1.0])

    (tmp_path / "judges.py").write_text("def judge(response, answer):\n    return float(len(response))\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    custom = {"verifier": {"kind": "custom", "function": "judges:judge"}}
    with pytest.raises(RunError, match=r"the verifier says 24 of a response to the answer '12'.*from 0 \(wrong\) to 1"):
        label(build_config(config | custom), tmp_path / "other.jsonl")


def test_omega_labels_through_the_same_door(tmp_path, monkeypatch):
    """The wrong response's first error is found by one search; no other rollout of the prompt is wrong."""
    rights = RIGHTS | {"8+7-3=": 8, "8+7-3=8+7=14; ": 4}
    use(monkeypatch, KnownChances("12", rights))
    row = {"prompt": "8+7-3=", "answer": "12", "response": "8+7=14; 14-3=11; #### 11"}
    config = values(tmp_path, label={"method": "omega", "searches": 1})
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    counts, path = label(build_config(config))
    [made] = lines(path)
    # From the prompt some rollouts are right, and the whole response is wrong: 8+7=14 is tested, then 14-3=11.
    assert made["soft_labels"] == [0.5, 0.0]
    assert made["completions"] == ["8+7=14", "14-3=11"]
    assert made["finished"] is False
    assert counts.completions == 8 * 3
    [read] = load_steps(build_config(config).data, TOKENIZER, "train")
    assert (TOKENIZER.decode(read.response_ids), read.labels) == ("8+7=14; 14-3=11; ", (1.0, 0.0))


def small(folder, **changes):
    plain = {
        "objective": "math-shepherd",
        "data": {"eval": None, "steps": str(folder / "made.jsonl")},
        "label": {"samples": 2, "num_prompts": 5, "prompts_per_batch": 2},
        "rollout": {"samples_per_prompt": 2, "max_response_tokens": 10},
    }
    return tiny_values(folder, **merge(plain, changes))


@pytest.mark.parametrize("method", ["math-shepherd", "omega"])
def test_a_killed_run_goes_on_to_the_same_file(tmp_path, monkeypatch, method):
    """With the policy's own model: killed after some batches, half a line behind them, and resumed."""
    config = build_config(small(tmp_path, label={"method": method}))
    counts, path = label(config, tmp_path / "whole.jsonl")
    assert counts.prompts == 5
    if method == "math-shepherd":
        assert counts.responses + counts.blank == 10
        assert counts.steps >= 10
        assert all(len(row["labels"]) == len(row["completions"]) for row in lines(path))

    write, done = Labels.write, []

    def dying(self, num_prompts, rows):
        write(self, num_prompts, rows)
        done.append(num_prompts)
        if len(done) == 2:
            with open(self.file.path, "ab") as file:
                file.write(b'{"prompt": "half a li')
            raise KeyboardInterrupt

    monkeypatch.setattr(Labels, "write", dying)
    with pytest.raises(KeyboardInterrupt):
        label(config)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"made.jsonl' holds 4 of 5 prompts; go on with it by --resume"):
        label(config)
    again, other = label(config, resume=True)
    assert other.read_bytes() == path.read_bytes()
    assert (again.tokens_sampled, again.completions, again.steps) == (
        counts.tokens_sampled,
        counts.completions,
        counts.steps,
    )
    # What is done stays as it is.
    assert label(config, resume=True)[0] == again


def test_label_then_train(tmp_path, capsys):
    """The two commands of the preset, on the tiny model."""
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(small(tmp_path, steps=3, step_prm={"responses_per_step": 4})))
    assert main(["label", "--config", str(file)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\d+ labelled steps \(.*% right\) of \d+ responses to 5 prompts.* tokens sampled in ", printed)
    assert "label 5/5: " in printed
    assert main(["train", "--config", str(file)]) == 0
    made = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in made] == [1, 2, 3]
    # The other method into another file.
    arguments = ["--method", "omega", "--output", str(tmp_path / "omega.jsonl")]
    assert main(["label", "--config", str(file), *arguments]) == 0
    meta = json.loads((tmp_path / "omega.jsonl.meta.json").read_text())
    assert meta["made_with"]["label.method"] == "omega"
    assert meta["counts"]["prompts"] == 5


def test_what_cannot_be_used_is_refused(tmp_path):
    config = small(tmp_path)

    def refused(message, changes, **options):
        with pytest.raises(ConfigError, match=message):
            label(build_config(merge(config, changes)), **options)

    refused("set data.train and data.answer_column", {"data": {"train": None}})
    refused("has no column 'r'.*label.response_column", {"label": {"response_column": "r"}})
    refused("'solution' holds '.*expected a list with the text of each step", {"label": {"steps_column": "solution"}})
    refused("the response has .* tokens, rollout.max_response_tokens is 10", {"label": {"response_column": "solution"}})
    with pytest.raises(ConfigError, match=r"label.response_column and label.steps_column are both set"):
        tiny_config(tmp_path, label={"response_column": "a", "steps_column": "b"})
    with pytest.raises(ConfigError, match=r"give --output FILE, or set data.steps"):
        label(tiny_config(tmp_path, objective="rloo", data={"steps": None}))
    # A file that is somebody else's, and one that was made in another way.
    (tmp_path / "made.jsonl").write_text("{}\n")
    refused("does not say that `repirl label` made it", {}, resume=True)
    assert (tmp_path / "made.jsonl").read_text() == "{}\n"
    (tmp_path / "made.jsonl").unlink()
    one = {"label": {"num_prompts": 1}}
    label(build_config(merge(config, one)))
    refused(r"was made with seed 0, now it is 1", merge(one, {"seed": 1}), resume=True)
    refused(r"was made with label.samples 2, now it is 3", merge(one, {"label": {"samples": 3}}), resume=True)
    (tmp_path / "made.jsonl").write_text("")
    refused("is shorter than `repirl label` left it", one, resume=True)


def test_a_call_that_was_killed_at_once_leaves_nothing_in_the_way(tmp_path, monkeypatch):
    """Before the first batch there is nothing to go on with; and two calls do not write one file."""
    config = build_config(small(tmp_path, label={"num_prompts": 1}))

    def stop(*_):
        with pytest.raises(ConfigError, match=r"another `repirl label` writes '.*made.jsonl'"):
            label(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("repirl.apps.label.label_batch", stop)
    for left in ("both", "the output alone"):
        with pytest.raises(KeyboardInterrupt):
            label(config)
        assert (tmp_path / "made.jsonl").read_bytes() == b""
        if left != "both":
            (tmp_path / "made.jsonl.meta.json").unlink()
    monkeypatch.undo()
    assert label(config)[0].prompts == 1


def test_training_needs_the_file_first(tmp_path):
    with pytest.raises(ConfigError, match=r"made.jsonl' does not exist"):
        train(build_config(small(tmp_path)))
