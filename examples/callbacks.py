"""Callbacks: look at each turn of a run, and end it early.

A callback is told of the run's begin, of each turn and of each evaluation; where it returns True, the run ends there,
with a checkpoint. `EarlyStopping` is one. Both go on where they were when the run is resumed.

    python callbacks.py runs/demo/start runs/demo/data/train.jsonl runs/demo/data/eval.jsonl runs/callbacks
"""

import sys
import time

from repirl import Callback, EarlyStopping, build_config, train


class TimeLimit(Callback):
    """Ends the run after so many seconds, and prints a line for each turn."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def begin(self, records):
        # The time of turns before a checkpoint counts as well: metrics.jsonl has it.
        used = sum(record.get("seconds/step") or 0.0 for record in records)
        self.start = time.monotonic() - used

    def after_turn(self, turn, metrics):
        elapsed = time.monotonic() - self.start
        print(f"turn {turn}: {metrics['rollout/outcome']:.1%} of the responses were right, {elapsed:.0f} s in all")
        return elapsed > self.seconds

    def after_evaluation(self, turn, metrics):
        print(f"turn {turn}: held-out accuracy {metrics['eval/accuracy']:.1%}")
        return False


def main(model: str, train_data: str, eval_data: str, output_dir: str, steps: str = "30") -> None:
    """model: folder or hub id; both data: JSON lines with `prompt` and `answer`."""
    config = build_config(
        {
            "objective": "rloo",
            "output_dir": output_dir,
            "steps": int(steps),
            "policy": {"model": model, "optimizer": {"lr": 1e-4}},
            "data": {"train": train_data, "eval": eval_data},
            "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_response_tokens": 48},
            "eval": {"every": 1, "num_prompts": 16},
            "checkpoint": {"keep_best": 1},
        }
    )
    stopping = EarlyStopping("eval/accuracy", patience=3, min_delta=0.005)
    turns = train(config, callbacks=[stopping, TimeLimit(seconds=600)])
    print(f"ended after {turns} turns; best {stopping.best:.1%} at turn {stopping.best_turn}")


if __name__ == "__main__":
    main(*sys.argv[1:])
