"""OlympiadBench: problems of mathematics and physics olympiads, those with text only and answers that a machine can
judge (He et al. 2024, arXiv 2402.14008; its `inference` folder has the prompt and the judge that are followed here)."""

from repirl.data.values import Place, shown
from repirl.evals.benchmark import Benchmark, Fields, Sampling
from repirl.evals.tolerance import allowed_errors, is_close
from repirl.verify.explain import Verdict, math_verdict

# Between the right answer and the error that is allowed for, in what the grader gets.
_ERROR = " +- "


def prompt(fields: Fields, place: Place) -> str:
    r"""The problem with its context, and how to write the answer: into \boxed{}, several ones with commas, without its
    unit."""
    context = fields["context"]
    parts = [place.text(context, "context")] if context else []
    parts.append(place.text(fields["problem"], "problem"))
    box = "multiple answers connected with commas" if fields["several"] else "answer"
    unit = " Leave the unit out of \\boxed{}." if fields["unit"] else ""
    parts.append(
        "Please reason step by step, and end your solution with "
        f'"So the final answer is \\boxed{{{box}}}.", in LaTeX.{unit}'
    )
    return "\n".join(parts)


def answer(fields: Fields, place: Place) -> str:
    """The right answer, and behind it the error that is allowed for, where the data has one."""
    value = fields["answer"]
    if isinstance(value, list):
        text = ", ".join(place.answer(part, f"final_answer.{i}") for i, part in enumerate(value))
    else:
        text = place.answer(value, "final_answer")
    error = fields["error"]
    if error in (None, ""):
        return place.text(text, "final_answer")
    try:
        allowed_errors(str(error))
    except ValueError as problem:
        raise place.error(f"'error' is {shown(error)}, expected a number, or several with commas") from problem
    return f"{text}{_ERROR}{error}"


def grade(response: str, answer: str) -> Verdict:
    """1 where a response's final answers are equal to the right ones, in any order, or are numbers that differ by the
    allowed errors at most; else 0, with the reason that the verifier of mathematical answers gives."""
    right, _, error = answer.partition(_ERROR)
    verdict = math_verdict(response, right)
    if not verdict and error and is_close(response, right, absolute=error):
        return Verdict(1.0, "equal but for the allowed error")
    return verdict


OLYMPIADBENCH = Benchmark(
    name="olympiadbench",
    source="Hothan/OlympiadBench (question, final_answer, context, unit, error, is_multiple_answer)",
    columns={
        "problem": ("question", "problem"),
        "answer": ("final_answer", "answer"),
        "id": ("id",),
        "context": ("context",),
        "several": ("is_multiple_answer",),
        "unit": ("unit",),
        "error": ("error",),
    },
    optional=("context", "several", "unit", "error"),
    prompt=prompt,
    answer=answer,
    grader="repirl.evals.olympiadbench:grade",
    sampling=Sampling(samples=4),
)
