"""Responses, each token in the colour of its reward, to read and to choose from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NotRequired, TypedDict

from repirl.report.charts import key
from repirl.report.colours import level_class
from repirl.report.markup import escape, is_finite, number, visible
from repirl.report.scale import RewardScale, reward_scale

# Tokens of a longer response that are shown: the first and the last ones.
FIRST_TOKENS, LAST_TOKENS = 800, 200
# Characters of a prompt, and of the text beside a step's score.
_PROMPT_CHARACTERS, _STEP_CHARACTERS = 4000, 60
# Step scores that are shown without the steps' texts.
_CHIPS = 12


class Step(TypedDict):
    """One step of a response: the index of its first token, that after its last one, and its score."""

    start: int
    end: int
    score: float


class Variant(TypedDict):
    """One model's view of a solution, or one run's response: a reward for every token.

    Tokens before response_start belong to the prompt and are not coloured. rewards: None where nobody scored it.
    error_span: a known error, as the index of its first token and the index after its last one. correct: as of a
    Sample, where responses differ. note: what else is to be said of it.
    """

    name: str
    tokens: list[str]
    rewards: list[float] | None
    error_span: list[int] | None
    response_start: int
    correct: NotRequired[float | None]
    note: NotRequired[str]
    steps: NotRequired[list[Step]]


class Sample(TypedDict):
    """One solution, or the responses to one prompt.

    correct: whether it is right, or a number from 0 to 1; None if that is unknown. tags: values by which a reader
    chooses, by what they are values of.
    """

    title: str
    prompt: str
    note: str
    variants: list[Variant]
    correct: float | None
    tags: NotRequired[dict[str, list[str]]]


class _Scales:
    """The scales of a name's token rewards and step scores, over all that is shown of it."""

    def __init__(self, variants: Sequence[Variant]) -> None:
        self.tokens = reward_scale(r for v in variants for i, r in _scored(v))
        self.steps = reward_scale(step["score"] for v in variants for step in v.get("steps", []))


def samples_section(samples: Sequence[Sample], shades: dict[str, str], lead: str) -> str:
    """The section of a page; "" without samples. shades: the styles of lines, by name. lead: stands above.

    Raises:
        ValueError: a variant has not as many rewards as tokens.
    """
    if not samples:
        return ""
    by_name: dict[str, list[Variant]] = {}
    for sample in samples:
        for variant in sample["variants"]:
            _check(variant, sample["title"])
            by_name.setdefault(variant["name"], []).append(variant)
    scales = {name: _Scales(variants) for name, variants in by_name.items()}
    keys = {name: key(shades[name]) if name in shades else "" for name in by_name}
    filters = _tag_values(samples)
    cards = "".join(_card(sample, scales, keys, filters) for sample in samples)
    planted = any(variant["error_span"] for variants in by_name.values() for variant in variants)
    err = ' <u class="err">Underlined</u>: the error that was planted.' if planted else ""
    scored = any(variant["rewards"] is not None for variants in by_name.values() for variant in variants)
    help_text = (
        f"Each token has the colour of its reward, from low to high.{err} Point at a token, tap it, or move with the "
        "arrow keys, to read its value."
        if scored
        else ""
    )
    return (
        f'<section id="responses">\n<h2>{"Token rewards" if planted else "Responses"}</h2>\n'
        f'<p class="lead">{escape(lead)}{" " if lead else ""}{help_text}</p>\n'
        f"{_legend(scales)}{_filter_bar(filters)}"
        f'<div class="samples">\n{cards}</div>\n{_pager()}</section>\n'
    )


def _check(variant: Variant, title: str) -> None:
    if variant["rewards"] is not None and len(variant["tokens"]) != len(variant["rewards"]):
        raise ValueError(
            f"{variant['name']!r} of sample {title!r} has {len(variant['tokens'])} tokens and "
            f"{len(variant['rewards'])} rewards, expected one reward a token"
        )


def _is_shown(index: int, total: int) -> bool:
    return total <= FIRST_TOKENS + LAST_TOKENS or index < FIRST_TOKENS or index >= total - LAST_TOKENS


def _scored(variant: Variant) -> Iterator[tuple[int, float]]:
    """The tokens that are shown in a colour, with their finite rewards."""
    total = len(variant["tokens"])
    for index, reward in enumerate(variant["rewards"] or []):
        if index >= variant["response_start"] and _is_shown(index, total) and is_finite(reward):
            yield index, reward


def _tag_values(samples: Sequence[Sample]) -> dict[str, list[str]]:
    """All values of each tag with more than one, in the order in which they come."""
    values: dict[str, dict[str, None]] = {}
    for sample in samples:
        for name, some in sample.get("tags", {}).items():
            values.setdefault(name, {}).update(dict.fromkeys(some))
    return {name: list(some) for name, some in values.items() if len(some) > 1}


def _filter_bar(filters: dict[str, list[str]]) -> str:
    if not filters:
        return ""
    fields = []
    for place, (name, values) in enumerate(filters.items()):
        options = "".join(f'<option value="{i}">{escape(value)}</option>' for i, value in enumerate(values))
        fields.append(
            f'<label>{escape(name)}<select data-filter="{place}"><option value="">all</option>{options}</select>'
            "</label>\n"
        )
    return f'<form class="filters" aria-label="Which responses">\n{"".join(fields)}</form>\n'


def _pager() -> str:
    """page.js shows it where there is more than fits."""
    return (
        '<nav class="pager" aria-label="Pages of responses" hidden>'
        '<button type="button" data-move="-1">Previous</button>'
        '<span role="status"></span><button type="button" data-move="1">Next</button></nav>\n'
    )


def _legend(scales: dict[str, _Scales]) -> str:
    rows = []
    for name, of_name in scales.items():
        for what, scale in (("tokens", of_name.tokens), ("steps", of_name.steps)):
            if not scale.low:
                continue
            cells = "".join(f'<span class="{level_class(level)}">{text}</span>' for level, text in scale.cells())
            label = escape(name) + (" <span>step scores:</span>" if what == "steps" else ":")
            rows.append(
                f'<li><p><span class="who">{label}</span> <span class="how">{scale.explained}</span></p>'
                f'<div class="cells">{cells}</div></li>\n'
            )
    return f'<ul class="scales" aria-label="Scales of the colours">\n{"".join(rows)}</ul>\n' if rows else ""


def _badge(correct: float | None) -> str:
    if correct is None:
        return ""
    if correct in (0, 1):
        kind, text = ("good", "\u2713 right") if correct else ("bad", "\u2717 wrong")
        return f'<span class="badge {kind}">{text}</span>'
    return f'<span class="badge plain">outcome {number(correct, digits=3)}</span>'


def _card(sample: Sample, scales: dict[str, _Scales], keys: dict[str, str], filters: dict[str, list[str]]) -> str:
    title = f"<h3>{escape(sample['title'])}</h3>" if sample["title"] != sample["prompt"] else ""
    prompt = f'<p class="prompt" dir="auto">{escape(shortened(sample["prompt"]))}</p>' if sample["prompt"] else ""
    note = f'<p class="note">{escape(sample["note"])}</p>\n' if sample["note"] else ""
    variants = "".join(
        _variant(variant, scales[variant["name"]], keys[variant["name"]]) for variant in sample["variants"]
    )
    tags = sample.get("tags", {})
    chosen = "".join(
        f' data-f{i}="{" ".join(str(values.index(v)) for v in tags.get(name, []))}"'
        for i, (name, values) in enumerate(filters.items())
    )
    return (
        f'<article class="card sample"{chosen}>\n<div class="sample-head">{title}{prompt}{_badge(sample["correct"])}'
        f"</div>\n{note}{variants}</article>\n"
    )


def shortened(text: str, most: int = _PROMPT_CHARACTERS) -> str:
    """A text without its middle where it is longer than `most` characters; it says how much is missing."""
    if len(text) <= most:
        return text
    first = most * 3 // 4
    return f"{text[:first]} \u2026 [{len(text) - most} characters left out] \u2026 {text[first - most :]}"


def _variant(variant: Variant, scales: _Scales, line_key: str) -> str:
    start, span, total = variant["response_start"], variant["error_span"], len(variant["tokens"])
    rewards = variant["rewards"]
    out, values, inside = [], [], False
    for index, token in enumerate(variant["tokens"]):
        if not _is_shown(index, total):
            if index == FIRST_TOKENS:
                left_out = total - FIRST_TOKENS - LAST_TOKENS
                out.append(f'<span class="gap">\u2026 {left_out} tokens left out \u2026</span>')
            continue
        if span and index == span[0] and span[0] < span[1]:
            out.append('<u class="err">')
            inside = True
        if index < start or rewards is None:
            out.append(f'<span class="t{" p" if index < start else ""}">{visible(shortened(token, 400))}</span>')
        else:
            out.append(_token(token, rewards[index], scales.tokens))
            values.append(number(rewards[index]))
        if inside and span and (index == span[1] - 1 or index == total - 1):
            out.append("</u>")
            inside = False
    output = '<output class="read" aria-live="polite"></output>' if values else ""
    note = f'<span class="said">{escape(variant["note"])}</span>' if variant.get("note") else ""
    badge = _badge(variant.get("correct"))
    reads = (
        f' data-r="{" ".join(values)}" tabindex="0" role="group" aria-label="Response of {escape(variant["name"])}; '
        'arrow keys move from token to token"'
        if values
        else ""
    )
    return (
        f'<div class="variant"><p class="variant-head"><span class="who">{line_key}{escape(variant["name"])}</span>'
        f"{badge}{note}{_lowest(variant)}{output}</p>\n"
        f'<div class="tokens" dir="auto"{reads}>{"".join(out)}</div>{_steps(variant, scales.steps)}</div>\n'
    )


def _lowest(variant: Variant) -> str:
    """The text about the token with the lowest reward, and whether it is in the known error."""
    known = [(reward, index) for index, reward in _scored(variant)]
    if not known or min(known)[0] == max(known)[0]:
        return ""
    reward, index = min(known)
    token, span = visible(shortened(variant["tokens"][index], 40)), variant["error_span"]
    text = f"lowest: <code>{token}</code> {number(reward, digits=3)}"
    if span is None:
        return f'<span class="lowest">{text}</span>'
    if span[0] <= index < span[1]:
        return f'<span class="lowest in-error">{text}, \u2713 the planted error</span>'
    return f'<span class="lowest">{text}, not the planted error</span>'


def _token(token: str, reward: float, scale: RewardScale) -> str:
    shade = level_class(scale.level(reward)) if is_finite(reward) else "qn"
    return f'<span class="t {shade}">{visible(shortened(token, 400))}</span>'


def _steps(variant: Variant, scale: RewardScale) -> str:
    steps = variant.get("steps", [])
    if not steps:
        return ""
    items, chips = [], []
    for step in steps:
        text = "".join(variant["tokens"][step["start"] : step["end"]]).strip()
        short = text if len(text) <= _STEP_CHARACTERS else f"{text[:_STEP_CHARACTERS]}\u2026"
        score = step["score"]
        shade = level_class(scale.level(score)) if is_finite(score) else "qn"
        chip = f'<b class="{shade}">{number(score, digits=2)}</b>'
        chips.append(chip)
        items.append(f'<li>{chip} <span dir="auto">{escape(short)}</span></li>')
    more = f" and {len(steps) - _CHIPS} more" if len(steps) > _CHIPS else ""
    return (
        f'<details class="steps"><summary>Step scores {"".join(chips[:_CHIPS])}{more}</summary>'
        f"<ol>{''.join(items)}</ol></details>\n"
    )
