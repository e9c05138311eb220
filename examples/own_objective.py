"""A training objective of your own: the policy learns its best response to each prompt.

An objective is a class with three methods: which batch is learned from (`select`), what is computed of the whole batch
(`prepare`), and the loss of one micro-batch (`loss`). A `System` says which learner is trained with which objective, on
which data. Loop, checkpoints, planner and command line take it from there. In the folder of this file:

    repirl train --preset demo --objective own_objective:BEST_OF_GROUP
    repirl plan  --preset demo --objective own_objective:BEST_OF_GROUP

Or from Python:

    python own_objective.py runs/demo/start runs/demo/data/train.jsonl runs/own-objective
"""

import sys

import torch

from repirl import Objective, System, build_config, read_metrics, train


class BestOfGroup(Objective):
    """-log pi of the response with the best outcome in each prompt's group, the mean over tokens (RAFT, Dong et al.
    2023)."""

    def select(self, rollouts, data):
        best = {}
        for index, (group, outcome) in enumerate(
            zip(rollouts.group_ids.tolist(), rollouts.outcome.tolist(), strict=True)
        ):
            if group not in best or outcome > rollouts.outcome[best[group]]:
                best[group] = index
        # Groups in which nothing is right teach nothing; without any other the turn's update is skipped.
        chosen = [index for index in best.values() if rollouts.outcome[index] > 0]
        return rollouts.select(torch.tensor(chosen)) if chosen else None

    def prepare(self, batch):
        # Over the whole batch, so that micro-batches and processes change nothing.
        self.num_tokens = batch.num_response_tokens
        return {"responses": float(len(batch.outcome))}

    def loss(self, outputs, micro):
        surprise = -outputs["logprob"]
        return surprise.sum() / self.num_tokens, {"surprise": (surprise.detach().sum(), micro.num_response_tokens)}


BEST_OF_GROUP = System(
    "the policy learns the best response to each prompt",
    objectives={"policy": "own_objective:BestOfGroup"},
    data=("prompts", "answers"),
    online=True,
)


def main(model: str, data: str, output_dir: str, steps: str = "3") -> None:
    """model: folder or hub id; data: JSON lines with `prompt` and `answer`."""
    config = build_config(
        {
            "objective": "own_objective:BEST_OF_GROUP",
            "output_dir": output_dir,
            "steps": int(steps),
            "policy": {"model": model, "optimizer": {"lr": 1e-4}},
            "data": {"train": data},
            "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_response_tokens": 48},
        }
    )
    train(config)
    for line in read_metrics(f"{output_dir}/metrics.jsonl"):
        learned = f"{line.get('policy/responses', 0):.0f} responses learned"
        print(f"turn {line['step']}: mean outcome {line['rollout/outcome']:.3f}, {learned}")


if __name__ == "__main__":
    main(*sys.argv[1:])
