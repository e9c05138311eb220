"""Where commands write: inputs stay, names say what is in a file, and what cannot be written is told first."""

import os

import pytest

from repirl.apps.lines import LinesFile
from repirl.apps.output import ResumableOutput
from repirl.cli import main
from repirl.config import ConfigError
from repirl.output_path import JSON, LINES, PAGE, YAML, check_file, check_folder


def refusal(check, *arguments, **options):
    with pytest.raises(ConfigError) as error:
        check(*arguments, **options)
    return str(error.value)


def test_names_that_can_be_written_are_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("out.jsonl", "new/folder/out", "out.v2", "out.ndjson", "out.JSON", "out.txt"):
        assert check_file(name, LINES, ["in.jsonl", "owner/name:test"]) == tmp_path.joinpath(name).relative_to(tmp_path)
    (tmp_path / "page.html").write_text("old")
    assert check_file("page.html", PAGE, replaces=True).name == "page.html"
    (tmp_path / "there").mkdir()
    for name in ("there", "new/folder"):
        check_folder(name, ["results.json"], ["in.jsonl"], is_new=True)
    # Nothing is made by asking.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "there"]


@pytest.mark.parametrize(
    ("name", "holds", "better"),
    [
        ("o.csv", LINES, "o.jsonl"),
        ("o.csv.gz", LINES, "o.jsonl"),
        ("a.b.parquet", LINES, "a.b.jsonl"),
        ("o.html", LINES, "o.jsonl"),
        ("o.jsonl", JSON, "o.json"),
        ("o.md", JSON, "o.json"),
        ("o.pdf", PAGE, "o.html"),
        ("o.json", YAML, "o.yaml"),
    ],
)
def test_a_name_does_not_say_something_else(tmp_path, name, holds, better):
    said = refusal(check_file, tmp_path / name, holds)
    assert f"{name}' would hold {holds}, and its name says something else: call it '{tmp_path / better}'" in said


def test_an_input_is_never_an_output(tmp_path):
    data = tmp_path / "data" / "in.jsonl"
    data.parent.mkdir()
    data.write_text("{}\n")
    (tmp_path / "link.jsonl").symlink_to(data)
    os.link(data, tmp_path / "hard.jsonl")
    for output in (data, tmp_path / "link.jsonl", tmp_path / "hard.jsonl", data.parent / ".." / "data" / "in.jsonl"):
        for replaces in (False, True):
            said = refusal(check_file, output, LINES, ["other.jsonl", data], replaces=replaces)
            assert said == f"--output {str(output)!r} is an input, which would be lost: choose another file"
    # A file that a killed command left, and a folder whose files are all read.
    left = tmp_path / "out.jsonl.partial"
    left.write_text("{}\n")
    assert "out.jsonl.partial', which is an input" in refusal(check_file, tmp_path / "out.jsonl", LINES, [left])
    for source in (data.parent, f"{data.parent}:train"):
        assert "whose files are the input" in refusal(check_file, data.parent / "out.jsonl", LINES, [source])
    said = refusal(check_folder, data.parent, ["in.jsonl", "results.json"], [tmp_path / "link.jsonl"])
    assert "would get a 'in.jsonl' of its own, but" in said
    for make in (
        lambda: ResumableOutput(data, "it", resume=True, inputs=[data]),
        lambda: ResumableOutput(data, "it", resume=False, inputs=[data]),
        lambda: LinesFile(data),
    ):
        assert "remove" not in refusal(make)
    assert data.read_text() == "{}\n"


def test_what_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for name in (tmp_path / "file" / "out.jsonl", tmp_path / "file" / "a" / "out.jsonl"):
        assert "file' is a file, not a folder" in refusal(check_file, name, LINES)
        assert "file' is a file, not a folder" in refusal(check_folder, name)
    assert "is a file, expected a folder" in refusal(check_folder, tmp_path / "file")
    assert "exists already: choose another file" in refusal(check_file, tmp_path / "file", LINES)
    assert "holds 'file' already: choose another folder" in refusal(check_folder, tmp_path, ["file"], is_new=True)
    for name in (tmp_path, f"{tmp_path}/new/"):
        assert "is a folder, expected the name of a file" in refusal(check_file, name, LINES, replaces=True)
    assert "is a device or the like" in refusal(check_file, "/dev/null", LINES, replaces=True)
    assert "is empty" in refusal(check_file, "", LINES)
    assert "output_dir is empty" in refusal(check_folder, "", option="output_dir")
    assert "cannot be written: [Errno 36] File name too long" in refusal(check_file, "x" * 300, LINES)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "is not yours to write in" in refusal(check_file, tmp_path / "out.jsonl", LINES)


def test_commands_ask_before_they_load_anything(tmp_path, capsys):
    """Each with a model that is not there; of the input one row. What they refuse is the output."""
    rows = tmp_path / "in.jsonl"
    rows.write_text('{"prompt": "1+1=", "response": "2", "answer": "2", "problem": "p", "steps": ["a"], "label": -1}\n')
    before = rows.read_bytes()
    table, folder = tmp_path / "o.csv", tmp_path / "folder"
    folder.mkdir()
    for part in ("responses.jsonl", "steps.jsonl", "prompts.jsonl"):
        (folder / part).write_bytes(before)
    prm, model = ["--prm", str(tmp_path / "prm")], ["--model", str(tmp_path / "model")]
    to_file = {
        "score": [*prm, "--input", str(rows)],
        "localize": [*prm, "--input", str(rows)],
        "rerank": [*prm, "--input", str(rows)],
        "search": [*prm, *model, "--input", str(rows)],
        "judge": ["--verifier", "math", "--input", str(rows)],
    }
    for command, arguments in to_file.items():
        for output, said in ((rows, "is an input"), (table, "its name says something else")):
            assert main([command, *arguments, "--output", str(output)]) == 2
            told = capsys.readouterr().err
            assert said in told, (command, told)
            assert "remove" not in told
    step = ["eval", "--benchmark", "processbench", *prm, "--data", str(folder / "steps.jsonl")]
    answers = ["eval", "--benchmark", "gsm8k", "--data", str(rows)]
    policy = ["adapt", *prm, "--policy", str(tmp_path / "model"), "--prompts", str(folder / "prompts.jsonl")]
    (folder / "policy").mkdir()
    start = ["adapt", *prm, "--policy", str(folder / "policy"), "--prompts", str(rows)]
    for arguments in (step, [*answers, "--responses", str(folder / "responses.jsonl")], policy, start):
        assert main([*arguments, "--output", str(folder)]) == 2
        assert "is an input: choose another folder" in capsys.readouterr().err
        assert main([*arguments, "--output", str(rows)]) == 2
        assert "is a file, expected a folder" in capsys.readouterr().err
    assert main([*answers, *model, "--output", str(rows)]) == 2
    assert "is a file, expected a folder" in capsys.readouterr().err
    assert rows.read_bytes() == before
    assert all(path.read_bytes() == before for path in folder.iterdir() if path.is_file())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "in.jsonl"]
