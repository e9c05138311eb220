"""AMC: the American Mathematics Competitions, as problems with a number for an answer in place of choices."""

from repirl.evals.benchmark import BOXED, Benchmark, Sampling

AMC = Benchmark(
    name="amc",
    source="AI-MO/aimo-validation-amc (problem, answer, id), math-ai/amc23 (question, answer, id)",
    columns={"problem": ("problem", "question"), "answer": ("answer",), "id": ("id",)},
    prompt=BOXED,
    grader="math",
    sampling=Sampling(samples=32),
)
