"""The ops in TRL: a GRPOTrainer whose loss is computed by `linear_token_loss`, without the logits (TRL 1.16).

    pip install '.[train]' 'trl>=1.16,<1.17'       # in a clone; TRL is no dependency of repirl
    python trl_trainer.py runs/demo/start runs/demo/data/train.jsonl runs/trl 20
    python trl_trainer.py runs/demo/start runs/demo/data/train.jsonl runs/trl-prm 20 out/prm     # by a PRM of repirl's

The trainer's loss is TRL's default, "dapo", with its clipping and its KL term: the same numbers as GRPOTrainer's, from
three products of the logits' size instead of four. What else GRPOTrainer can do, it refuses. It was run on one process;
on several the loss runs inside the wrapped model's forward, as TRL's own trainers do it.
"""

import sys

import torch
from datasets import load_dataset
from own_verifier import judge
from repirl_kernels import linear_token_loss, policy_loss
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import _ForwardRedirection


class FusedGRPOTrainer(GRPOTrainer):
    """GRPOTrainer with the loss "dapo" from hidden states.

    Raises:
        ValueError: for options that change the loss in a way that is not computed here.
    """

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        plain = {"loss_type": "dapo", "importance_sampling_level": "token", "top_entropy_quantile": 1.0, "delta": None}
        plain |= {"off_policy_mask_threshold": None, "use_vllm": False, "entropy_coef": 0.0}
        plain |= {"use_adaptive_entropy": False}
        for name, value in plain.items():
            if getattr(self.args, name) != value:
                raise ValueError(f"{name} is {getattr(self.args, name)!r}; FusedGRPOTrainer computes {value!r} only")
        self.redirect = _ForwardRedirection()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        language_model = self.accelerator.unwrap_model(model)
        # Inside the forward of DDP or FSDP, where gradients are exchanged and the head's weight is whole.
        return self.redirect(model, language_model, self.fused_loss, language_model, inputs)

    def fused_loss(self, model, inputs):
        mode = "train" if self.model.training else "eval"
        mask = inputs["completion_mask"].bool()  # [B, L]
        num_sequences, length = mask.shape
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        with self.accelerator.autocast():
            hidden = model.base_model(input_ids=ids, attention_mask=attention_mask).last_hidden_state

        advantage = inputs["advantages"].reshape(num_sequences, -1).expand(num_sequences, length).flatten()
        old_logprob = inputs.get("old_per_token_logps")
        ref_logprob = inputs["ref_per_token_logps"].flatten() if self.beta else None
        # Over all tokens of the step, on all processes and in all micro-batches.
        num_tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        if mode == "train":
            num_tokens = num_tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation

        def loss_fn(stats, rows):
            # The first update on a batch has no older log-probabilities than its own.
            old = stats.logprob.detach() if old_logprob is None else old_logprob.flatten()[rows]
            losses = policy_loss(
                stats.logprob,
                old,
                advantage[rows],
                row_mask=mask.flatten()[rows],
                clip_low=self.epsilon_low,
                clip_high=self.epsilon_high,
            ).loss
            if ref_logprob is not None:
                difference = ref_logprob[rows] - stats.logprob
                kl = difference.exp() - difference - 1
                if self.args.use_bias_correction_kl:
                    kl = kl * (stats.logprob - old).exp()
                losses = losses + self.beta * kl
            return losses / num_tokens

        result = linear_token_loss(
            hidden[:, -length - 1 : -1],  # the state before each token of the completion
            model.get_output_embeddings().weight,
            inputs["completion_ids"],
            loss_fn,
            row_mask=mask,
            temperature=self.temperature,
            softcap=getattr(model.config, "final_logit_softcapping", None),
        )
        self._metrics[mode]["entropy"].append((result.stats.entropy.sum() / mask.sum()).item())
        return result.loss


def verdict(completions, answer, **columns):
    """1 where a completion's last number is the answer."""
    return [judge(text, right) for text, right in zip(completions, answer, strict=True)]


def by_prm(path: str):
    """A reward function: the mean token reward of each completion under a PRM that `repirl export` wrote."""
    from repirl import load_prm

    prm = load_prm(path)

    def prm_reward(prompts, completions, **columns):
        rewards = prm.rewards(list(zip(prompts, completions, strict=True)))
        return [reward.mean().item() for reward in rewards]

    return prm_reward


def main(model: str, data: str, output_dir: str, steps: str = "20", prm: str | None = None) -> None:
    """model: folder or hub id; data: JSON lines with `prompt` and `answer`; prm: an exported PRM, which then is the
    reward beside the answers' verdict."""
    trainer = FusedGRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        processing_class=AutoTokenizer.from_pretrained(model),
        reward_funcs=[verdict] if prm is None else [verdict, by_prm(prm)],
        train_dataset=load_dataset("json", data_files=data, split="train"),
        args=GRPOConfig(
            output_dir=output_dir,
            max_steps=int(steps),
            learning_rate=1e-4,
            per_device_train_batch_size=16,
            num_generations=4,
            max_completion_length=48,
            num_iterations=2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            bf16=False,
        ),
    )
    trainer.train()
    for line in trainer.state.log_history:
        if "reward" in line:
            print(f"step {line['step']}: mean reward {line['reward']:.3f}, entropy {line['entropy']:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
