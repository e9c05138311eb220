"""The README.md of an exported model: what it is, how it was made, and how it is used."""

from __future__ import annotations

import transformers

from repirl.config import Config
from repirl.prm import PRMDescription

# How r_t of a response token a_t is read, by kind.
READ = {
    "value": "`r_t = w . h_t + b`: the classifier's one output at the response token itself",
    "logit": "`r_t`: the logit of the token, given all tokens before it",
    "soft_q": "`r_t = Q(s_t, a_t) - gamma V(s_t+1)`, with the logits as Q and their log-sum-exp as V",
    "logprob": "`r_t`: the log-probability of the token, given all tokens before it",
    "implicit": "`r_t = beta (log pi(a_t | s_t) - log pi_ref(a_t | s_t))`, relative to the reference named below",
}


def model_card(name: str, config: Config, architecture: str, description: PRMDescription | None) -> str:
    """The card as Markdown.

    Args:
        name: "policy" or "prm".
        config: of the run.
        architecture: the class in config.json.
        description: of a PRM; None for a policy.
    """
    auto = "AutoModelForTokenClassification" if "TokenClassification" in architecture else "AutoModelForCausalLM"
    other = "AutoModelForCausalLM" if auto != "AutoModelForCausalLM" else "AutoModelForTokenClassification"
    start, _ = config.start_of(name)
    lines = ["---", "library_name: transformers", "tags: [repirl]", "---", ""]
    lines += [f"# {'Process reward model' if description is not None else 'Policy'} trained by repirl", ""]
    lines += [f"Started from `{start}`, trained with `objective: {config.objective}` for up to {config.steps} steps."]
    if config.adapters is not None:
        lines += [f"Trained as a LoRA adapter of rank {config.adapters.rank}, which is merged into these weights."]
    lines += ["", "## How it is loaded", ""]
    if hasattr(transformers, architecture):
        lines += [
            f"It is a `{architecture}`: load it with `{auto}`, and with nothing else. `{other}` would load it, too, "
            "with a head that is not the trained one, and give numbers that mean nothing."
        ]
    else:
        lines += [
            f"It is a `{architecture}`, a class that transformers does not have: load it with `repirl.prm.load_prm`. "
            f"`AutoModel` loads the model below the head, whose weights are called `score`; `{other}` would load it, "
            "too, with a head that is not the trained one, and give numbers that mean nothing."
        ]
    if description is not None:
        lines += _rewards(description)
    else:
        lines += ["", f"It was trained at temperature {config.policy_temperature:g}."]
    lines += ["", "All of this stands in `config.json`, too, under `repirl`.", ""]
    return "\n".join(lines)


def _rewards(description: PRMDescription) -> list[str]:
    lines = ["", "## How its rewards are read", ""]
    lines += [f"Kind `{description.reward}`. {READ[description.reward]}.", ""]
    if description.reward == "soft_q":
        lines += [f"gamma: {description.gamma:g}", ""]
    if description.reference is not None:
        lines += [f"beta: {description.beta:g}; reference: `{description.reference.model}`", ""]
    if description.steps.score == "end":
        lines += [
            "It was trained on the last token of each step alone (a step ends with "
            f"`{description.steps.separator!r}`): there the sigmoid of `r_t` is the chance that the step is right, "
            "elsewhere `r_t` means nothing. `load_prm(...).step_scores(...)` reads it.",
            "",
        ]
    return [
        *lines,
        "```python",
        "from repirl.prm import load_prm",
        "",
        'rewards = load_prm("path/to/this/folder").rewards([("a prompt", "a response")])',
        "```",
    ]
