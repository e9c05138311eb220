"""The verifier of programs: `verifier: {kind: code}`. Programs run in repirl.verify.sandbox; what they wrote or
returned is compared outside, where they cannot reach."""

from __future__ import annotations

import json
import re
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from hashlib import blake2b
from time import monotonic
from typing import Any

from repirl.config import ConfigError
from repirl.options import VerifierConfig
from repirl.verify.code_blocks import find_code
from repirl.verify.code_compare import same_output, same_value
from repirl.verify.code_tests import Tests, check_depth, parse_tests
from repirl.verify.process import Verifier
from repirl.verify.sandbox import Execution, Limits, Sandbox

# By what is wrong, as metrics count it; and the kind of the reason that `repirl judge` shows.
KINDS = {
    "no_code": "no code found",
    "compile_errors": "compile error",
    "wrong_answers": "wrong answer",
    "timeouts": "timed out",
    "memory": "out of memory",
    "output_limits": "too much output",
    "crashes": "crashed",
}
_STATUS = {
    "compile_error": "compile_errors",
    "timeout": "timeouts",
    "memory": "memory",
    "output": "output_limits",
    "error": "crashes",
    "killed": "crashes",
    "processes": "crashes",
    "wrong": "wrong_answers",
}
# Imports that the methods of a class Solution may rely on, as on the sites that ask for one.
SOLUTION_IMPORTS = (
    "import bisect, collections, copy, functools, heapq, itertools, math, operator, random, re, string, sys\n"
    "from bisect import *\nfrom collections import *\nfrom functools import *\nfrom heapq import *\n"
    "from itertools import *\nfrom math import ceil, comb, factorial, floor, gcd, inf, isqrt, lcm, log, log2, sqrt\n"
    "from typing import *\n"
)
# Characters of an error that a reason quotes.
_MAX_QUOTED = 120


class CodeVerifier:
    """Judges programs, several at a time, as repirl.verify.process.Verifier judges answers. A right answer is the text
    of repirl.verify.code_tests.Tests.

    counts: responses so far by what was wrong (keys of KINDS), and `judged_twice` and `differing` of these.
    """

    def __init__(self, config: VerifierConfig) -> None:
        """Start the sandbox, and load the user's checker, if there is one.

        Raises:
            ConfigError: there is no sandbox to be had here, or the checker cannot be loaded.
            RunError: a worker does not start.
        """
        self.config, self.options = config, config.code
        self.reasons: dict[int, str] = {}
        self.counts: Counter[str] = Counter()
        self._checker: Verifier | None = None
        # One checker for all threads.
        self._lock = threading.Lock()
        self._gives_up = threading.Event()
        if self.options.checker is not None:
            self._checker = Verifier(VerifierConfig(kind="custom", function=self.options.checker))
        self._sandbox: Sandbox | None = None
        self._opened()

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Judge responses.

        Args:
            pairs: (response, tests).

        Returns:
            The reward of each, in order: 1 where all tests pass, else 0; with `partial_credit` the share that passes.

        Raises:
            ConfigError: a right answer holds no tests.
            RunError: the user's checker is at fault.
        """
        self.reasons = {}
        self._gives_up.clear()
        sandbox = self._opened()
        with warnings.catch_warnings(), ThreadPoolExecutor(self.config.processes, "code") as threads:
            warnings.simplefilter("ignore")
            judgements = [threads.submit(self._judge, sandbox, *pair) for pair in pairs]
            again = {i: threads.submit(self._judge, sandbox, *pairs[i]) for i in self._judged_twice(pairs)}
            try:
                verdicts = [judgement.result() for judgement in judgements]
                second = {i: judgement.result() for i, judgement in again.items()}
            except BaseException:
                # What runs now is waited for, and no more.
                self._gives_up.set()
                for judgement in (*judgements, *again.values()):
                    judgement.cancel()
                raise
        for index, (_, kind, reason) in enumerate(verdicts):
            self.reasons[index] = reason
            if kind is not None:
                self.counts[kind] += 1
        self.counts["judged_twice"] += len(second)
        self.counts["differing"] += sum(verdict[0] != verdicts[i][0] for i, verdict in second.items())
        return [reward for reward, _, _ in verdicts]

    def close(self) -> None:
        """End the sandbox and whatever runs there. More may be judged afterwards, in a new one."""
        sandbox, self._sandbox = self._sandbox, None
        if sandbox is not None:
            sandbox.close()
        if self._checker is not None:
            self._checker.close()

    def _opened(self) -> Sandbox:
        if self._sandbox is None:
            options = self.options
            limits = Limits(
                wall_seconds=options.test_seconds,
                cpu_seconds=options.test_seconds,
                memory_mb=options.memory_mb,
                processes=options.max_processes,
                open_files=options.max_open_files,
                file_mb=options.max_file_mb,
                output_kb=options.max_output_kb,
            )
            workers, anywhere = self.config.processes, options.allow_unsandboxed
            try:
                self._sandbox = Sandbox(limits, workers=workers, allow_unsandboxed=anywhere)
            except ConfigError as error:
                raise ConfigError(f"{error} (in a configuration verifier.code.allow_unsandboxed: true)") from error
        return self._sandbox

    def _judged_twice(self, pairs: Sequence[tuple[str, str]]) -> list[int]:
        """Which are; a function of the texts, so that a run that goes on judges the same ones."""
        share = self.options.judge_twice
        if share == 0:
            return []
        digests = [
            blake2b(f"{answer}\n{response}".encode("utf-8", "replace"), digest_size=8) for response, answer in pairs
        ]
        return [i for i, digest in enumerate(digests) if int.from_bytes(digest.digest(), "big") < share * 2**64]

    def _judge(self, sandbox: Sandbox, response: str, answer: str) -> tuple[float, str | None, str]:
        """(reward, key of KINDS or None where all is right, reason)."""
        tests = _parsed(answer)
        code = find_code(response, tests.entry, _before(tests))
        if code is None:
            return 0.0, "no_code", KINDS["no_code"]
        if tests.style == "function" and (entry := _in_solution(code, tests.entry)):
            # With the imports that such a class relies on.
            tests = replace(tests, entry=entry)
            code = find_code(response, entry, _before(tests)) or code
        # What was printed or written before does not matter; what cannot be encoded is no program.
        code = code.encode("utf-8", "replace").decode()
        return _summary(self._results(sandbox, code, tests), len(tests.tests), self.options.partial_credit)

    def _results(self, sandbox: Sandbox, code: str, tests: Tests) -> Iterable[tuple[str | None, str]]:
        """For each test in turn (key of KINDS or None, detail)."""
        deadline = monotonic() + self.config.timeout_seconds
        late = ("timeouts", f"all tests together took more than {self.config.timeout_seconds:g} s")
        if tests.style == "function":
            yield from self._calls(sandbox, code, tests)
            return
        for test in tests.tests:
            if self._gives_up.is_set():
                return
            if monotonic() > deadline:
                yield late
            elif tests.style == "program":
                yield self._program(sandbox, code, test)
            else:
                yield self._assertion(sandbox, code, tests, test)

    def _program(self, sandbox: Sandbox, code: str, test: dict[str, Any]) -> tuple[str | None, str]:
        longest = max(len(right.encode("utf-8", "replace")) for right in test["outputs"])
        execution = sandbox.run_program(code, test["input"], _limits(sandbox, longest))
        if execution.status != "ok":
            return _failed(execution)
        if self._passes(execution.stdout, test):
            return None, ""
        return "wrong_answers", f"{_quoted(execution.stdout)} instead of {_quoted(test['outputs'][0])}"

    def _passes(self, output: str, test: dict[str, Any]) -> bool:
        if self._checker is None:
            return any(same_output(output, right, self.options.float_tolerance) for right in test["outputs"])
        return self._checked(output, test)

    def _checked(self, output: str, test: dict[str, Any]) -> bool:
        assert self._checker is not None
        with self._lock:
            return self._checker.judge([(output, json.dumps(test, default=repr))])[0] > 0.5

    def _calls(self, sandbox: Sandbox, code: str, tests: Tests) -> Iterable[tuple[str | None, str]]:
        assert tests.entry is not None
        # Tests are JSON, which long arguments are read from in a fraction of the time.
        calls = [[json.dumps([test["args"], test["kwargs"]])] for test in tests.tests]
        # Plain data takes at most a few times the bytes of JSON.
        longest = 4 * len(json.dumps([test["outputs"] for test in tests.tests]))
        executions = sandbox.call_functions(
            f"{code}\n{_by_json(tests.entry)}", _BY_JSON, calls, _limits(sandbox, longest)
        )
        for execution, test in zip(executions, tests.tests, strict=True):
            if execution.status != "ok":
                yield _failed(execution)
            elif self._checker is not None:
                passes = self._checked(_as_json(execution.value), test)
                yield (None, "") if passes else ("wrong_answers", f"{_shown(execution.value)} is not accepted")
            elif any(_same(execution.value, right, self.options.float_tolerance) for right in test["outputs"]):
                yield None, ""
            else:
                yield "wrong_answers", f"{_shown(execution.value)} instead of {_shown(test['outputs'][0])}"

    def _assertion(self, sandbox: Sandbox, code: str, tests: Tests, test: str) -> tuple[str | None, str]:
        execution = sandbox.run_assertions(code, f"{tests.setup}\n{test}", tests.names)
        return (None, "") if execution.status == "ok" else _failed(execution)


def _limits(sandbox: Sandbox, expected_bytes: int) -> Limits:
    """The sandbox's own, with room for twice what is expected besides: a right output is never too much."""
    own = sandbox.limits
    return replace(own, output_kb=own.output_kb + (2 * expected_bytes >> 10))


# The function that calls another one with the arguments that a text holds.
_BY_JSON = "_repirl_by_json"


def _by_json(entry: str) -> str:
    """The source of it. Each call of a method has an object of its own, as on the sites that ask for a class."""
    owner, _, method = entry.rpartition(".")
    function = f"{owner}().{method}" if owner else method
    return (
        f"def {_BY_JSON}(text):\n    import json\n    args, kwargs = json.loads(text)\n"
        f"    return {function}(*args, **kwargs)\n"
    )


def _in_solution(code: str, entry: str | None) -> str | None:
    """Solution.f, where f is asked for and a program has it as a method of a class Solution only."""
    if entry is None or "." in entry or not re.search(r"^class\s+Solution\b", code, re.M):
        return None
    is_method = re.search(rf"^[ \t]+def\s+{entry}\b", code, re.M)
    is_beside = re.search(rf"^def\s+{entry}\b|^{entry}\s*(?::[^=\n]+)?=", code, re.M)
    return f"Solution.{entry}" if is_method and not is_beside else None


def _before(tests: Tests) -> str:
    """What stands before a program: its starter code, and what it may rely on besides."""
    imports = SOLUTION_IMPORTS if tests.entry is not None and "." in tests.entry else ""
    # The setup of check(candidate) is a part of the starter code.
    setup = "" if tests.calls_check else tests.setup
    return "\n".join(filter(None, [imports, setup, tests.starter]))


@lru_cache(1 << 10)
def _parsed(answer: str) -> Tests:
    try:
        return check_depth(parse_tests(answer))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _summary(
    results: Iterable[tuple[str | None, str]], count: int, partial_credit: bool
) -> tuple[float, str | None, str]:
    """The verdict of the tests' results; only those are looked at that it needs."""
    passed, first = 0, None
    for number, (kind, detail) in enumerate(results, 1):
        if kind is None:
            passed += 1
            continue
        where = f"test {number} of {count}: " if count > 1 else ""
        first = first or (kind, f"{KINDS[kind]}: {where}{detail}")
        if not partial_credit:
            break
    if first is None:
        return 1.0, None, "passed"
    return (passed / count if partial_credit else 0.0), *first


def _failed(execution: Execution) -> tuple[str, str]:
    kind = _STATUS[execution.status]
    lines = execution.stderr.strip().splitlines()
    if kind == "timeouts":
        return kind, f"{execution.seconds:.1f} s"
    return kind, _quoted(lines[-1] if lines else f"exit code {execution.exit_code}")


def _same(actual: Any, expected: Any, tolerance: float) -> bool:
    try:
        return same_value(actual, expected, tolerance)
    except (RecursionError, ValueError):
        return False


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return repr(value)


def _shown(value: Any) -> str:
    try:
        return _quoted(repr(value))
    except (RecursionError, ValueError):
        # A number too long to be written out, or too many brackets.
        return f"a value of type {type(value).__name__}"


def _quoted(text: str) -> str:
    """The beginning of what a program wrote, on one line, without characters that a terminal obeys."""
    text = " ".join(text[: 4 * _MAX_QUOTED].split())
    text = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
    return text if len(text) <= _MAX_QUOTED else text[: _MAX_QUOTED - 3] + "..."
