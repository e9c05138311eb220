"""Exported folders on the Hugging Face hub, through its own library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from repirl.config import ConfigError, RunError, first_line

# What the library raises where there is no network: an error of its HTTP package, which changes with its releases.
UNREACHED: Any = (OSError, *HfHubHTTPError.__bases__)


def repository(name: str, part: str) -> str:
    """The repository of an exported model: OWNER/NAME-policy or OWNER/NAME-prm."""
    return f"{name}-{part}"


def check_push(name: str) -> None:
    """See that something can be pushed under this name, before minutes of export.

    Args:
        name: OWNER/NAME.

    Raises:
        ConfigError: the name cannot be one of the hub, nobody is logged in, or the hub is switched off.
        RunError: the hub is not reached.
    """
    owner, slash, rest = name.partition("/")
    if not (owner and slash and rest) or "/" in rest:
        raise ConfigError(f"--push-to-hub is {name!r}, expected OWNER/NAME; models go to OWNER/NAME-prm and -policy")
    with _explained(name):
        validate_repo_id(repository(name, "policy"))
        HfApi().whoami()


def push(folders: Sequence[Path], name: str, *, public: bool = False) -> list[str]:
    """Upload exported models, each to a repository of its own, which is made where it is missing.

    Args:
        folders: `policy` and `prm`, or one of them.
        name: OWNER/NAME.
        public: whether everybody may read them. False: new repositories are private, and a public one is refused.

    Returns:
        The address of each.

    Raises:
        ConfigError: they may not be written, or are public and should not be.
        RunError: the hub is not reached, or fails.
    """
    api: Any = HfApi()
    names = [repository(name, folder.name) for folder in folders]
    with _explained(name):
        urls = [str(api.create_repo(repo, private=not public, exist_ok=True)) for repo in names]
        for repo in names if not public else []:
            # What was there already stays as it was.
            if not api.repo_info(repo).private:
                raise ConfigError(f"{repo!r} is a public repository: give --public if everybody may read the model")
        for repo, folder in zip(names, folders, strict=True):
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a model trained by repirl")
    return urls


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except HFValidationError as error:
        raise ConfigError(f"--push-to-hub {name!r} cannot be a name on the hub: {first_line(error)}") from error
    except LocalTokenNotFoundError as error:
        raise ConfigError("nobody is logged in to the hub: run `hf auth login`, or set HF_TOKEN") from error
    except OfflineModeIsEnabled as error:
        raise ConfigError("HF_HUB_OFFLINE is set, so nothing can be pushed: unset it") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise ConfigError(
                f"the hub does not let this account write {name!r} (status {status}): log in by `hf auth login` with a "
                f"token that may write: {first_line(error)}"
            ) from error
        raise RunError(f"the hub failed with status {status}: {first_line(error)}") from error
    except UNREACHED as error:
        raise RunError(f"the hub is not reached: {first_line(error)}") from error
