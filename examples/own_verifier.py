"""A verifier of your own: a function of (response, answer) that returns 1 for right and 0 for wrong.

Every configuration takes it by its name. It runs in worker processes with a limit on time and memory, so it may be
slow, and may use any package. In the folder of this file, after `repirl demo` made a model and data, or with paths of
your own:

    repirl train --preset demo --verifier.kind custom --verifier.function own_verifier:judge

Or from Python, as `main` below does:

    python own_verifier.py runs/demo/start runs/demo/data/train.jsonl runs/own-verifier
"""

import re
import sys

from repirl import build_config, read_metrics, train


def judge(response: str, answer: str) -> float:
    """1 where the last number of the response is the answer, half of that where it is off by one."""
    numbers = re.findall(r"-?\d+", response)
    if not numbers:
        return 0.0
    distance = abs(int(numbers[-1]) - int(answer))
    return {0: 1.0, 1: 0.5}.get(distance, 0.0)


def main(model: str, data: str, output_dir: str, steps: str = "3") -> None:
    """Train a policy on the function's outcomes alone.

    model: folder or hub id; data: JSON lines with `prompt` and `answer`.
    """
    config = build_config(
        {
            "objective": "rloo",
            "output_dir": output_dir,
            "steps": int(steps),
            "policy": {"model": model, "optimizer": {"lr": 1e-4}},
            "data": {"train": data},
            "verifier": {"kind": "custom", "function": "own_verifier:judge", "processes": 2, "timeout_seconds": 5.0},
            "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_response_tokens": 48},
        }
    )
    train(config)
    for line in read_metrics(f"{output_dir}/metrics.jsonl"):
        print(f"turn {line['step']}: mean outcome {line['rollout/outcome']:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
