"""Why the verifier of mathematical answers says what it says. The verdicts are those of `repirl.verify.math`."""

from __future__ import annotations

from repirl.verify.compare import is_readable
from repirl.verify.math import MAX_PARSED, extract_answer, final_answer, gold_answer, math_reward, plain_reward

# Characters of an answer that a reason quotes.
_MAX_QUOTED = 60


class Verdict(float):
    """A reward with its reason. What stands before the reason's first colon is its kind, such as `differs`."""

    def __new__(cls, reward: float, reason: str) -> Verdict:
        verdict = super().__new__(cls, reward)
        verdict.reason = reason
        return verdict

    reason: str


def plain_verdict(response: str, answer: str) -> Verdict | None:
    """As repirl.verify.math.plain_reward, with the reason."""
    reward = plain_reward(response, answer)
    if reward is None:
        return None
    return Verdict(reward, "equal" if reward else _differs(extract_answer(response) or "", gold_answer(answer)))


def math_verdict(response: str, answer: str) -> Verdict:
    """As repirl.verify.math.math_reward, with the reason. It takes about twice the time for a wrong answer, so it is
    meant for data, not for training.

    Returns:
        The reward, with one of these reasons: "equal"; "no final answer found"; "too long: ..."; "answer not readable:
        ...", where the response's final answer is equal to the same text only, or reading it failed; "right answer not
        readable: ..."; "differs: ANSWER vs RIGHT ANSWER".

    Raises:
        MemoryError: and nothing else, whatever a model wrote.
    """
    reward = math_reward(response, answer)
    return Verdict(reward, "equal" if reward else _why_wrong(response, answer))


def overlong_reason(response: str, answer: str) -> str:
    """The reason of a response that repirl.verify.math.is_overlong."""
    texts = {"final answer": extract_answer(response) or "", "right answer": gold_answer(answer)}
    name, text = max(texts.items(), key=lambda item: len(item[1]))
    return f"too long: the {name} has {len(text)} characters, at most {MAX_PARSED} are read"


def _why_wrong(response: str, answer: str) -> str:
    try:
        final, gold = final_answer(response), gold_answer(answer)
        if not final:
            return "no final answer found"
        if max(len(final), len(gold)) > MAX_PARSED:
            return overlong_reason(response, answer)
        if not is_readable(gold):
            return f"right answer not readable: {_quoted(gold)}"
        if not is_readable(final):
            return f"answer not readable: {_quoted(final)}"
    except MemoryError:
        raise
    except Exception as error:
        return f"answer not readable: {type(error).__name__}"
    return _differs(final, gold)


def _differs(final: str, gold: str) -> str:
    return f"differs: {_quoted(final)} vs {_quoted(gold)}"


def _quoted(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_QUOTED else text[: _MAX_QUOTED - 3] + "..."
