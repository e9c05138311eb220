"""Exports on the hub: which repositories, who may read them, and what is said where it does not work. No network."""

import json
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from repirl import hub
from repirl.apps import export_commands
from repirl.cli import main
from repirl.config import ConfigError, RunError


class Hub:
    """What is on the hub, by name of a repository: {"private": ..., "files": [...]}. Stands in for HfApi."""

    def __init__(self):
        self.repositories, self.error = {}, None

    def whoami(self):
        if self.error is not None:
            raise self.error
        return {"name": "me"}

    def create_repo(self, name, *, private, exist_ok):
        assert exist_ok
        self.repositories.setdefault(name, {"private": private, "files": []})
        return f"https://hub.invalid/{name}"

    def repo_info(self, name):
        return SimpleNamespace(private=self.repositories[name]["private"])

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        assert "repirl" in commit_message
        self.repositories[repo_id]["files"] = sorted(file.name for file in folder_path.iterdir())


@pytest.fixture
def api(monkeypatch):
    made = Hub()
    monkeypatch.setattr(hub, "HfApi", lambda: made)
    return made


@pytest.fixture
def folders(tmp_path):
    for name in ("policy", "prm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    return [tmp_path / "policy", tmp_path / "prm"]


def status_error(status):
    # The class of responses changes with the library's releases.
    return HfHubHTTPError("no", response=SimpleNamespace(status_code=status, headers={}, request=None))


def test_each_model_gets_a_private_repository_of_its_own(api, folders):
    hub.check_push("me/mine")
    assert hub.push(folders, "me/mine") == ["https://hub.invalid/me/mine-policy", "https://hub.invalid/me/mine-prm"]
    expected = {"private": True, "files": ["config.json"]}
    assert api.repositories == {"me/mine-policy": expected, "me/mine-prm": expected}
    # Again, to what is there.
    hub.push(folders[1:], "me/mine")
    hub.push(folders, "me/other", public=True)
    assert not api.repositories["me/other-prm"]["private"]
    # Nobody publishes by accident.
    with pytest.raises(ConfigError, match="'me/other-policy' is a public repository: give --public"):
        hub.push(folders, "me/other")


@pytest.mark.parametrize("name", ["mine", "me/", "/mine", "a/b/c", "me/mi ne", "me/-x--"])
def test_names_that_the_hub_does_not_have_are_refused(api, name):
    with pytest.raises(ConfigError, match="--push-to-hub"):
        hub.check_push(name)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (LocalTokenNotFoundError("none"), ConfigError, "nobody is logged in to the hub: run `hf auth login`"),
        (OfflineModeIsEnabled("offline"), ConfigError, "HF_HUB_OFFLINE is set"),
        (status_error(401), ConfigError, r"does not let this account write 'me/mine' \(status 401\)"),
        (status_error(403), ConfigError, r"a token that may write"),
        (status_error(500), RunError, "the hub failed with status 500"),
        (ConnectionError("no route"), RunError, "the hub is not reached: .*no route"),
    ],
)
def test_what_fails_is_told_in_words(api, error, kind, message):
    api.error = error
    with pytest.raises(kind, match=message):
        hub.check_push("me/mine")


def test_nothing_is_exported_for_a_hub_that_cannot_be_used(api, tmp_path, capsys):
    api.error = LocalTokenNotFoundError("none")
    arguments = ["export", "--checkpoint", "nowhere", "--output", str(tmp_path / "out")]
    assert main([*arguments, "--push-to-hub", "me/mine"]) == 2
    assert "nobody is logged in" in capsys.readouterr().err
    assert main([*arguments, "--public"]) == 2
    assert "--public is about --push-to-hub OWNER/NAME: give both" in capsys.readouterr().err


def test_the_command_pushes_what_it_exported(api, folders, monkeypatch, capsys):
    asked = []

    def exported(checkpoint, output, **options):
        asked.append((checkpoint, options))
        return folders

    monkeypatch.setattr("repirl.export.export_checkpoint", exported)
    command = ["export", "--checkpoint", "runs/mine", "--output", "out", "--push-to-hub", "me/mine"]
    assert main(command) == 0
    assert asked == [("runs/mine", {"dtype": None, "adapter_only": False, "hub": "me/mine"})]
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == "https://hub.invalid/me/mine-prm (private)"
    assert json.loads((folders[0] / "config.json").read_text()) == {}
    assert export_commands.add_export_commands
