"""Completion: what a shell offers after a beginning of a command line."""

import shutil
import subprocess

import pytest

from repirl.cli import main
from repirl.completion import SHELLS

COMPLETE = {
    "bash": """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_repirl
printf '%s\\n' "${COMPREPLY[@]}"
""",
    "fish": """
source $argv[1]
complete -C (string join -- ' ' $argv[2..]) | string replace -r '\\t.*' ''
true
""",
}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """Folder with a script for each shell, by its name."""
    folder = tmp_path_factory.mktemp("completion")
    for shell in SHELLS:
        with pytest.MonkeyPatch.context() as patch:
            lines = []
            patch.setattr("repirl.apps.help_commands.show", lines.append)
            assert main(["completion", shell]) == 0
            (folder / shell).write_text("\n".join(lines) + "\n")
    return folder


def offered(shell, script, *words):
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    command = [shell, "-c", COMPLETE[shell], "bash" if shell == "bash" else "--"]
    done = subprocess.run([*command, str(script), *words], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.split()


@pytest.mark.parametrize("shell", ["bash", "fish"])
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["repirl", "pla"], {"plan"}),
        (["repirl", "train", "--policy.optimizer.l"], {"--policy.optimizer.lr"}),
        (["repirl", "train", "--prm.reward", "so"], {"soft_q"}),
        (["repirl", "train", "--prm.optimizer.schedule", ""], {"constant", "linear", "cosine"}),
        (["repirl", "eval", "--preset", "paper-m"], {"paper-math-3b"}),
        (["repirl", "train", "--resu"], {"--resume"}),
        (["repirl", "export", "--dtype", "b"], {"bfloat16"}),
        # Commands without a configuration have no options of it.
        (["repirl", "export", "--policy"], set()),
        (["repirl", "completion", "z"], {"zsh"}),
    ],
)
def test_words_that_may_come_next_are_offered(shell, scripts, words, expected):
    assert set(offered(shell, scripts / shell, *words)) == expected


def test_bash_takes_values_behind_an_equals_sign(scripts):
    assert offered("bash", scripts / "bash", "repirl", "train", "--prm.reward", "=", "logp") == ["logprob"]
    assert set(offered("bash", scripts / "bash", "repirl", "train", "--prm.reward", "=")) >= {"value", "logit"}


def test_zsh_reads_its_script(scripts):
    if shutil.which("zsh") is None:
        pytest.skip("there is no zsh")
    subprocess.run(["zsh", "-n", str(scripts / "zsh")], check=True, timeout=60)


def test_other_shells_are_refused(capsys):
    assert main(["completion", "tcsh"]) == 2
    assert "no completion for 'tcsh', expected one of bash, zsh, fish" in capsys.readouterr().err
