"""MBPP: short Python functions from a sentence and tests (Austin et al. 2021, arXiv 2108.07732)."""

from repirl.data.values import Place
from repirl.evals.benchmark import Benchmark, Fields, Sampling
from repirl.evals.programs import UNREADABLE, tests_of


def _prompt(fields: Fields, place: Place) -> str:
    tests = fields["test_list"]
    if not isinstance(tests, list):
        raise place.error("'test_list' holds no list of assertions")
    shown = "\n".join(place.text(test, "test_list") for test in tests)
    return (
        f"{place.text(fields['problem'], 'text').strip()}\nWrite it in Python; these tests have to pass:\n\n```python\n"
        f"{shown}\n```\n\nAnswer with the whole function, with its imports, in one block of code."
    )


MBPP = Benchmark(
    name="mbpp",
    source="google-research-datasets/mbpp, full (text, test_list) or sanitized (prompt, test_list)",
    columns={
        "id": ("task_id",),
        "problem": ("text", "prompt"),
        "test_list": ("test_list",),
        "test_setup_code": ("test_setup_code",),
        "test_imports": ("test_imports",),
    },
    optional=("test_setup_code", "test_imports"),
    prompt=_prompt,
    grader="code",
    sampling=Sampling(samples=10, temperature=0.8, max_response_tokens=1024),
    answer=tests_of,
    vote=None,
    unreadable=UNREADABLE,
)
