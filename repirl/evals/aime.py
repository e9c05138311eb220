"""AIME: the American Invitational Mathematics Examination of any year. Answers are integers from 0 to 999."""

from repirl.evals.benchmark import BOXED, Benchmark, Sampling

AIME = Benchmark(
    name="aime",
    source="HuggingFaceH4/aime_2024 (problem, answer, id), Maxwell-Jia/AIME_2024 (Problem, Answer, ID) and the like",
    columns={
        "problem": ("problem", "Problem", "question"),
        "answer": ("answer", "Answer"),
        "id": ("id", "ID", "problem_idx"),
    },
    prompt=BOXED,
    grader="math",
    # 15 or 30 problems are few: many samples of each keep the error of avg@k small.
    sampling=Sampling(samples=32),
)
