"""Minerva Math: undergraduate problems of MIT OpenCourseWare (Lewkowycz et al. 2022, arXiv 2206.14858)."""

from repirl.evals.benchmark import BOXED, Benchmark, Sampling
from repirl.evals.tolerance import is_close
from repirl.verify.explain import Verdict, math_verdict

# Answers of this set are often rounded numbers. The usual graders of it allow for this relative difference.
RELATIVE = "1e-4"


def grade(response: str, answer: str) -> Verdict:
    """1 where a response's final answer is equal to the right one, or both are numbers and differ by RELATIVE at most;
    else 0, with the reason that the verifier of mathematical answers gives."""
    verdict = math_verdict(response, answer)
    if not verdict and is_close(response, answer, relative=RELATIVE):
        return Verdict(1.0, "equal but for rounding")
    return verdict


MINERVA = Benchmark(
    name="minerva",
    source="math-ai/minervamath (question, answer) and of files with worked solutions (problem, solution)",
    columns={"problem": ("problem", "question"), "answer": ("answer", "solution"), "id": ("idx", "id")},
    prompt=BOXED,
    grader="repirl.evals.minerva:grade",
    sampling=Sampling(samples=4),
)
