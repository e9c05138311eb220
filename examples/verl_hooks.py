"""Three hooks of verl (0.9): its fused head, a policy loss, and rewards by a served PRM.

verl imports this module in each of its workers (`external_lib`), and the reward manager from its path. With the folder
of this file in PYTHONPATH, and a PRM served as prm_service.py says:

    python -m verl.trainer.main_ppo ...your options... \\
        actor_rollout_ref.model.external_lib=verl_hooks \\
        actor_rollout_ref.model.use_fused_kernels=True \\
        actor_rollout_ref.model.fused_kernel_options.impl_backend=torch \\
        actor_rollout_ref.actor.policy_loss.loss_mode=repirl \\
        reward.reward_manager.source=importlib \\
        reward.reward_manager.name=PRMRewardManager \\
        reward.reward_manager.module.path=$PWD/verl_hooks.py \\
        +prm.url=http://127.0.0.1:8000 +prm.path=$PWD/out/prm +prm.coefficient=1.0

Each hook was run on a CPU by verl's own code (its fused head, its table of policy losses, its loading and its call of a
reward manager); the command as a whole needs GPUs and was not run. verl wants an older transformers than repirl's
trainer, so the PRM is not loaded here but asked for. verl's rollouts have one reward each: the PRM's mean over the
response's tokens.
"""

from concurrent.futures import ThreadPoolExecutor

from prm_service import PRMService
from repirl_kernels import linear_token_stats, policy_loss
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.utils.torch_functional import masked_mean


def fused_forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
    """Log-probabilities and entropy of the actor and the reference, without their logits."""
    stats = linear_token_stats(hidden_states, vocab_weights, input_ids, temperature=temperature)
    return stats.logprob, stats.entropy


FusedLinearForPPO.forward = fused_forward


@register_policy_loss("repirl")
def repirl_policy_loss(
    old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean", config=None, rollout_is_weights=None
):
    """The clipped policy loss of repirl_kernels, [B, L] each, aggregated as verl is told to.

    verl's entropy and KL terms are added by verl.
    """
    mask = response_mask.bool()
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    result = policy_loss(
        log_prob, old_log_prob, advantages, row_mask=mask, clip_low=low, clip_high=high, clip_dual=config.clip_ratio_c
    )
    losses = result.loss if rollout_is_weights is None else result.loss * rollout_is_weights
    loss = agg_loss(losses, mask, loss_agg_mode, **config.global_batch_info)
    metrics = {"actor/pg_clipfrac": result.clipped, "actor/ppo_kl": old_log_prob - log_prob.detach()}
    return loss, {name: masked_mean(values.float(), mask).item() for name, values in metrics.items()}


class PRMRewardManager(RewardManagerBase):
    """The outcome by verl's verifier of the data source, plus a served PRM's mean reward of the response's tokens."""

    def __init__(self, config, tokenizer, compute_score, reward_router_address=None, reward_model_tokenizer=None):
        super().__init__(config, tokenizer, compute_score)
        self.coefficient = config.prm.coefficient
        self.service = PRMService(config.prm.url)
        self.service.check(config.prm.path)
        self.executor = ThreadPoolExecutor(max_workers=8)

    async def run_single(self, data):
        return await self.loop.run_in_executor(self.executor, self.score, data[-1])

    def score(self, item):
        """Of one rollout: prompts are padded on the left, responses on the right. The policy's tokens are the PRM's:
        both were exported from one model."""
        prompt, response = item.batch["prompts"], item.batch["responses"]
        attended = item.batch["attention_mask"].bool()
        prompt_ids = prompt[attended[: len(prompt)]].tolist()
        response_ids = response[attended[len(prompt) :]].tolist()
        columns = item.non_tensor_batch
        outcome = self.compute_score(
            data_source=columns["data_source"],
            solution_str=self.tokenizer.decode(response_ids, skip_special_tokens=True),
            ground_truth=columns["reward_model"]["ground_truth"],
            extra_info=columns.get("extra_info", {}),
        )
        outcome = float(outcome["score"] if isinstance(outcome, dict) else outcome)
        [rewards] = self.service.rewards([(prompt_ids, response_ids)])
        mean = sum(rewards) / len(rewards)
        return {
            "reward_score": outcome + self.coefficient * mean,
            "reward_extra_info": {"acc": outcome, "prm": mean},
        }
