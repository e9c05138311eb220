"""GSM8K: word problems of grade-school arithmetic (Cobbe et al. 2021, arXiv 2110.14168)."""

from repirl.evals.benchmark import BOXED, Benchmark, Sampling

GSM8K = Benchmark(
    name="gsm8k",
    source="openai/gsm8k (question, answer), whose answers are worked solutions that end with #### N",
    columns={"problem": ("question", "problem"), "answer": ("answer",), "id": ("id",)},
    prompt=BOXED,
    grader="math",
    sampling=Sampling(samples=4, max_response_tokens=1024),
)
