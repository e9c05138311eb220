"""README and the pages of docs/: commands, configurations, code and messages are those of the program.

What can run here runs here or in the tests that are named below; of the rest (several machines, a GPU, an installation)
the commands are parsed by the real parsers.
"""

import ast
import importlib
import importlib.util
import json
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch.distributed.run
from doc_pages import PAGES, blocks, code_spans, command_lines, name, without_prefix
from shared import ROOT
from tiny import make_model, make_step_prm
from transformers import AutoTokenizer

from repirl.cli import _check_spelling, _load, main, make_parser
from repirl.config import Config
from repirl.configfile import build_config, list_presets, load_config, load_yaml, merge, parse_overrides
from repirl.rollout.vllm_server import serve_command
from repirl.systems import SYSTEMS

DOCS = ROOT / "docs"
SHELL, OTHER = ("bash", "sh"), ("python", "yaml", "json", "text", "")
# Commands of a shell, of installations and of other programs, which are not tried; where they are, it says.
ELSEWHERE = {
    *("set", "export", "kill", "wait", "source", "pip", "git"),
    "curl",  # tests/repirl/apps/test_server.py
    ".venv/bin/pre-commit",
}
TAKES_CONFIGURATION = {"train", "plan", "eval", "label", "sample", "config"}


@cache
def readme_configuration() -> dict:
    [text] = [block.text for block in blocks(ROOT / "README.md") if block.text.startswith("# my.yaml")]
    return load_yaml(text)


@pytest.fixture(scope="module")
def my_yaml(tmp_path_factory):
    path = tmp_path_factory.mktemp("docs") / "my.yaml"
    path.write_text(json.dumps(readme_configuration()))
    return path


def check_repirl(words: list[str], my_yaml: Path) -> None:
    if not words or words[0].startswith("--"):
        words = words or ["--help"]
    if words[0] in ("bench", "--help", "--version"):  # repirl bench: tests/bench
        return
    options, overrides = make_parser().parse_known_args(words)
    _check_spelling(options, overrides)
    names = [word[2:].partition("=")[0] for word in overrides if word.startswith("--")]
    assert all(n == "preset" or n.partition(".")[0] in Config.model_fields for n in names), names
    if options.command not in TAKES_CONFIGURATION or getattr(options, "benchmark", None):
        parse_overrides(overrides)
    elif getattr(options, "config", None) or "preset" in names:
        if getattr(options, "config", None):
            options.config = str(my_yaml)
        _load(options, overrides)
    else:
        load_config(my_yaml, overrides)


def check_python(words: list[str]) -> None:
    if words[0] == "-c":
        compile(words[1], "-c", "exec")
    elif words[0] == "-m" and words[1] == "pytest":
        assert (ROOT / words[2]).exists(), words
    elif words[0] == "-m":
        assert importlib.util.find_spec(words[1]) is not None, words
    else:
        assert (ROOT / words[0]).is_file(), words


def check_vllm(words: list[str]) -> None:
    if "pooling" in words:  # tests/repirl/apps/test_server.py, tests/vllm/test_vllm_pooling.py
        return
    given = {option: words[words.index(f"--{option}") + 1] for option in ("dtype", "max-model-len", "host", "port")}
    arguments = {key.replace("-", "_"): int(value) if value.isdigit() else value for key, value in given.items()}
    expected = serve_command(words[2], **arguments)
    assert words[: len(expected)] == expected


def check_command(words: list[str], my_yaml: Path, *, strict: bool) -> None:
    """strict: an unknown command is an error; otherwise the line may be a formula."""
    words = without_prefix(words)
    if not words:
        return
    program = words[0].removeprefix(".venv/bin/").removeprefix(".venv-integrations/bin/")
    if program == "repirl":
        check_repirl(words[1:], my_yaml)
    elif program == "torchrun":
        words = ["0" if word == "$SLURM_NODEID" else word for word in words]
        options = torch.distributed.run.get_args_parser().parse_args(words[1:])
        assert options.module
        assert options.training_script == "repirl.cli"
        check_repirl(options.training_script_args, my_yaml)
    elif program == "python":
        check_python(words[1:])
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets), words
    elif program == "vllm":
        check_vllm(words)
    elif program == "bash":
        for line in command_lines(words[2]):
            check_command(line, my_yaml, strict=True)
    elif strict and words[0] not in ELSEWHERE:
        raise AssertionError(f"no test knows what to do with {words}")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_are_those_of_the_program(page, my_yaml):
    for block in blocks(page):
        if block.language in SHELL:
            syntax = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True)
            assert syntax.returncode == 0, syntax.stderr
        if block.language in SHELL or block.language is None:
            for words in command_lines(block.text):
                check_command(words, my_yaml, strict=block.language is not None)
        else:
            assert block.language in OTHER, block.language


def test_torchrun_takes_the_signals_that_the_pages_say(monkeypatch):
    for page in (ROOT / "README.md", DOCS / "distributed.md"):
        [signals] = re.findall(r"PET_SIGNALS_TO_HANDLE=([A-Z0-9,]+)", page.read_text(encoding="utf-8"))
        monkeypatch.setenv("PET_SIGNALS_TO_HANDLE", signals)
        options = torch.distributed.run.get_args_parser().parse_args(["-m", "repirl.cli"])
        assert options.signals_to_handle == signals
        assert "SIGUSR1" in signals


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_inside_the_text_exist(page, my_yaml):
    parser = make_parser()
    [commands] = [action.choices for action in parser._actions if action.dest == "command"]
    for span in code_spans(page):
        words = span.split()
        if words[:1] == ["repirl"] and len(words) > 1 and words[1].islower():
            assert words[1] in commands, span
            if words[1] == "bench":  # It has a parser of its own; tests/bench.
                continue
            known = {option for action in commands[words[1]]._actions for option in action.option_strings}
            for word in words[2:]:
                option = word.rstrip(",.;)").partition("=")[0]
                if option.startswith("--"):
                    field = option[2:].partition(".")[0]
                    assert option in known or field in {*Config.model_fields, "preset"}, span
        elif words[:1] == ["make"] and len(words) == 2:
            check_command(words, my_yaml, strict=True)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_other_blocks_are_what_they_say(page):
    for block in blocks(page):
        if block.language == "yaml":
            values = load_yaml(block.text)
            build_config(values if "output_dir" in values else merge(readme_configuration(), values))
        elif block.language == "json":
            for line in block.text.splitlines():
                json.loads(line)
        elif block.language == "python":
            for node in ast.walk(ast.parse(block.text)):
                # Others are of packages that need not be here; tests/integrations runs those blocks.
                if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("repirl", "repirl_kernels"):
                    module = importlib.import_module(node.module)
                    assert all(hasattr(module, alias.name) for alias in node.names), block.text


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_to_files_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert "://" in target or (page.parent / target).exists(), target


def test_the_start_is_one_command_each(tmp_path, monkeypatch, capsys):
    """Install, first result, first run: the third one is tried on a tiny model, as far as --dry-run goes."""
    shell = [block for block in blocks(DOCS / "index.md") if block.language == "bash"]
    commands = [list(command_lines(block.text)) for block in shell]
    assert [len(lines) for lines in commands] == [1, 1, 1]
    (install,), (demo,), (train,) = commands
    assert (install, demo, train[:2]) == (["make", "install"], ["make", "demo"], [".venv/bin/repirl", "train"])
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "MODEL")
    tokenizer = AutoTokenizer.from_pretrained("MODEL")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained("MODEL")
    [row] = [block.text for block in blocks(DOCS / "index.md") if block.language == "json"]
    Path("my.jsonl").write_text(row.strip() + "\n")
    assert main([*train[1:], "--dry-run"]) == 0, capsys.readouterr().err
    assert "experts: 1 trajectories" in capsys.readouterr().out


def test_the_sandbox_page_runs(capsys):
    [block] = [block for block in blocks(DOCS / "sandbox.md") if block.language == "python"]
    exec(compile(block.text, "docs/sandbox.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[1:] == ["42", "", "[2]", "ok"]


def test_the_page_of_prms_runs(tmp_path, monkeypatch):
    [block] = [block for block in blocks(DOCS / "prm.md") if block.language == "python"]
    folder = tmp_path / "runs" / "tour" / "out"
    folder.mkdir(parents=True)
    assert make_step_prm(folder).name == "prm"
    monkeypatch.chdir(tmp_path)
    values: dict = {}
    exec(compile(block.text, "docs/prm.md", "exec"), values)
    # One reward a character but for "; " and "#### ", and one of the end token.
    assert values["rewards"][0].shape == (29,)


def test_the_page_of_prms_has_the_commands_of_the_tour():
    """In their order, and with the same options; its outputs are those of `make tour`."""
    script = (ROOT / "examples" / "tour.sh").read_text(encoding="utf-8").replace("$HELD_OUT", "$T/data/eval.jsonl")
    tour = [words for words in command_lines(script) if words[0] in ("repirl", "python") and words[1] != "-c"]
    shell = [block for block in blocks(DOCS / "prm.md") if block.language == "bash"]
    page = [words for block in shell for words in command_lines(block.text) if words[0] in ("repirl", "python")]
    assert page == [words for words in tour if words[1] != "signal"]


def test_every_system_and_preset_is_on_the_page_of_systems():
    text = (DOCS / "systems.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w-]+)`", text))
    assert set(SYSTEMS) <= named
    assert {preset for preset in list_presets() if "code" not in preset} <= named


def test_the_table_of_features_is_whole():
    """A mark or a word in each cell, and where and when each package was looked at."""
    text = (DOCS / "features.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows if "---" not in row]
    heads = [row for row in table if not row[0]]
    assert heads == [["", "repirl", "TRL", "verl", "prime-rl", "OpenRLHF", "Liger"]] * 4
    features = [row for row in table if row[0]]
    assert {len(row) for row in features} == {7}
    assert len(features) > 20
    assert all(all(row) for row in features)
    assert re.search(r"20\d\d-\d\d-\d\d", text)
    for package in ("TRL 1.16.0", "verl 0.9.1", "OpenRLHF 0.11.2", "Liger 0.8.5", "prime-rl"):
        assert package in text


@cache
def texts_of_the_program() -> tuple[str, ...]:
    """Every text in the source, with … for what is filled in."""
    texts = []
    for file in sorted((ROOT / "repirl").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub(r"%[sd]", "…", node.value))
    return tuple(texts)


def is_message(span: str) -> bool:
    """Of the code on the page, what is long enough to be no option, and no command."""
    return len(span.split()) >= 5 and span.split()[0] not in ("repirl", "python")


def in_order(parts: list[str], text: str) -> bool:
    place = 0
    for part in parts:
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


MESSAGES = [span for span in code_spans(DOCS / "troubleshooting.md") if is_message(span)]


def test_there_are_messages_on_the_page():
    assert len(MESSAGES) > 40


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_are_those_of_the_program(message):
    parts = [part.strip() for part in message.split("…")]
    assert any(in_order(parts, text) for text in texts_of_the_program())
