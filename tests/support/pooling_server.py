"""A server on the loopback interface that answers as vLLM's pooling server does, with a PRM's rewards."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

from repirl.prm import PRM

MODELS, POOLING = "/v1/models", "/pooling"


class PoolingServer(http.server.ThreadingHTTPServer):
    """Serves a PRM of kind `value`.

    Args:
        prm: whose values it gives.
        root: where it says that the model is.

    Attributes:
        requests: (path, headers, body as JSON) of each request.
        answer: called with (path, body); (status, content) that is answered instead, None to answer as vLLM does.
        change: called with the values of one sequence; what it returns is answered in their place.
    """

    daemon_threads = True

    def __init__(self, prm: PRM, root: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.prm, self.root = prm, root
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.answer: Callable[[str, Any], tuple[int, bytes] | None] = lambda path, body: None
        self.change: Callable[[list[float]], Any] = lambda values: values

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def models(self) -> dict[str, Any]:
        return {"data": [{"id": "served-prm", "root": self.root, "max_model_len": 64}]}

    def pooling(self, body: dict[str, Any]) -> dict[str, Any]:
        """The first token's value, which no reward is, is 0 here."""
        sequences = body["input"]
        if isinstance(sequences[0], int):
            sequences = [sequences]
        if body.get("task", "token_classify") != "token_classify":
            raise ValueError("Try switching the model's pooling_task via --pooler-config.task")
        rewards = self.prm.rewards([(ids[:1], ids[1:]) for ids in sequences])
        values = [[0.0, *reward.tolist()] for reward in rewards]
        data = [{"index": i, "data": [[x] for x in self.change(value)]} for i, value in enumerate(values)]
        # The order of answers is said by their index alone.
        return {"object": "list", "model": "served-prm", "data": data[::-1]}


class _Handler(http.server.BaseHTTPRequestHandler):
    server: PoolingServer

    def do_GET(self) -> None:
        self._handle(None)

    def do_POST(self) -> None:
        self._handle(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _handle(self, body: Any) -> None:
        server = self.server
        server.requests.append((self.path, dict(self.headers), body))
        answered = server.answer(self.path, body)
        if answered is None and self.path == MODELS:
            answered = 200, json.dumps(server.models()).encode()
        elif answered is None and body is not None and body.get("model", "served-prm") != "served-prm":
            answered = _error(404, f"The model `{body['model']}` does not exist.")
        elif answered is None and self.path == POOLING:
            answered = 200, json.dumps(server.pooling(body)).encode()
        elif answered is None:
            answered = _error(404, "Not Found")
        status, content = answered
        # A client that has given up is no error.
        with contextlib.suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nothing on standard error."""


def _error(status: int, message: str) -> tuple[int, bytes]:
    return status, json.dumps({"error": {"message": message, "code": status}}).encode()


@contextlib.contextmanager
def pooling_server(prm: PRM, root: str) -> Iterator[PoolingServer]:
    """A running PoolingServer."""
    with PoolingServer(prm, root) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
