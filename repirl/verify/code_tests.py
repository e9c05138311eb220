"""What a program is judged by, as a text that takes the place of a right answer: JSON of `Tests`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from repirl.verify.jail import plain


@dataclass(frozen=True)
class Tests:
    """The tests of one problem.

    Args:
        style: "program" reads stdin and writes stdout; "function" is called, and what it returns is compared;
            "assertions" are run behind it.
        tests: of a program {"input": text, "outputs": [texts, of which any is right]}; of a function {"args": list,
            "kwargs": object, "outputs": [values, of which any is right]}; of assertions a text each.
        entry: what is called, as "f" or "Solution.f"; None for a program.
        helpers: other functions of the program that assertions call.
        calls_check: the assertions define check(candidate), which is called with `entry`, as HumanEval's.
        starter: the code that a model was given to go on from.
        setup: code that assertions need, such as imports; it stands before the program, too.
    """

    # pytest takes classes of this name for tests otherwise.
    __test__ = False

    style: Literal["program", "function", "assertions"]
    tests: tuple[Any, ...]
    entry: str | None = None
    helpers: tuple[str, ...] = ()
    calls_check: bool = False
    starter: str = ""
    setup: str = ""

    @property
    def names(self) -> list[str]:
        """The functions that assertions call."""
        return [*([self.entry] if self.entry else []), *self.helpers]

    def text(self) -> str:
        """As the verifier takes it."""
        return json.dumps(asdict(self), sort_keys=True)


# Of arguments and results: plain data is nested no deeper, and a job has levels of its own.
MAX_DEPTH = plain.MAX_DEPTH - 4


def check_depth(tests: Tests) -> Tests:
    """The same tests. ValueError where arguments or results are nested too deep to be given to a function."""
    for number, test in enumerate(tests.tests if tests.style == "function" else ()):
        level, depth = [test], 0
        while level:
            parts = [part for value in level for part in (value.values() if isinstance(value, dict) else value)]
            level = [part for part in parts if isinstance(part, list | tuple | dict)]
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(f"test {number} is nested more than {MAX_DEPTH} deep: leave it out")
    return tests


def parse_tests(text: str) -> Tests:
    """The tests of a text that `Tests.text` wrote.

    Raises:
        ValueError: it is none.
    """
    try:
        values = json.loads(text)
        return Tests(**values | {"tests": tuple(values["tests"]), "helpers": tuple(values.get("helpers", ()))})
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"the right answer {text[:60]!r} holds no tests of programs ({type(error).__name__}): data.answers has to "
            "be 'tests' where programs are judged"
        ) from error
