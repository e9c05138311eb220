"""Sampling with a vLLM server: a separate process, on other devices or another machine.

Prompts and responses are sent as token ids (/inference/v1/generate). Weights are sent over a TCP connection from the
trainer to each of the server's workers, never through a file. `serve_command` gives the command that starts such a
server. The server does not authenticate clients: use it only on 127.0.0.1 or in a private network.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import secrets
import socket
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

import torch
from torch import Tensor

from repirl.config import ConfigError
from repirl.learner import Learner
from repirl.rollout.engine import EngineError, Response, Sampling
from repirl.rollout.parity import PROBE, check_request, probe, recorded, require_held, require_parity
from repirl.rollout.vllm_worker import Fingerprint, is_worker, send_end, send_tensor

# Turns on the HTTP routes that sending weights needs.
SERVER_ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1"}


def serve_command(
    model: str,
    *,
    dtype: str,
    max_model_len: int,
    host: str = "127.0.0.1",
    port: int = 8000,
    options: Sequence[str] = (),
) -> list[str]:
    """The command that starts a server for VLLMServerEngine, in SERVER_ENVIRONMENT and where repirl is installed.

    Args:
        model: a folder or a hub id; only the model's configuration is read.
        dtype: the dtype in which the server computes, such as "bfloat16".
        max_model_len: the largest number of tokens in a prompt and its response together.
        host: the address at which the server listens.
        port: the port at which the server listens.
        options: more arguments of `vllm serve`.

    Returns:
        The command as a list of words.
    """
    return [
        *("vllm", "serve", model, "--host", host, "--port", str(port)),
        *("--dtype", dtype, "--max-model-len", str(max_model_len)),
        *("--load-format", "dummy", "--tokens-only", "--enable-prompt-tokens-details"),
        *("--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"),
        *("--worker-extension-cls", "repirl.rollout.vllm_worker.WeightReceiver"),
        *options,
    ]


class VLLMServerEngine:
    """Samples with a vLLM server that is already running or starting. `update_weights` must come before `generate`.

    With several processes (torchrun) each process requests its own responses, and rank 0 sends the weights.

    Args:
        url: the server's address, such as http://127.0.0.1:8000.
        max_sequences: the largest number of requests that this process has open at a time.
        timeout_seconds: how long to wait for the server's start, for a response, and for loading all weights.
        push_host: the address of this machine at which the server's workers can connect to it.

    Raises:
        EngineError: no server answers in time.
        ConfigError: the url is wrong, or the server was not started as `serve_command` says.
    """

    def __init__(
        self, url: str, *, max_sequences: int, timeout_seconds: float = 600.0, push_host: str = "127.0.0.1"
    ) -> None:
        parsed = urllib.parse.urlsplit(url if "//" in url else f"//{url}")
        if parsed.scheme not in ("", "http") or parsed.hostname is None:
            raise ConfigError(f"the vLLM server's url is {url!r}, expected one like http://127.0.0.1:8000")
        self.host, self.port = parsed.hostname, parsed.port or 8000
        self.max_sequences, self.timeout_seconds, self.push_host = max_sequences, timeout_seconds, push_host
        self._asleep, self._version = False, ""
        self._connections: list[http.client.HTTPConnection] = []
        self._wait_until_ready()
        workers = self._call("repirl_describe", "telling what it serves")
        self.num_workers, described = len(workers), workers[0]
        self.dtype = getattr(torch, described["dtype"])
        self.max_model_len, self.block_size = described["max_model_len"], described["block_size"]

    @property
    def name(self) -> str:
        """The server's name in messages."""
        return f"the vLLM server at {self.host}:{self.port}"

    @property
    def has_weights(self) -> bool:
        """See Engine.has_weights."""
        return bool(self._version)

    def generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling) -> list[Response]:
        """See Engine.generate.

        Raises:
            EngineError: the engine sleeps, has no weights yet, the server does not answer in time, or it sampled with
                other weights than those that were sent last.
            ConfigError: a prompt is so long that the longest response would not fit into `max_model_len`.
        """
        check_request(prompts, seeds, sampling, self.max_model_len)
        self._require_awake("sample")
        if not self._version:
            raise EngineError(f"{self.name} has no sound weights of this run: update_weights() comes first")
        return [response for response, _ in self._generate(prompts, seeds, sampling)]

    def update_weights(self, policy: Learner) -> None:
        """Send the policy's weights to the server, tensor by tensor, and check them. All processes call this.

        Raises:
            EngineError: the server does not hold the weights that were sent, its log-probabilities are not the
                policy's, or it does not answer in time.
        """
        self._require_awake("take new weights")
        self._version = ""
        # (error message, version of the weights, responses to the probe), from rank 0 only.
        result: list[tuple[str, str, list[Response]]] = []
        if policy.world.is_main:
            weights = policy.weights()
            prompts, seeds = probe(policy.model.config.vocab_size, self.block_size, self.max_model_len)
            try:
                self._version = self._push(weights)
                sampled = self._generate(prompts, seeds, PROBE)
                if stale := max(num_cached for _, num_cached in sampled):
                    raise EngineError(f"{self.name} kept {stale} cached tokens of a prompt over a change of weights")
                result = [("", self._version, [response for response, _ in sampled])]
            except EngineError as error:
                # `weights` gathers shards from all processes, so go through the rest of it; the others do not know of
                # the error yet.
                for _ in weights:
                    pass
                result = [(str(error), "", [])]
        else:
            for _ in policy.weights():
                pass
            prompts, _ = probe(policy.model.config.vocab_size, self.block_size, self.max_model_len)
        self._version = ""
        [(problem, version, responses)] = policy.world.gather(result)
        if problem:
            raise EngineError(problem)
        require_parity(policy, prompts, responses, self.dtype, self.name)
        self._version = version

    def sleep(self) -> None:
        """Refuse to generate until `wake`. The server frees nothing: its memory is not on the trainer's devices."""
        self._asleep = True

    def wake(self) -> None:
        """Undo `sleep`."""
        self._asleep = False

    def close(self) -> None:
        """Break off open requests. The server goes on running, because the engine did not start it."""
        for connection in self._connections:
            with contextlib.suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def _generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling
    ) -> list[tuple[Response, int]]:
        """Sample; returns each response and how many tokens of its prompt came from the server's prefix cache."""
        bodies = [
            {
                "token_ids": list(prompt),
                "sampling_params": {
                    "seed": seed,
                    "temperature": sampling.temperature,
                    "max_tokens": sampling.max_response_tokens,
                    "stop_token_ids": list(sampling.end_ids),
                    # Only sampling.end_ids end a response.
                    "ignore_eos": True,
                    "logprobs": 0,
                },
            }
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        responses = []
        for answer in self._ask_all("/inference/v1/generate", bodies, "sampling"):
            [choice] = answer["choices"]
            versions = {span["version"] for span in choice["weight_versions"] or [{"version": "unknown"}]}
            if versions != {self._version}:
                raise EngineError(
                    f"{self.name} sampled with other weights than those that were pushed (version "
                    f"{', '.join(sorted(versions))} instead of {self._version}): was it started anew?"
                )
            logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
            details = (answer["usage"] or {}).get("prompt_tokens_details") or {}
            response = Response(choice["token_ids"], logprobs, choice["finish_reason"] == "stop")
            responses.append((response, details.get("cached_tokens") or 0))
        return responses

    def _push(self, weights: Iterator[tuple[str, Tensor]]) -> str:
        """Send all weights, check the workers' copies, and set and return a new random version name for them."""
        pushed: dict[str, Fingerprint] = {}
        try:
            server = socket.create_server((self.push_host, 0))
        except OSError as error:
            raise ConfigError(f"push_host {self.push_host!r} is no address of this machine: {error}") from error
        with server as listener, ThreadPoolExecutor(1) as pool:
            # A worker has to send this secret when it connects, so that nobody else gets the weights.
            secret = secrets.token_hex(16)
            place = [self.push_host, str(listener.getsockname()[1]), str(self.timeout_seconds), secret]
            answer = pool.submit(self._call, "repirl_receive", "taking new weights", *place)
            with contextlib.ExitStack() as stack:
                try:
                    connections = self._accept(listener, answer, stack, secret.encode())
                    for name, weight in recorded(weights, self.dtype, pushed):
                        send_tensor(connections, name, weight)
                    send_end(connections)
                except OSError as error:
                    # If the server answered with an error, raise that one: it says more than a broken connection.
                    stack.close()
                    answer.result()
                    raise EngineError(f"{self.name} broke off while taking new weights: {error}") from error
                held = answer.result()
        require_held(pushed, held, self.name)
        if not self._ask("POST", "/reset_prefix_cache", None, "dropping its prefix cache")["success"]:
            raise EngineError(f"{self.name} did not drop its prefix cache, which is of the former weights")
        version = secrets.token_hex(8)
        self._ask("POST", "/update_weight_version", {"new_version": version}, "naming its weights")
        return version

    def _accept(
        self, listener: socket.socket, answer: Future, stack: contextlib.ExitStack, secret: bytes
    ) -> list[socket.socket]:
        """Wait for a connection from each worker. Raises TimeoutError, or the server's error if it answers instead."""
        connections: list[socket.socket] = []
        listener.settimeout(0.1)
        deadline = time.monotonic() + self.timeout_seconds
        while len(connections) < self.num_workers:
            if answer.done():
                answer.result()
            if time.monotonic() > deadline:
                raise TimeoutError(f"no connection from it within {self.timeout_seconds:g} s")
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                if is_worker(connection, secret):
                    connection.settimeout(self.timeout_seconds)
                    connections.append(stack.enter_context(connection))
                else:
                    connection.close()
        return connections

    def _require_awake(self, what: str) -> None:
        if self._asleep:
            raise EngineError(f"{self.name} is asleep and cannot {what}: wake() it first")

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.timeout_seconds
        while True:
            try:
                self._ask("GET", "/health", None, "starting")
                return
            except EngineError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def _call(self, method: str, what: str, *arguments: str) -> list[Any]:
        """Call a method of the server's workers; returns what each of them returned."""
        body = {"method": method, "args": list(arguments)}
        return self._ask("POST", "/collective_rpc", body, what)["results"]

    def _ask_all(self, path: str, bodies: list[dict], what: str) -> list[dict]:
        """Send many requests, up to `max_sequences` at a time; returns the answers in order. An error ends them all."""
        if not bodies:
            return []
        self._connections.clear()
        with ThreadPoolExecutor(min(self.max_sequences, len(bodies))) as pool:
            futures = [pool.submit(self._ask, "POST", path, body, what, self._connections.append) for body in bodies]
            try:
                for future in as_completed(futures):
                    future.result()
            except EngineError:
                pool.shutdown(wait=False, cancel_futures=True)
                self.close()
                raise
        return [future.result() for future in futures]

    def _ask(
        self,
        method: str,
        path: str,
        body: dict | None,
        what: str,
        announce: Callable[[http.client.HTTPConnection], object] = lambda connection: None,
    ) -> dict:
        """Send one request; returns the answer. announce: called with the connection before it is used."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=self.timeout_seconds)
        announce(connection)
        try:
            headers = {"Content-Type": "application/json", "Connection": "close"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            status, content = response.status, response.read()
        except TimeoutError as error:
            seconds = f"{self.timeout_seconds:g} s"
            raise EngineError(f"{self.name} did not answer within {seconds} while {what}") from error
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"{self.name} is not there (any more), while {what}: {error!r}") from error
        finally:
            connection.close()
        if status in (403, 404) or b"no attribute 'repirl_" in content:
            raise ConfigError(
                f"{self.name} cannot be used (it knows no {path} for {what}): it has to be started like this: "
                f"{' '.join(f'{k}={v}' for k, v in SERVER_ENVIRONMENT.items())} "
                f"{' '.join(serve_command('MODEL', dtype='bfloat16', max_model_len=4096))}"
            )
        if status != 200:
            raise EngineError(
                f"{self.name} failed with status {status} while {what}: {content[:500].decode(errors='replace')}"
            )
        return json.loads(content) if content else {}
