"""GSM8K: word problems of grade-school arithmetic (Cobbe et al. 2021, arXiv 2110.14168)."""

from repirl.evals.benchmark import Benchmark, Sampling

GSM8K = Benchmark(
    name="gsm8k",
    source="openai/gsm8k (question, answer), whose answers are worked solutions that end with #### N",
    columns={"problem": ("question", "problem"), "answer": ("answer",), "id": ("id",)},
    prompt="{problem}\nPlease reason step by step, and put your final answer within \\boxed{}.",
    grader="math",
    sampling=Sampling(samples=4, max_response_tokens=1024),
)
