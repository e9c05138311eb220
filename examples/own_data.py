"""Data of your own: a file with columns of your own names, looked at before anything is trained, then trained on.

    python own_data.py runs/demo/start runs/own-data

A row is a problem, an expert's solution with its steps, and the answer. The options under `data` say which column is
which. The same from the command line, with these options in a file (`repirl config --output my.yaml` writes a start):

    repirl train --config my.yaml --dry-run     # reads every row, shows the first one as the model will see it
    repirl train --config my.yaml
"""

import json
import random
import sys
from pathlib import Path

from repirl import build_config, read_metrics, train
from repirl.cli import main as repirl


def write_rows(path: Path, count: int = 64) -> None:
    """Sums of three numbers. Take any program that writes JSON lines; CSV and Parquet files are read, too."""
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        a, b, c = (rng.randint(1, 9) for _ in range(3))
        worked = f"{a}+{b}={a + b}; {a + b}+{c}={a + b + c}; #### {a + b + c}"
        rows.append({"question": f"{a}+{b}+{c}=", "worked": worked, "result": a + b + c})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(model: str, output_dir: str, steps: str = "3") -> None:
    """model: folder or hub id of the policy, and of the PRM's start."""
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "mine.jsonl")
    values = {
        "output_dir": str(folder / "run"),
        "steps": int(steps),
        "policy": {"model": model, "optimizer": {"lr": 1e-4}},
        "prm": {"reward": "logprob", "optimizer": {"lr": 1e-4}},
        "data": {
            "train": str(folder / "mine.jsonl"),
            "prompt_column": "question",
            "solution_column": "worked",
            "answer_column": "result",
            "step_separator": "; ",
        },
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_response_tokens": 48},
    }
    # YAML holds JSON, so this is a configuration file.
    (folder / "my.yaml").write_text(json.dumps(values, indent=2))
    if repirl(["train", "--config", str(folder / "my.yaml"), "--dry-run"]) != 0:
        sys.exit(2)
    train(build_config(values))
    for line in read_metrics(folder / "run" / "metrics.jsonl"):
        print(f"turn {line['step']}: mean outcome {line['rollout/outcome']:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
