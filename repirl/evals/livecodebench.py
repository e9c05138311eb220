"""LiveCodeBench: tasks of programming contests (Jain et al. 2024, arXiv 2403.07974)."""

from repirl.data.values import Place
from repirl.evals.benchmark import Benchmark, Fields, Sampling
from repirl.evals.programs import UNREADABLE, tests_of


def _prompt(fields: Fields, place: Place) -> str:
    task, starter = place.text(fields["problem"], "question_content"), fields["starter_code"]
    if isinstance(starter, str) and starter.strip():
        how = f"Go on from this code, and keep its names:\n\n```python\n{starter.rstrip()}\n```\n\n"
    else:
        how = "The program reads its input from stdin and writes its answer to stdout. "
    return f"{task.strip()}\n\nSolve it in Python. {how}Answer with the whole program in one block of code."


LIVECODEBENCH = Benchmark(
    name="livecodebench",
    source="livecodebench/code_generation_lite (question_content, public_test_cases, private_test_cases, metadata)",
    columns={
        "id": ("question_id",),
        "problem": ("question_content",),
        **{name: (name,) for name in ("starter_code", "public_test_cases", "private_test_cases", "metadata")},
    },
    optional=("starter_code", "private_test_cases", "metadata"),
    prompt=_prompt,
    grader="code",
    sampling=Sampling(samples=10, temperature=0.2, max_response_tokens=4096),
    answer=tests_of,
    vote=None,
    unreadable=UNREADABLE,
)
