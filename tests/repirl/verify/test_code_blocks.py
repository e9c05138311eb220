"""Which part of a response is its program."""

import pytest

from repirl.verify.code_blocks import fenced_blocks, find_code

ONE, TWO = "def f(x):\n    return 1\n", "def f(x):\n    return 2\n"
HEAD = 'import math\n\ndef f(x):\n    """Say 1."""\n'


def run(code, name="f"):
    space = {}
    exec(code, space)
    owner, _, method = name.rpartition(".")
    return getattr(space[owner](), method)(0) if owner else space[method](0)


@pytest.mark.parametrize(
    "response",
    [
        f"```python\n{ONE}```",
        f"Sure:\n\n```py\n{ONE}```\nIt returns 1.",
        f"```\n{ONE}```",
        f"~~~Python3\n{ONE}~~~",
        f"````python\n{ONE}````",
        f'``` {{.python title="a.py"}}\n{ONE}```',
        f"First\n```python\n{TWO}```\nbetter\n```python\n{ONE}```",
        f"```python\n{ONE}```\nUse it:\n```python\nprint(f(3))\n```\nOutput:\n```\n1\n```",
        f"```python\n{ONE}```\n```bash\npython f.py\n```\n```text\ndef f(x): no\n```",
        f"```python\n{ONE}```\n```python\ndef f(x):\n    return",
        f"```python\n{ONE}",
        f"<think>\n```python\n{TWO}```\n</think>\n```python\n{ONE}```",
        "1. Like this:\n\n   ```python\n   def f(x):\n       return 1\n   ```\n",
        f"```python\n{ONE.rstrip()}```",
        "```python\nf = lambda x: 1\n```",
        "```python\nfrom __future__ import annotations\nimport re\ndef f(x: No):\n    return 1\n```",
        f"It is simple.\n{ONE}",
        ONE,
        "```python\nasync def g(): pass\ndef helper():\n    return 1\ndef f(x):\n    return helper()\n```",
        "```python\ndef f(x):\n    '''\n        ```\n        f(0)\n        ```\n    '''\n    return 1\n```",
    ],
)
def test_the_last_complete_block_that_defines_the_function_counts(response):
    assert run(find_code(response, "f")) == 1


@pytest.mark.parametrize(
    ("response", "starter"),
    [
        ("    return math.floor(1.5)\n", HEAD),
        ("\n   \n    return math.floor(1.5)\n", HEAD),
        ("    return math.floor(1.5)\nprint(f(1 / 0))\n", HEAD),
        ("```python\n    return math.floor(1.5)\n```", HEAD),
        ("```python\ndef f(x):\n    return math.floor(1.5)\n```", HEAD),
        ("```python\ndef f(x):\n    return math.floor(1.5)\n```", "import math\ndef f(x):\n    "),
    ],
)
def test_starter_code_goes_before_it(response, starter):
    assert run(find_code(response, "f", starter)) == 1


@pytest.mark.parametrize(
    "response",
    [
        "```python\nclass Solution:\n    def f(self, x):\n        return 1\n```",
        "```python\ndef f(self, x):\n    return 1\n```",
        "```python\ndef f(x):\n    return 1\n```",
        "```python\nclass Node:\n    pass\nclass Solution(object):\n    def f(self, x):\n        return 1\n```\n"
        "```python\nprint(Solution().f(0))\n```",
    ],
)
def test_a_method_may_come_with_its_class_or_without(response):
    starter = "class Unused:\n    pass\n\nclass Solution:\n    def f(self, x: int) -> int:\n        "
    assert run(find_code(response, "Solution.f", starter), "Solution.f") == 1


@pytest.mark.parametrize(
    "response",
    [
        "```python\nprint(int(input()))\n```\nInput:\n```\n5\n3\n```",
        "```\nprint(int(input()))\n```\nInput:\n```\n5\n3\n```",
        "The answer:\nprint(int(input()))\n",
        "for _ in range(1):\n    print(int(input()))\n",
        "```python\nprint(int(input()))",
    ],
)
def test_a_program_is_the_last_block_that_is_one(response):
    assert find_code(response, None).strip().endswith("print(int(input()))")


@pytest.mark.parametrize(
    "response", ["", "I cannot.", "```json\n{}\n```", "```python\n\n```", "The class of f is nice."]
)
def test_without_code_there_is_none(response):
    assert find_code(response, "f") is None
    assert find_code(response, None) is None


def test_characters_in_texts_end_no_line():
    code = "x = 'a\u2028b\x85c\x0cd'\nprint(x)"
    assert find_code(f"```python\n{code}\n```", None) == f"{code}\n"
    assert find_code(f"```python\n{code}\n```".replace("\n", "\r\n"), None) == f"{code}\n"


def test_blocks_say_their_tag_and_whether_they_end():
    blocks = fenced_blocks("```C++\nx\n```\n```\ny")
    assert [(block.tag, block.closed, block.code) for block in blocks] == [("c++", True, "x\n"), ("", False, "y\n")]


def test_long_nonsense_takes_no_time():
    texts = ["```" * 200_000, "def f(" * 100_000, " " * 500_000 + "x", "(" * 500_000, "```python\n" * 50_000]
    for text in [*texts, "x = 1\n" * 100_000, "async\n" * 100_000, "f\n" * 100_000]:
        find_code(text, "f", HEAD)
        find_code(text, None)
