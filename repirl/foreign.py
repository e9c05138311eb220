"""PRMs of others, which score the end of each step: read as a PRM of kind `value` whose reward at a step's tag is the
logit of "this step is right", so that its sigmoid is the chance that their authors' code gives.

| convention      | text of a response              | logit at the last token of a tag           |
|-----------------|---------------------------------|--------------------------------------------|
| `classifier`    | steps, "\\n" behind each         | a classifier's one label, or label 1 less 0 |
| `qwen-math-prm` | steps, "<extra_0>" behind each  | label 1 less label 0 of a head of two layers |
| `math-shepherd` | "Step k: ... ки", one a line    | logit of "+" less that of "-"              |

Sources: TRL's stepwise supervision; the model cards of Qwen2.5-Math-PRM and of math-shepherd-mistral-7b-prm.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification, PreTrainedModel, PreTrainedTokenizerBase

from repirl.config import ConfigError
from repirl.data.split import StepForm
from repirl.distributed.shard import find_nonfinite
from repirl.fused import fuse
from repirl.learner import Learner
from repirl.model_checks import check_shapes, check_vocabulary, refuse_nonfinite
from repirl.model_files import StoredTensor, explained, read_model_config, shown, weight_tensors
from repirl.models import load_tokenizer
from repirl.packing import check_packed
from repirl.prm import PRM, PRMDescription, PromptFormat, StepRule
from repirl.value_head import HEAD_NAMES, add_value_head, head_name, own_attention

QWEN_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
# Tensors of heads, which a model with another head does not have.
HEADS = (*HEAD_NAMES, "lm_head")


@dataclass(frozen=True)
class Convention:
    """form: how a response is written · prompt: how a prompt is, with what stands between it and the response."""

    form: StepForm
    prompt: PromptFormat


def _plain(template: str) -> PromptFormat:
    return PromptFormat(chat_template=False, prompt_template=template, system=None)


CONVENTIONS = {
    "classifier": Convention(StepForm(tag="\n", split="\n"), _plain("{prompt}")),
    "qwen-math-prm": Convention(
        StepForm(tag="<extra_0>", split="\n\n"),
        PromptFormat(chat_template=True, prompt_template="{prompt}", system=QWEN_SYSTEM),
    ),
    "math-shepherd": Convention(
        StepForm(tag=" ки", split="\n", between="\n", numbered=True),
        _plain("{prompt} "),
    ),
}


class TwoLayerHead(nn.Linear):
    """A linear layer with one output, behind another one and a ReLU."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__(inner.out_features, 1)
        self.inner = inner

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(self.inner(input).relu())


def load_foreign(
    name: str,
    convention: str,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    tokens_per_microbatch: int = 16384,
) -> PRM:
    """Load a PRM of others.

    Args:
        name: folder or hub id, with safetensors files. No code in it is run.
        convention: a key of CONVENTIONS.
        device: where it computes; by default a GPU if there is one.
        dtype: of its weights.
        tokens_per_microbatch: what one forward pass may hold.

    Raises:
        ConfigError: the convention is unknown, or the model is not of it.
    """
    if convention not in CONVENTIONS:
        raise ConfigError(f"--convention is {convention!r}, expected one of {', '.join(CONVENTIONS)}")
    chosen, tokenizer = CONVENTIONS[convention], load_tokenizer(name)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = _load(name, convention, tokenizer, dtype, place)
    check_vocabulary(model.config, name, tokenizer, name)
    rule = StepRule(rule="separator", separator=chosen.form.tag, score="end", aggregate="min")
    described = PRMDescription(reward="value", steps=rule, prompt=chosen.prompt)
    learner = Learner(model, None, tokens_per_microbatch=tokens_per_microbatch)
    return PRM(learner, tokenizer, described, form=chosen.form)


def _load(
    name: str, convention: str, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    config = copy.deepcopy(read_model_config(name))
    add_value_head(config)
    tensors = weight_tensors(name)
    if tensors is None:
        raise ConfigError(f"{name!r} has no safetensors files: PRMs of others are read from those")
    body = {key: stored for key, stored in tensors.items() if key.split(".")[0] not in HEADS}
    check_shapes(name, config, "value", body)
    head = _head(name, convention, tensors, tokenizer)
    factory: Any = AutoModelForTokenClassification
    options = {"dtype": dtype, "attn_implementation": own_attention(factory, config), "use_safetensors": True}
    with explained("model", name):
        model, info = factory.from_pretrained(
            name, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **options
        )
    own = head_name(model)
    assert own is not None
    if missing := sorted(key for key in info["missing_keys"] if not key.startswith(f"{own}.")):
        raise ConfigError(f"the files of model {name!r} lack {shown(missing)}: they are not complete")
    setattr(model, own, head.to(dtype))
    model = fuse(model.to(device))
    refuse_nonfinite(name, find_nonfinite(model.named_parameters()), tensors)
    check_packed(model, name, device, dtype)
    return model


@torch.no_grad()
def _head(
    name: str, convention: str, tensors: dict[str, StoredTensor], tokenizer: PreTrainedTokenizerBase
) -> nn.Linear:
    """The head whose one output is the logit of a right step. Of two labels it is their difference: the softmax of two
    logits is the sigmoid of it."""
    if convention == "math-shepherd":
        key = next((k for k in tensors if k == "lm_head.weight" or k.endswith("embed_tokens.weight")), None)
        key = "lm_head.weight" if "lm_head.weight" in tensors else key
        ids: list[int] = tokenizer("+ -", add_special_tokens=False).input_ids
        if key is None or len(ids) != 2:
            raise _other(name, convention, tensors, "a head over the vocabulary, with tokens for '+' and '-'")
        table = _read(tensors[key], key)
        return _one_output(table[ids[1]], table[ids[0]], None)
    if convention == "qwen-math-prm":
        keys = ["score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias"]
        if not all(key in tensors for key in keys) or tensors["score.2.weight"].shape[0] != 2:
            raise _other(name, convention, tensors, "a head `score` of two layers with two labels")
        first, first_bias, last, last_bias = (_read(tensors[key], key) for key in keys)
        inner = nn.Linear(first.shape[1], first.shape[0])
        inner.weight.copy_(first)
        inner.bias.copy_(first_bias)
        head = TwoLayerHead(inner)
        head.load_state_dict(_one_output(last[0], last[1], last_bias).state_dict(), strict=False)
        return head
    own = next((head for head in HEAD_NAMES if f"{head}.weight" in tensors), None)
    if own is None or tensors[f"{own}.weight"].shape[0] not in (1, 2):
        raise _other(name, convention, tensors, "one linear head with one or two labels")
    weight = _read(tensors[f"{own}.weight"], f"{own}.weight")
    bias = _read(tensors[f"{own}.bias"], f"{own}.bias") if f"{own}.bias" in tensors else None
    wrong = weight[0] if len(weight) == 2 else torch.zeros_like(weight[0])
    if bias is not None and len(bias) == 1:
        bias = torch.cat([torch.zeros_like(bias), bias])
    return _one_output(wrong, weight[-1], bias)


def _one_output(wrong: Tensor, right: Tensor, bias: Tensor | None) -> nn.Linear:
    """wrong, right [D]: the weights of two logits · bias [2] of both, or None."""
    head = nn.Linear(len(right), 1)
    # In float32, so that nothing is lost where they are nearly alike.
    head.weight.copy_((right.float() - wrong.float())[None])
    head.bias.copy_(torch.zeros(1) if bias is None else (bias[1:].float() - bias[:1].float()))
    return head


def _read(stored: StoredTensor, key: str) -> Tensor:
    with safe_open(stored.path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(key)
    return tensor


def _other(name: str, convention: str, tensors: dict[str, StoredTensor], expected: str) -> ConfigError:
    heads = sorted(key for key in tensors if key.split(".")[0] in HEADS)
    there = ", ".join(f"{key} {list(tensors[key].shape)}" for key in heads[:4]) or "no head"
    return ConfigError(f"--convention {convention} expects {expected}, but {name!r} holds {there}")
