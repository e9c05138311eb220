"""The study of GSM8K: its stages run on a tiny model and made-up problems and resume; its figures are right."""

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from shared import ROOT
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench import gsm8k
from bench.gsm8k_page import AGGREGATES, LENGTH, Scored, figures
from repirl.apps.localize import auroc
from repirl.cli import main

SCRIPT = ROOT / "examples" / "gsm8k.sh"


def make_tiny(folder):
    """A random model that reads bytes, so that it can write any text."""
    vocabulary = {chr(i): i for i in range(32, 127)} | {"\n": 10}
    vocabulary = {text: number for number, text in enumerate([*vocabulary, "<end>", "<unknown>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    end = vocabulary["<end>"]
    reader = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unknown>")
    reader.chat_template = "{% for message in messages %}{{ message.content }}<end>{% endfor %}"
    reader.save_pretrained(folder)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **shape, bos_token_id=None, eos_token_id=end))
    model.save_pretrained(folder)


def make_data(folder):
    """Problems and solutions in the formats of GSM8K and of the solutions of other models."""
    rng, train, others = random.Random(0), [], []
    for _ in range(20):
        a, b = rng.randrange(10), rng.randrange(10)
        solution = f"He has {a}+{b}=<<{a}+{b}={a + b}>>{a + b} left.\n"
        train.append({"question": f"{a} and {b} apples?", "answer": f"{solution}#### {a + b}"})
        row = {"question": f"{a} and {b} nuts?", "ground_truth": f"{solution}A: {a + b}"}
        for number, name in enumerate(gsm8k.GENERATORS):
            row[name] = {"is_correct": number % 2 == 0, "solution": f"{solution}A: {a + b + number % 2}"}
        others.append(row)
    # One that goes on until it is cut off.
    others[0]["175b_finetuning"]["solution"] = "1 + 1 = 1 + 1 = 1"
    for name, rows in {"train": train, "solutions": others}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gsm8k")
    make_tiny(folder / "model")
    make_data(folder)
    options = {
        "model": folder / "model",
        "train": folder / "train.jsonl",
        "solutions": folder / "solutions.jsonl",
        "folder": folder / "runs",
        "output": folder / "results" / "gsm8k.json",
        "sft-solutions": 8,
        "sft-batch": 4,
        "sft-updates": 2,
        "problems": 6,
        "held-out": 4,
        "samples": 2,
        "max-tokens": 12,
        "problems-per-update": 2,
        "test-problems": 20,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def test_all_stages_run_and_a_second_call_goes_on(arguments, monkeypatch):
    gsm8k.main([*arguments, "--updates", "2"])
    output = Path(arguments[arguments.index("--output") + 1])
    first = json.loads(output.read_text())
    assert first["left_out"] == 1
    others = first["figures"]["others"]
    assert (others["solutions"], others["problems"], others["mixed_problems"], others["human"]) == (79, 20, 20, 0)
    own = first["figures"]["own"]
    assert (own["solutions"], own["problems"], own["human"]) == (8, 4, 4)
    assert first["account"]["sft"]["updates"] == 2
    assert first["account"]["sampled"]["problems"]["responses"] == 12

    # What is there is not made again: another arm is trained, and one goes on.
    monkeypatch.setattr(gsm8k, "sample", None)
    trained = []
    real = gsm8k.train
    monkeypatch.setattr(gsm8k, "train", lambda config, **how: trained.append((config, how)) or real(config, **how))
    gsm8k.main([*arguments, "--updates", "3", "--arms", "value;value, outcomes"])
    told = [(c.prm.reward, c.irl.use_outcome, c.steps, how["resume"]) for c, how in trained]
    assert told == [("value", False, 3, True), ("value", True, 3, False)]
    second = json.loads(output.read_text())
    names = [row["model"] for row in second["figures"]["others"]["rows"]]
    assert names[-1] == LENGTH
    assert "PRM, value, outcomes, 3 updates" in names
    # The figures of what did not change are the same.
    assert second["figures"]["others"]["rows"][: 2 * len(AGGREGATES)] == others["rows"][: 2 * len(AGGREGATES)]
    text = output.with_suffix(".md").read_text()
    assert "| PRM, value, 3 updates | last step |" in text
    assert "79 solutions of four other models" in text


def test_solutions_are_written_as_gsm8k_writes_them(arguments):
    rows = gsm8k.read(Path(arguments[arguments.index("--folder") + 1]) / "others_rows.jsonl")
    assert all("<<" not in row["response"] and "\n#### " in row["response"] for row in rows)


def scored(name="model", seed=0, problems=12):
    """Solutions of two generators, one of which is better and scores higher, and of a human."""
    rng, rows = random.Random(seed), []
    for problem in range(problems):
        for generator in ("good", "good", "bad", "bad", "human"):
            right = generator == "human" or rng.random() < (0.7 if generator == "good" else 0.2)
            reward = rng.gauss(0, 1) + 2 * (generator == "good") + 9 * (generator == "human")
            tokens = [reward] * rng.randrange(1, 5)
            rows.append(
                {
                    "problem": problem,
                    "generator": generator,
                    "right": right,
                    "rewards": tokens,
                    "step_scores": tokens[:1],
                }
            )
    return Scored.of(name, rows)


def test_figures_are_those_of_their_definition():
    one = scored()
    rows = {(row["model"], row["aggregate"]): row for row in figures([one], resamples=200)["rows"]}
    assert len(rows) == len(AGGREGATES) + 1
    values, right, other = one.scores["last step"], one.right, ~one.human

    def share(values, mask):
        return auroc(values[mask & ~right].tolist(), values[mask & right].tolist())

    def within(values):
        shares = []
        for problem in range(12):
            mask = other & (one.problem == problem)
            if 0 < right[mask].sum() < mask.sum():
                shares.append(share(values, mask))
        return np.mean(shares)

    row = rows["model", "last step"]
    centred = values.copy()
    for generator in range(3):
        centred[one.generator == generator] -= values[one.generator == generator].mean()
    assert row["pooled"]["value"] == pytest.approx(share(values, other))
    assert row["within"]["value"] == pytest.approx(within(values))
    assert row["pooled_centred"]["value"] == pytest.approx(share(centred, other))
    assert row["within_centred"]["value"] == pytest.approx(within(centred))
    assert row["human_first"]["value"] == 1.0
    assert row["pooled"]["low"] < row["pooled"]["value"] < row["pooled"]["high"]
    # Who wrote a solution tells most of whether it is right; without that there is nothing left here.
    assert row["pooled"]["value"] > 0.65
    assert abs(row["pooled_centred"]["value"] - 0.5) < 0.15
    assert rows[LENGTH, ""]["length_correlation"] == pytest.approx(-1)


def test_the_bootstrap_draws_whole_problems():
    one = scored(problems=5)
    result = figures([one], seed=3, resamples=40)["rows"][3]["pooled"]
    spread = []
    for drawn in np.random.default_rng(3).integers(5, size=(40, 5)):
        at = np.concatenate([np.flatnonzero((one.problem == p) & ~one.human) for p in drawn])
        values, right = one.scores["last step"][at], one.right[at]
        if right.any() and not right.all():
            spread.append(auroc(values[~right].tolist(), values[right].tolist()))
    assert [result["low"], result["high"]] == pytest.approx(np.percentile(spread, [2.5, 97.5]).tolist())


def test_a_kind_without_pairs_has_no_figure():
    rows = [{"problem": 0, "generator": "a", "right": True, "rewards": [0.5, i], "step_scores": [i]} for i in (1, 2)]
    row = figures([Scored.of("model", rows)], resamples=5)["rows"][0]
    assert (row["pooled"], row["within"], row["human_first"]) == (None, None, None)
    # All are of the same length.
    assert row["length_correlation"] is None


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """``example(system)`` has the shell run examples/gsm8k.sh with a `repirl` that only writes down how it is called;
    returns the folder and the calls."""
    place = tmp_path_factory.mktemp("example")
    make_tiny(place / "model")
    make_data(place)
    (place / "data").mkdir()
    for name in ("train", "test"):
        shutil.copy(place / "train.jsonl", place / "data" / f"{name}.jsonl")
    # `export` leaves a policy, as the script looks for one.
    (place / "bin").mkdir()
    stub = place / "bin" / "repirl"
    stub.write_text(
        f"#!/bin/sh\nprintf '%s\\0' \"$@\" >> '{place}/calls'; printf '\\0' >> '{place}/calls'\n"
        '[ "$1" = export ] && mkdir -p "$5/policy"\nexit 0\n'
    )
    stub.chmod(0o755)
    sizes = {"SFT_SOLUTIONS": 8, "PROBLEMS": 4, "HELD_OUT": 3, "SFT_UPDATES": 1, "TURNS": 2, "SAMPLES": 2, "TOKENS": 12}
    sizes |= {"EVALUATED": 2, "MODEL": place / "model", "DATA": place / "data"}
    sizes["PATH"] = f"{place / 'bin'}:{os.environ['PATH']}"
    environment = {name: str(value) for name, value in sizes.items()}

    def call(system):
        (place / "calls").unlink(missing_ok=True)
        folder = place / "example"
        subprocess.run(["sh", SCRIPT, folder], env=environment | {"SYSTEM": system}, check=True, capture_output=True)
        calls = [part.split("\0") for part in (place / "calls").read_text().removesuffix("\0\0").split("\0\0")]
        return folder, calls

    return call


def test_the_example_runs(example, capsys):
    folder, calls = example("repirl")
    shutil.rmtree(folder / "sft-out")
    shutil.rmtree(folder / "out")
    told = [words[0] for words in calls]
    assert told == ["train", "export", "train", "export", "report", "sample", "score", "rerank", "eval", "eval"]
    for words in calls:
        assert main(words) == 0, words
    assert "best of N" in capsys.readouterr().out
    rows = gsm8k.read(folder / "scored.jsonl")
    assert len(rows) == 6
    assert all(len(row["rewards"]) >= len(row["step_scores"]) > 0 for row in rows)

    # The PRM alone: with the same SFT model, other calls in between.
    shutil.rmtree(folder / "run")
    _, calls = example("prm-offline")
    assert [words[0] for words in calls[:4]] == ["train", "export", "sample", "train"]
    for words in calls[2:4]:
        assert main(words) == 0, words
