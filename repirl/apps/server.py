"""`repirl score --server`: the rewards of an exported `value` PRM that a vLLM server computes (POST /pooling).

Token ids are sent, and the raw value at each of them comes back. That the server serves the PRM whose texts and steps
are known here, and gives its rewards as they are, is checked by the probe that the export holds (repirl.serving).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shlex
import time
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerBase

from repirl.apps.trained import Placed
from repirl.checkpoint.fingerprints import fingerprint_model
from repirl.config import ConfigError, RunError
from repirl.models import load_tokenizer, quiet_transformers
from repirl.prm import PRMDescription, Scorer, read_description
from repirl.serving import Probe, read_probe, serve_command

# How often a request is made where the server is not there, or says that it cannot answer now, and the wait after the
# first time, in seconds; it doubles.
ATTEMPTS, FIRST_WAIT = 4, 0.5
BUSY = (429, 500, 502, 503, 504)
# How far the probe's rewards may be from the export's: in float32, and in a shorter type as a share of their range.
EXACT, ROUNDED = 1e-3, 0.1
# The variable that `vllm serve` takes its key from, too.
KEY = "VLLM_API_KEY"


@dataclass(frozen=True)
class Server:
    """Where a PRM is served.

    Args:
        url: such as http://127.0.0.1:8000. Where there is an environment variable VLLM_API_KEY, it is sent as the key.
        timeout_seconds: how long an answer may take.
    """

    url: str
    timeout_seconds: float = 300.0

    def __post_init__(self) -> None:
        parsed = urllib.parse.urlsplit(self.url)
        if parsed.scheme not in ("http", "https") or not parsed.hostname:
            raise ConfigError(f"--server is {self.url!r}, expected an address such as http://127.0.0.1:8000")
        if not self.timeout_seconds > 0:
            raise ConfigError(f"--server-timeout is {self.timeout_seconds:g}, expected seconds above 0")

    def models(self) -> dict[str, Any]:
        """What it serves: the first entry of /v1/models, with `id`, `root` and `max_model_len`."""
        answer = self._ask("GET", "/v1/models", None)
        try:
            first = answer["data"][0]
            return {"id": str(first["id"]), "root": first.get("root"), "max_model_len": first.get("max_model_len")}
        except (LookupError, TypeError, AttributeError) as error:
            raise self._strange("/v1/models", answer) from error

    def values(self, model: str, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """The raw value at each token of each sequence, [T] float32.

        Raises:
            RunError: it does not answer, or not with one number for each token.
        """
        request = {"model": model, "input": [list(ids) for ids in sequences]}
        answer = self._ask("POST", "/pooling", request | {"task": "token_classify", "use_activation": False})
        try:
            rows = [entry["data"] for entry in sorted(answer["data"], key=lambda entry: entry["index"])]
            values = [torch.tensor(row, dtype=torch.float32) for row in rows]
        except (LookupError, TypeError, ValueError) as error:
            raise self._strange("/pooling", answer) from error
        if len(values) != len(sequences):
            raise RunError(f"{self.name} gave values of {len(values)} sequences for {len(sequences)}")
        for ids, value in zip(sequences, values, strict=True):
            if value.shape not in ((len(ids), 1), (len(ids),)):
                raise RunError(
                    f"{self.name} gave values of shape {list(value.shape)} for {len(ids)} tokens, expected one for "
                    f"each token: {self._start()}"
                )
        return [value.flatten() for value in values]

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"the server at {self.url}"

    def _strange(self, path: str, answer: Any) -> RunError:
        shown = json.dumps(answer)[:200]
        return RunError(f"{self.name} answers {path} with {shown}, which a vLLM server does not: is it one?")

    def _start(self, prm: str = "PRM", dtype: str = "float32") -> str:
        return f"start it by: {shlex.join(serve_command(prm, dtype))}"

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """The answer to a request, which is made ATTEMPTS times at most."""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
            try:
                status, content = self._once(method, path, body)
            except TimeoutError as error:
                # To ask again would give it twice the work.
                raise RunError(
                    f"{self.name} did not answer {path} within {self.timeout_seconds:g} s: give it longer by "
                    "--server-timeout, or less at once by --tokens"
                ) from error
            except (OSError, http.client.HTTPException) as error:
                problem = f"{self.name} is not there ({error or type(error).__name__}): {self._start()}"
                continue
            if status == 200:
                break
            problem = f"{self.name} answers {path} with status {status}: {_message(content)}"
            if status == 401:
                problem += f"; give its key in the environment variable {KEY}"
            elif status == 404:
                problem += f"; {self._start()}"
            if status not in BUSY:
                raise RunError(problem)
        else:
            raise RunError(f"{problem} (asked {ATTEMPTS} times)")
        try:
            return json.loads(content)
        except ValueError as error:
            raise self._strange(path, content.decode(errors="replace")) from error

    def _once(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, bytes]:
        parsed = urllib.parse.urlsplit(self.url)
        kind = http.client.HTTPSConnection if parsed.scheme == "https" else http.client.HTTPConnection
        connection = kind(parsed.hostname or "", parsed.port, timeout=self.timeout_seconds)
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, parsed.path.rstrip("/") + path, content, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


def _message(content: bytes) -> str:
    """What an error's answer says."""
    text = content.decode(errors="replace")
    with contextlib.suppress(ValueError, LookupError, TypeError):
        text = json.loads(text)["error"]["message"]
    return str(text).strip()[:300] or "nothing"


@dataclass(frozen=True)
class ServedPRM(Scorer):
    """A PRM whose rewards a server computes. model: what the server calls it · window: see Scorer."""

    server: Server
    model: str
    tokenizer: PreTrainedTokenizerBase
    description: PRMDescription
    window: int | None

    def rewards(self, pairs: Sequence[tuple[Any, Any]]) -> list[Tensor]:
        """As Scorer. RunError where the server does not answer as it should."""
        values = self.server.values(self.model, [[*prompt, *response] for prompt, response in pairs])
        return [value[len(prompt) :] for (prompt, _), value in zip(pairs, values, strict=True)]


def served_prm(
    name: str | os.PathLike | None, server: Server, placed: Placed | None = None
) -> tuple[ServedPRM, dict[str, str]]:
    """The PRM that a server serves, after it was seen to be this one.

    Args:
        name: the exported PRM here, a folder or hub id, of which no weights are loaded; None for the name by which the
            server itself found it, which does for a server on this machine.
        server: where it is served.
        placed: `dtype` is the type that the server computes in; of the rest nothing may be chosen.

    Returns:
        The PRM, and the fingerprint of the model.

    Raises:
        ConfigError: it is no PRM that a server can serve, or the server serves another one.
        RunError: the server does not answer as it should.
    """
    quiet_transformers()
    placed = placed or Placed()
    refused = {"--device": placed.device, "--reference": placed.reference, "--convention": placed.convention}
    for option, value in refused.items():
        if value is not None:
            raise ConfigError(f"{option} {value}: the server at {server.url} computes the rewards, leave it out")
    serves = server.models()
    prm = os.fspath(name) if name is not None else serves["root"]
    if not isinstance(prm, str):
        raise ConfigError(f"{server.name} does not say which model it serves: give --prm DIR")
    description = _described(prm)
    _check(server, serves["id"], prm, read_probe(prm), placed.dtype)
    windows = [serves["max_model_len"], getattr(AutoConfig.from_pretrained(prm), "max_position_embeddings", None)]
    window = min((size for size in windows if isinstance(size, int)), default=None)
    served = ServedPRM(server, serves["id"], load_tokenizer(prm), description, window)
    return served, {"prm": fingerprint_model(prm), "computed by": f"a server, in {placed.dtype}"}


def _described(prm: str) -> PRMDescription:
    description = read_description(prm)
    if description is None:
        raise ConfigError(f"{prm!r} does not say how its rewards are read: give an exported PRM by --prm")
    if description.reward != "value":
        raise ConfigError(
            f"{prm!r} has rewards of kind {description.reward!r}, which are read off logits, and a server gives "
            "rewards of kind 'value' only: score without --server"
        )
    return description


def _check(server: Server, model: str, prm: str, probe: Probe, dtype: str) -> None:
    """ConfigError where the server's rewards of the probe are not the export's."""
    values = server.values(model, [probe.token_ids])[0][1:]
    wanted = torch.tensor(probe.rewards)
    allowed = EXACT * max(1.0, float(wanted.abs().max()))
    if dtype != "float32":
        allowed += ROUNDED * float(wanted.max() - wanted.min())
    off = values - wanted
    if bool((off.abs() <= allowed).all()):
        return
    restart = shlex.join(serve_command(prm, dtype))
    if bool(((values - wanted.sigmoid()).abs() <= allowed).all()):
        raise ConfigError(f"{server.name} gives the sigmoid of rewards, not rewards: start it by: {restart}")
    if bool(((off - off.mean()).abs() <= allowed).all()):
        raise ConfigError(
            f"{server.name} gives rewards that are all larger by {float(off.mean()):g} than those of {prm!r}: its vLLM "
            "leaves out the bias of the head; vllm 0.32 does not"
        )
    advice = "; if it computes in bfloat16, say so by --dtype bfloat16" if dtype == "float32" else ""
    raise ConfigError(
        f"{server.name} serves {model!r}, which is not the PRM {prm!r} (its rewards of the probe are off by up to "
        f"{float(off.abs().max()):.3g}, allowed is {allowed:.3g}): start it by: {restart}{advice}"
    )
