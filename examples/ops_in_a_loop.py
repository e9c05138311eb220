"""The ops of repirl_kernels in a plain PyTorch loop: a policy is trained by a reward of each token.

The logits of all tokens never exist: log-probabilities and losses come straight from hidden states and the weight of
the head. The package needs torch alone (`pip install .`, without the extra `train`).

    python ops_in_a_loop.py 80

The task: after a prompt k the policy shall count, k + 1, k + 2, ... Each right token has the reward 1.
"""

import sys

import torch
from repirl_kernels import linear_token_loss, linear_token_stats, policy_loss, rloo_advantages
from torch import nn

VOCABULARY, WIDTH, LENGTH = 64, 64, 6
PROMPTS, SAMPLES = 16, 8  # a batch has 8 responses to each of 16 prompts
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Policy(nn.Module):
    """Any network that gives hidden states [B, L, D], and a head whose weight is [V, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.network = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.network(self.embedding(tokens))[0]


@torch.no_grad()
def sample(policy: Policy, prompts: torch.Tensor) -> torch.Tensor:
    """Responses [B, LENGTH] to prompts [B]: here, for one token at a time, logits are small."""
    tokens = prompts[:, None]
    for _ in range(LENGTH):
        logits = policy.head(policy(tokens)[:, -1])
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)], dim=1)
    return tokens[:, 1:]


def update(policy: Policy, optimizer: torch.optim.Optimizer) -> float:
    """Sample a batch and learn from it twice; returns the mean reward of a token."""
    prompts = torch.randperm(VOCABULARY, device=DEVICE)[:PROMPTS].repeat_interleave(SAMPLES)
    responses = sample(policy, prompts)
    wanted = (prompts[:, None] + torch.arange(1, LENGTH + 1, device=DEVICE)) % VOCABULARY
    reward = (responses == wanted).float()

    # From here on all responses lie end to end: T = B * LENGTH tokens, and where each response begins.
    inputs = torch.cat([prompts[:, None], responses[:, :-1]], dim=1)
    targets = responses.flatten()
    starts = torch.arange(0, targets.numel() + 1, LENGTH, device=DEVICE)
    # gamma 0: a token is judged by its own reward, compared with those of the other responses to its prompt.
    advantage = rloo_advantages(
        None,
        reward.flatten(),
        starts,
        torch.arange(PROMPTS, device=DEVICE).repeat_interleave(SAMPLES),
        outcome_coefficient=0.0,
        process_coefficient=1.0,
        gamma=0.0,
        baseline="position",
    )
    with torch.no_grad():
        old_logprob = linear_token_stats(policy(inputs).flatten(0, 1), policy.head.weight, targets).logprob

    def loss_fn(stats, rows):
        # Of a chunk of the tokens: their statistics, and which tokens they are.
        losses = policy_loss(
            stats.logprob, old_logprob[rows], advantage[rows], entropy=stats.entropy, entropy_coefficient=0.01
        )
        return losses.loss / targets.numel()

    for _ in range(2):
        hidden = policy(inputs).flatten(0, 1)
        linear_token_loss(hidden, policy.head.weight, targets, loss_fn).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return reward.mean().item()


def main(updates: str = "80") -> None:
    torch.manual_seed(0)
    policy = Policy().to(DEVICE)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    for number in range(1, int(updates) + 1):
        reward = update(policy, optimizer)
        if number == 1 or number % 20 == 0:
            print(f"update {number}: {reward:.1%} of the tokens were right")


if __name__ == "__main__":
    main(*sys.argv[1:])
