"""MATH-500: 500 of the problems of MATH's test set (Hendrycks 2021), chosen by Lightman (2023, arXiv 2305.20050)."""

from repirl.evals.benchmark import BOXED, Benchmark, Sampling

MATH500 = Benchmark(
    name="math500",
    source="HuggingFaceH4/MATH-500 (problem, answer, unique_id) and of MATH itself (problem, solution)",
    columns={"problem": ("problem",), "answer": ("answer", "solution"), "id": ("unique_id", "id")},
    prompt=BOXED,
    grader="math",
    sampling=Sampling(samples=4),
)
