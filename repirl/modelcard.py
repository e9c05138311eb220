"""The README.md of an exported model: what it is, how it was made, how it is used, and what it is not."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from repirl.config import Config
from repirl.dataconfig import SourceConfig
from repirl.prm import PRMDescription
from repirl.report.display import SHOWN
from repirl.report.log import read_metrics
from repirl.serving import serve_command
from repirl.version import __version__

# How r_t of a response token a_t is read, by kind.
READ = {
    "value": "`r_t = w . h_t + b`: the classifier's one output at the response token itself",
    "logit": "`r_t`: the logit of the token, given all tokens before it",
    "soft_q": "`r_t = Q(s_t, a_t) - gamma V(s_t+1)`, with the logits as Q and their log-sum-exp as V",
    "logprob": "`r_t`: the log-probability of the token, given all tokens before it",
    "implicit": "`r_t = beta (log pi(a_t | s_t) - log pi_ref(a_t | s_t))`, relative to the reference named below",
}


@dataclass(frozen=True)
class Model:
    """What a card is about.

    Args:
        name: "policy" or "prm".
        config: of the run.
        architecture: the class that it is loaded as, the one in config.json.
        description: of a PRM; None for a policy.
        step: how many steps the run had made.
        metrics: the run's up to this step, by step; empty where they are not there.
        adapter: whether the files are an adapter of peft alone.
    """

    name: str
    config: Config
    architecture: str
    description: PRMDescription | None
    step: int
    metrics: Sequence[Mapping[str, Any]] = ()
    adapter: bool = False

    @property
    def start(self) -> str:
        """What it was trained from."""
        return self.config.start_of(self.name)[0]


def metrics_until(run: Path, step: int) -> list[dict[str, Any]]:
    """The metrics of a run's folder up to a step; none where it has no metrics.jsonl."""
    file = run / "metrics.jsonl"
    return [line for line in read_metrics(file) if line["step"] <= step] if file.is_file() else []


def model_card(model: Model) -> str:
    """The card as Markdown."""
    parts = [_head(model), _training(model), _loading(model)]
    if model.description is not None:
        parts += [_rewards(model), _serving(model)]
    parts += [_figures(model), _limits(model), _ending(model)]
    return "\n".join(line for part in parts for line in part)


def _head(model: Model) -> list[str]:
    is_value = model.description is not None and model.description.reward == "value"
    lines = ["---", f"library_name: {'peft' if model.adapter else 'transformers'}"]
    lines += [f"pipeline_tag: {'token-classification' if is_value else 'text-generation'}"]
    lines += ["tags:", "- repirl", *["- process-reward-model"] * (model.description is not None)]
    if not Path(model.start).exists() and model.start.count("/") == 1:
        lines += [f"base_model: {model.start}"]
    title = "Process reward model" if model.description is not None else "Policy"
    return [*lines, "---", "", f"# {title} trained by repirl", ""]


def _training(model: Model) -> list[str]:
    config = model.config
    lines = [
        f"Started from `{model.start}`, trained with `objective: {config.objective}`: {config.system.summary}. "
        f"These are the weights after {model.step} of {config.steps} steps."
    ]
    if config.adapters is not None:
        what = "which is in these files alone" if model.adapter else "which is merged into these weights"
        lines += [f"Trained as a LoRA adapter of rank {config.adapters.rank}, {what}."]
    return [*lines, "", "## What it was trained on", "", *(f"- {line}" for line in _data(config)), ""]


def _data(config: Config) -> list[str]:
    data, lines = config.data, list[str]()
    if config.system.online and data.train is not None:
        lines += [f"prompts, to which responses of up to {config.rollout.max_response_tokens} tokens were sampled: "]
        lines[-1] += _source(data.train)
    kinds = {"experts": "expert solutions", "pairs": "preference pairs", "trajectories": "fixed rollouts"}
    for kind, words in (kinds | {"steps": "responses with labelled steps"}).items():
        if not config.uses(kind):
            continue
        sources = getattr(data, kind)
        if sources is not None:
            listed = sources if isinstance(sources, list) else [sources]
            lines += [f"{words}: {', '.join(map(_source, listed))}"]
        elif kind == "experts" and data.train is not None:
            lines += [f"{words}: column `{data.solution_column}` of {_source(data.train)}"]
    if config.system.online and data.answer_column is not None:
        lines += [f"outcomes of responses, by the verifier `{config.verifier.kind}`"]
    form = "the chat template" if data.chat_template else f"the template `{data.prompt_template!r}`"
    return [*lines, f"prompts were written by {form}"]


def _source(source: SourceConfig) -> str:
    details = [f"{key} `{value}`" for key in ("name", "split", "revision") if (value := getattr(source, key, None))]
    return f"`{source.path}`" + (f" ({', '.join(details)})" if details else "")


def _loading(model: Model) -> list[str]:
    name = model.architecture
    auto = "AutoModelForTokenClassification" if "TokenClassification" in name else "AutoModelForCausalLM"
    other = "AutoModelForCausalLM" if auto != "AutoModelForCausalLM" else "AutoModelForTokenClassification"
    lines = ["## How it is loaded", ""]
    if model.adapter:
        return _loading_adapter(model, auto)
    if hasattr(transformers, name):
        lines += [
            f"It is a `{name}`: load it with `{auto}`, and with nothing else. `{other}` would load it, too, "
            "with a head that is not the trained one, and give numbers that mean nothing."
        ]
    else:
        lines += [
            f"It is a `{name}`, a class that transformers does not have: load it with `repirl.prm.load_prm`. "
            f"`AutoModel` loads the model below the head, whose weights are called `score`; `{other}` would load it, "
            "too, with a head that is not the trained one, and give numbers that mean nothing."
        ]
    if model.description is None:
        lines += [f"It was sampled and trained at temperature {model.config.policy_temperature:g}."]
    return [*lines, "", "All of this stands in `config.json`, too, under `repirl`.", ""]


def _loading_adapter(model: Model, auto: str) -> list[str]:
    """auto: the class that loads the base."""
    has_head, gguf_file = auto.endswith("TokenClassification"), model.config.start_of(model.name)[1]
    options = ", num_labels=1" * has_head + (f', gguf_file="{gguf_file}"' if gguf_file else "")
    # transformers has no token classifier for some families.
    makes_class = has_head and not hasattr(transformers, model.architecture)
    register = [
        "from repirl.value_head import register_classifier",
        "from transformers import AutoConfig",
        "",
        f'register_classifier(AutoConfig.from_pretrained("{model.start}"))',
    ]
    return [
        "## How it is loaded",
        "",
        f"It is an adapter of peft for `{model.start}`{'; the trained head is in these files' * has_head}.",
        "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import {auto}",
        *register * makes_class,
        "",
        f'base = {auto}.from_pretrained("{model.start}"{options})',
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
        "```",
        "",
        "`repirl export` without `--adapter-only` writes the merged model.",
        "",
    ]


def _rewards(model: Model) -> list[str]:
    description = model.description
    assert description is not None
    lines = ["## How its rewards are read", ""]
    lines += [f"Kind `{description.reward}`. {READ[description.reward]}.", ""]
    if description.reward == "soft_q":
        lines += [f"gamma: {description.gamma:g}", ""]
    if description.reference is not None:
        lines += [f"beta: {description.beta:g}; reference: `{description.reference.model}`", ""]
    rule = description.steps
    if rule.score == "end":
        lines += [
            "It was trained on the last token of each step alone (a step ends with "
            f"`{rule.separator!r}`): there the sigmoid of `r_t` is the chance that the step is right, "
            "elsewhere `r_t` means nothing. `load_prm(...).step_scores(...)` reads it.",
            "",
        ]
    else:
        lines += [f"A step ends with `{rule.separator!r}`; its score is the mean reward of its tokens.", ""]
    if model.adapter:
        return [*lines, "`repirl.json` says it for programs.", ""]
    return [
        *lines,
        "```python",
        "from repirl.prm import load_prm",
        "",
        'rewards = load_prm("path/to/this/folder").rewards([("a prompt", "a response")])',
        "```",
        "",
        "For files: `repirl score --prm path/to/this/folder --input solutions.jsonl --output scored.jsonl`.",
        "",
    ]


def _serving(model: Model) -> list[str]:
    if model.adapter or model.description is None or model.description.reward != "value":
        return []
    return [
        "## On a server",
        "",
        "```",
        shlex.join(serve_command("path/to/this/folder")),
        "repirl score --server http://127.0.0.1:8000 --input solutions.jsonl --output scored.jsonl",
        "```",
        "",
        "`use_activation` is false because vLLM gives the sigmoid of rewards otherwise. `probe.json` holds a few "
        "tokens and the rewards at them, so that a client can see that the server gives the same.",
        "",
    ]


def _figures(model: Model) -> list[str]:
    """The first and the last values of the run's figures; a held-out figure is not there at each step."""
    rows = []
    prefixes = ("eval/", "rollout/", f"{model.name}/")
    shown = {name: (label, form) for name, label, form in SHOWN if name.startswith(prefixes)}
    others = {name for line in model.metrics for name in line if name.startswith("eval/")} - set(shown)
    for name in [*shown, *sorted(others)]:
        values = [(line["step"], line[name]) for line in model.metrics if isinstance(line.get(name), int | float)]
        if values:
            label, form = shown.get(name, (f"`{name}`", "{:.4g}"))
            cells = [f"{form.format(value)} (step {step})" for step, value in (values[0], values[-1])]
            rows += [f"| {label} | {cells[0]} | {cells[1]} |"]
    if not rows:
        return []
    return ["## Figures of the run", "", "| figure | first | last |", "|---|---|---|", *rows, ""]


def _limits(model: Model) -> list[str]:
    limits = [
        "Nothing was measured but what stands above: test it first on tasks, languages and lengths that it was not "
        "trained on."
    ]
    description = model.description
    if description is None:
        return ["## Limits", "", *(f"- {line}" for line in limits), ""]
    if description.steps.score == "end":
        limits += ["A chance is that of the labels, which can be wrong where those who completed the responses erred."]
    else:
        limits += [
            "Rewards are no probabilities and have no fixed scale: compare steps of one response, and responses to one "
            "prompt. Sums depend on length."
        ]
    if "experts" in model.config.system.data:
        limits += [
            "It learned to tell the experts' solutions from others: what is unlike theirs and right may score low."
        ]
    limits += ["A policy that is trained on its rewards alone may learn what scores high and is wrong: check answers."]
    return ["## Limits", "", *(f"- {line}" for line in limits), ""]


def _ending(model: Model) -> list[str]:
    versions = f"repirl {__version__}, PyTorch {torch.__version__}, transformers {transformers.__version__}"
    return [f"Exported by {versions}.", ""]
