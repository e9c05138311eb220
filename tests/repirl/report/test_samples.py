"""Kept responses: what a row says, and files that are rotated, resumed and read."""

import errno
import json
import os
from pathlib import Path

import pytest
from tiny import make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from repirl.data.prompts import Prompt
from repirl.data.split import decode
from repirl.models import load_tokenizer
from repirl.report.log import LogError, MetricsLogger
from repirl.report.samples import (
    OLDER_FILES,
    SampleFiles,
    Scored,
    as_texts,
    is_sample,
    read_samples,
    sample_files,
    sample_row,
    token_texts,
)
from repirl.rollout.engine import Response


def row(step, text="x"):
    return {
        "step": step,
        "kind": "train",
        "index": 0,
        "prompt": "p",
        "response": text,
        "token_texts": [text],
        "token_rewards": None,
        "token_logprobs": [-1.0],
        "outcome": None,
        "length": 1,
        "end_reason": "end",
    }


def files(folder, start_step=0, max_mb=1e-3):
    return SampleFiles(folder, max_mb=max_mb, start_step=start_step)


def write(kept, steps):
    """Rows of about 300 bytes: three in a file of a kilobyte."""
    for step in steps:
        kept.append([row(step, "x" * 50)])
    kept.close()


def contents(folder):
    return {path.name: [json.loads(line)["step"] for line in path.open()] for path in sample_files(folder)}


def test_a_row_says_what_was_sampled_and_what_was_made_of_it(tmp_path):
    tokenizer = load_tokenizer(str(make_model(tmp_path / "model")))
    ids = tokenizer("3+4=7").input_ids
    response = Response([*ids, tokenizer.eos_token_id], [-0.5] * len(ids) + [float("-inf")], ended=True)
    rewards = [1 / 3] * len(ids) + [float("nan")]
    made = sample_row(3, "train", Prompt(8, tuple(ids), "7"), Scored(response, 1.0, rewards), tokenizer)
    assert made == {
        "step": 3,
        "kind": "train",
        "index": 8,
        "prompt": "3+4=7",
        "response": "3+4=7",
        "token_texts": ["3", "+", "4", "=", "7", "<eos>"],
        "token_rewards": [0.333333] * 5 + [None],
        "token_logprobs": [-0.5] * 5 + [None],
        "outcome": 1.0,
        "length": 6,
        "end_reason": "end",
    }
    assert is_sample(json.loads(json.dumps(made, allow_nan=False)))
    cut = sample_row(
        0, "eval", Prompt(0, (3,), None), Scored(Response(ids, [0.0] * 5, False), float("nan"), None), tokenizer
    )
    assert (cut["end_reason"], cut["outcome"], cut["token_rewards"]) == ("length", None, None)
    assert is_sample(cut)


def byte_tokenizer():
    """One token for each byte, as of any tokenizer where a character is rare."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def test_texts_of_tokens_are_the_text_where_characters_have_several_tokens():
    tokenizer, text = byte_tokenizer(), "a √2 ≤ 👍é"
    ids = tokenizer(text).input_ids
    texts = token_texts(ids, tokenizer)
    assert len(texts) == len(ids) > len(text)
    assert "".join(texts) == text
    assert texts[:5] == ["a", " ", "", "", "√"]
    # A response may be cut off within a character, or hold bytes that are no text at all.
    assert "".join(token_texts(ids[:-1], tokenizer)) == decode(ids[:-1], tokenizer)
    stray = tokenizer("é").input_ids[-1:] * 9
    assert len(token_texts(stray, tokenizer)) == 9
    assert token_texts([], tokenizer) == []


def test_files_are_rotated_and_the_oldest_is_removed(tmp_path):
    write(files(tmp_path), range(1, 9))
    assert contents(tmp_path) == {"samples.2.jsonl": [1, 2, 3], "samples.1.jsonl": [4, 5, 6], "samples.jsonl": [7, 8]}
    assert [one["step"] for one in read_samples(tmp_path)] == list(range(1, 9))
    write(files(tmp_path, start_step=8), range(9, 30))
    assert len(sample_files(tmp_path)) == 1 + OLDER_FILES
    assert [one["step"] for one in read_samples(tmp_path)] == list(range(16, 30))
    # One step alone may be more than a file should have.
    kept = files(tmp_path, max_mb=1e-6)
    kept.append([row(1), row(1)])
    kept.append([row(2)])
    kept.close()
    assert contents(tmp_path) == {"samples.1.jsonl": [1, 1], "samples.jsonl": [2]}


@pytest.mark.parametrize("stop", range(1, 9))
def test_a_resumed_run_ends_with_the_files_of_the_uninterrupted_one(tmp_path, stop):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    write(files(whole), range(1, 12))
    write(files(resumed), range(1, 9))
    with open(resumed / "samples.jsonl", "a") as file:
        file.write('{"step": 9, "ki')
    write(files(resumed, start_step=stop), range(stop + 1, 12))
    assert contents(resumed) == contents(whole)
    assert all((resumed / path.name).read_bytes() == path.read_bytes() for path in sample_files(whole))
    # A new run in the folder begins with none, and other files stay.
    (resumed / "samples.mine.jsonl").write_text("")
    files(resumed)
    assert [path.name for path in resumed.iterdir()] == ["samples.mine.jsonl"]


def test_a_kill_between_renames_loses_nothing(tmp_path):
    write(files(tmp_path), range(1, 9))
    (tmp_path / "samples.2.jsonl").rename(tmp_path / "samples.3.jsonl")
    (tmp_path / "samples.1.jsonl").rename(tmp_path / "samples.2.jsonl")
    (tmp_path / "samples.jsonl").rename(tmp_path / "samples.1.jsonl")
    write(files(tmp_path, start_step=8), [9])
    assert [one["step"] for one in read_samples(tmp_path)] == list(range(1, 10))
    assert [path.name for path in sample_files(tmp_path)] == ["samples.2.jsonl", "samples.1.jsonl", "samples.jsonl"]


def test_a_full_disk_ends_the_run_with_the_way_out(tmp_path, monkeypatch):
    kept = files(tmp_path)
    kept.append([row(1)])
    before = (tmp_path / "samples.jsonl").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(LogError, match=r"sampled responses cannot be written to .*samples.jsonl': No space left"):
            kept.append([row(2)])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full)
        with pytest.raises(LogError, match="make room on that disk, and go on from the newest checkpoint"):
            kept.append([row(2, "x" * 1000)])
    kept.close()
    assert (tmp_path / "samples.jsonl").read_bytes() == before


def test_lines_that_are_no_rows_are_left_out(tmp_path, caplog):
    bad = [row(1) | {"length": 2}, row(1) | {"kind": "x"}, {"step": 1}, row(1) | {"token_rewards": [1, 2]}]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [row(1), *bad]))
    assert read_samples(tmp_path) == [row(1)]
    assert "lines 2, 3, 4, 5 cannot be read as sampled responses" in caplog.text
    assert read_samples(tmp_path / "nothing") == []


def test_tensorboard_shows_a_few_as_text(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = [row(1, f"answer {i}\n# not a heading") for i in range(4)]
    with MetricsLogger(tmp_path, tensorboard=True) as logger:
        logger.log(1, {"x": 1.0}, as_texts(rows))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["tensors"]) == ["samples/train_0", "samples/train_1"]
    assert events.PluginTagToContent("text").keys() == {"samples/train_0", "samples/train_1"}
    [event] = events.Tensors("samples/train_1")
    assert event.step == 1
    assert event.tensor_proto.string_val == [
        b"outcome None, 1 tokens, end: end\n\n    p\n\n    answer 1\n    # not a heading"
    ]
