"""A system that repirl does not ship: the policy learns the rollouts that were right (rejection sampling)."""

from repirl.cli import main
from repirl.objectives import Objective
from repirl.systems import SYSTEMS, System


class RightOnes(Objective):
    """-log pi of the rollouts that were right; where none was, of all."""

    def select(self, rollouts, data):
        right = rollouts.outcome > 0.5
        return rollouts.select(right if right.any() else ~right)

    def prepare(self, batch):
        self.num_tokens = batch.num_response_tokens
        return {"share": float(batch.outcome.mean())}

    def loss(self, outputs, micro):
        loss = -outputs["logprob"].sum() / self.num_tokens
        return loss, {"surprise": (-outputs["logprob"].detach().sum(), micro.num_response_tokens)}


SYSTEMS["right_ones"] = System(
    "the policy learns the rollouts that were right",
    objectives={"policy": "toy_system:RightOnes"},
    data=("prompts", "answers"),
    online=True,
)

if __name__ == "__main__":
    raise SystemExit(main())
