"""A PRM as a service: a client for programs that have token ids, such as trainers, and scores of texts by repirl.

Serve an exported PRM with `reward: value` by vLLM (0.32 or newer), in whatever environment it is installed:

    vllm serve out/prm --runner pooling --convert classify \\
        --pooler-config '{"task": "token_classify", "use_activation": false}' \\
        --dtype float32 --host 127.0.0.1 --port 8000

Then rank the responses to each prompt of a file, JSON lines with `prompt` and `response`:

    python prm_service.py http://127.0.0.1:8000 out/prm samples.jsonl scored.jsonl

`PRMService` needs nothing but Python, so it works in environments without repirl. How a text becomes the tokens that
the PRM was trained on, and where its steps end, is known by repirl: `main` leaves texts to `repirl.score`, as does

    repirl score --server http://127.0.0.1:8000 --input samples.jsonl --output scored.jsonl
"""

import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from urllib.request import Request, urlopen


class PRMService:
    """The token rewards of a PRM that vLLM serves.

    url: such as http://127.0.0.1:8000; the environment variable VLLM_API_KEY holds its key, if it has one.
    timeout: seconds that an answer may take.
    """

    def __init__(self, url: str, timeout: float = 60.0) -> None:
        self.url, self.timeout = url.rstrip("/"), timeout

    def rewards(self, pairs: list[tuple[list[int], list[int]]]) -> list[list[float]]:
        """For each pair of prompt and response, as token ids, the reward of each token of the response."""
        # Without use_activation: false vLLM answers sigmoids of the rewards.
        body = {"task": "token_classify", "use_activation": False, "input": [[*p, *response] for p, response in pairs]}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        with urlopen(
            Request(f"{self.url}/pooling", json.dumps(body).encode(), headers), timeout=self.timeout
        ) as answer:
            entries = sorted(json.load(answer)["data"], key=lambda entry: entry["index"])
        values = [[value for [value] in entry["data"]] for entry in entries]
        return [value[len(prompt) :] for (prompt, _), value in zip(pairs, values, strict=True)]

    def check(self, prm: str, tolerance: float = 1e-3) -> None:
        """Compare with the rewards of a few tokens that the export holds in probe.json.

        Raises:
            RuntimeError: the server serves another model, sigmoids, or rewards that were computed in 16 bits (these
                need a larger tolerance).
        """
        probe = json.loads((Path(prm) / "probe.json").read_text())
        [rewards] = self.rewards([(probe["token_ids"][:1], probe["token_ids"][1:])])
        off = max(abs(a - b) for a, b in zip(rewards, probe["rewards"], strict=True))
        if off > tolerance:
            raise RuntimeError(f"{self.url} does not serve {prm}: the rewards of its probe are off by {off:.3g}")


def main(url: str, prm: str, data: str, output: str) -> None:
    """url: the server's; prm: the exported folder, of which no weights are loaded; data: JSON lines with `prompt` and
    `response`; output: gets `step_scores` and `score` in addition."""
    PRMService(url).check(prm)

    from repirl import score
    from repirl.apps.score import ScoreOptions
    from repirl.apps.server import Server

    score(prm, data, output, ScoreOptions(server=Server(url)))
    responses = defaultdict(list)
    for line in Path(output).read_text().splitlines():
        row = json.loads(line)
        responses[row["prompt"]].append(row)
    for prompt, rows in responses.items():
        print(prompt)
        for row in sorted(rows, key=lambda row: row["score"], reverse=True):
            print(f"  {row['score']:+.4f}  {row['response']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
