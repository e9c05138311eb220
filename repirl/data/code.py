"""The tests of programs in the rows of public data sets, and of users.

| format        | columns                                                                                   |
|---------------|-------------------------------------------------------------------------------------------|
| HumanEval     | `prompt`, `entry_point`, `test`, which defines check(candidate)                           |
| MBPP          | `test_list`, a list of assertions; `test_setup_code` or `test_imports`                    |
| LiveCodeBench | `public_test_cases`, `private_test_cases`, `metadata` (func_name), `starter_code`         |
| APPS, TACO    | `input_output`: JSON of inputs, outputs and maybe fn_name; `starter_code`                  |
| LeetCode      | `test` as HumanEval's, `entry_point` such as Solution().twoSum, `starter_code`            |
| one's own     | a list of {"input": ..., "output": ...} or {"assert": ...}, or JSON of one; `entry_point` |

What is given to functions and what they return is plain data: numbers, texts, lists, tuples, sets and dicts. Tests with
other objects, such as the nodes of a tree, do not pass.
"""

from __future__ import annotations

import ast
import base64
import builtins
import io
import json
import pickle
import re
import zlib
from typing import Any

from repirl.data.values import Place, shown
from repirl.verify.code_blocks import whole_head
from repirl.verify.code_tests import Tests, check_depth, parse_tests

# Columns by which a format is known, where the column of answers is not there.
_KNOWN = ("test_list", "public_test_cases", "input_output", "test", "tests")
# Bytes of a compressed list of tests, unpacked.
_MAX_UNPACKED = 1 << 30


def read_tests(row: dict[str, Any], place: Place, column: str, option: str) -> Tests:
    """The tests of a row.

    Args:
        row: of the data.
        place: where it stands.
        column: that holds the tests; where the row has none of this name, those of a public format count.
        option: which names the column, for messages.

    Raises:
        DataError: there are no tests, or in no format that is known, or values are nested too deep.
    """
    tests = _read(row, place, column, option)
    try:
        return check_depth(tests)
    except ValueError as error:
        raise place.error(str(error)) from error


def _read(row: dict[str, Any], place: Place, column: str, option: str) -> Tests:
    known = next((name for name in _KNOWN if row.get(name)), None)
    is_there = row.get(column) is not None or "." in column
    name = column if is_there or known is None else known
    value = _from_json(place.value(row, name, option), place, name)
    if name == "public_test_cases" or (isinstance(value, list) and value and _is_livecodebench(value[0])):
        return _livecodebench(row, place, value)
    if isinstance(value, str):
        return _check_function(row, place, value, name)
    if isinstance(value, dict):
        if "style" in value:
            return _written(place, value, name)
        if {"inputs", "outputs"} <= set(value):
            return _apps(row, place, value, name)
        raise place.error(f"{name!r} has {sorted(map(str, value))}, expected inputs and outputs, or a list of tests")
    if not isinstance(value, list) or not value:
        raise place.error(f"{name!r} holds {shown(value)}, expected tests: a list of them, or the text of assertions")
    return _listed(row, place, value, name)


def _written(place: Place, value: dict[str, Any], name: str) -> Tests:
    """As `Tests.text` wrote them, such as into the rows of `repirl sample`."""
    try:
        return parse_tests(json.dumps(value))
    except ValueError as error:
        raise place.error(f"{name!r}: {error}") from error


def _from_json(value: Any, place: Place, name: str) -> Any:
    """A list or an object that is written as a text; an assertion is none."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise place.error(f"{name!r} begins as JSON, but is none: {error}") from error


def _text(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    return value if isinstance(value, str) else ""


def _entry(row: dict[str, Any], place: Place) -> str | None:
    """f of `f`, Solution.f of `Solution().f` and `Solution.f`."""
    value = row.get("entry_point") or row.get("fn_name")
    if value is None:
        return None
    name = re.sub(r"\(\s*\)", "", str(value)).strip()
    if not re.fullmatch(r"\w+(\.\w+)?", name):
        raise place.error(f"'entry_point' is {shown(value)}, expected the name of a function, such as f or Solution.f")
    return name


def _named(name: str, starter: str) -> str:
    """The method of class Solution, where the starter code has one."""
    return f"Solution.{name}" if re.search(r"^\s*class\s+Solution\b", starter, re.M) else name


def _check_function(row: dict[str, Any], place: Place, test: str, name: str) -> Tests:
    """HumanEval's test, LeetCode's, or assertions in one text."""
    entry = _entry(row, place)
    starter = "\n\n".join(filter(None, [_starter_of(_text(row, "prompt")), _text(row, "starter_code")]))
    if re.search(r"^def\s+check\s*\(", test, re.M):
        if entry is None:
            raise place.error(f"{name!r} defines check(candidate), but there is no column 'entry_point' that names it")
        setup = _without(starter, entry)
        helpers = tuple(name for name in _called(f"{setup}\n{test}", place, name) if name != entry)
        return Tests("assertions", (test,), entry, helpers, calls_check=True, starter=starter, setup=setup)
    if "assert" not in test:
        raise place.error(f"{name!r} holds {shown(test)}, expected tests: assertions, JSON, or a list of tests")
    return _assertions(row, place, [test], name)


def _without(starter: str, entry: str) -> str:
    """What tests may use of the starter code, such as imports and helpers: all but the function that is asked for."""
    try:
        tree = ast.parse(whole_head(starter))
    except (SyntaxError, ValueError, RecursionError):
        return ""
    kept = [node for node in tree.body if getattr(node, "name", None) not in entry.split(".")]
    return ast.unparse(ast.Module(kept, []))


def _starter_of(prompt: str) -> str:
    """The prompt, where it is code to go on from, as HumanEval's."""
    try:
        tree = ast.parse(prompt)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    return prompt if any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree.body) else ""


def _assertions(row: dict[str, Any], place: Place, texts: list[str], name: str, setup: str = "") -> Tests:
    """Statements with assertions, whose functions are those that they call and do not define."""
    called = dict.fromkeys(function for text in texts for function in _called(f"{setup}\n{text}", place, name))
    entry = _entry(row, place) or next(iter(called), None)
    if entry is None:
        raise place.error(f"{name!r} calls no function that a program could define: {shown(texts[0])}")
    helpers = tuple(other for other in called if other not in (entry, entry.rpartition(".")[2]))
    return Tests("assertions", tuple(texts), entry, helpers, starter=_text(row, "starter_code"), setup=setup)


def _called(test: str, place: Place, name: str) -> list[str]:
    """Names that a test calls and that nothing in it binds, in the order of their first calls."""
    try:
        nodes = [*ast.walk(ast.parse(test))]
    except (SyntaxError, ValueError, RecursionError) as error:
        raise place.error(f"{name!r} holds a test that is no Python: {error}") from error
    bound = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(part.asname or part.name).partition(".")[0] for part in node.names}
    calls = [node.func for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    calls.sort(key=lambda call: (call.lineno, call.col_offset))
    return [call.id for call in calls if call.id not in bound and not hasattr(builtins, call.id)]


def _listed(row: dict[str, Any], place: Place, values: list[Any], name: str) -> Tests:
    """A list of tests: MBPP's assertions, or inputs and outputs."""
    starter, entry = _text(row, "starter_code"), _entry(row, place)
    tests = [{"assert": value} if isinstance(value, str) else value for value in values]
    for number, test in enumerate(tests):
        if not isinstance(test, dict):
            raise place.error(f"{name}.{number} is {shown(test)}, expected a test: text or an object")
    if all(test.get("assert") for test in tests):
        imports = row.get("test_imports")
        setup = "\n".join(imports) if isinstance(imports, list) else ""
        setup = "\n".join(filter(None, [setup, _text(row, "test_setup_code")]))
        texts = [place.text(test["assert"], f"{name}.{i}.assert") for i, test in enumerate(tests)]
        return _assertions(row, place, texts, name, setup)
    for number, test in enumerate(tests):
        if "input" not in test or not {"output", "outputs"} & set(test):
            raise place.error(
                f"{name}.{number} is a test with {sorted(map(str, test))}, expected input and output (or outputs, of "
                "which any is right), or assert; all tests of a row alike"
            )
    if entry is None:
        return _programs(place, [(test["input"], _outputs(test)) for test in tests], name, starter)
    return Tests(
        "function",
        tuple(_call(test["input"]) | {"outputs": _outputs(test)} for test in tests),
        _named(entry, starter) if "." not in entry else entry,
        starter=starter,
    )


def _outputs(test: dict[str, Any]) -> list[Any]:
    if isinstance(several := test.get("outputs"), list) and several:
        return several
    return [test.get("output")]


def _call(arguments: Any) -> dict[str, Any]:
    """A list holds the arguments, an object those with names; anything else is the one argument."""
    if isinstance(arguments, dict):
        return {"args": [], "kwargs": arguments}
    return {"args": arguments if isinstance(arguments, list) else [arguments], "kwargs": {}}


def _programs(place: Place, tests: list[tuple[Any, list[Any]]], name: str, starter: str = "") -> Tests:
    """Tests of programs; where a text is a list, it holds its lines."""

    def joined(value: Any, number: int) -> str:
        if isinstance(value, list) and all(isinstance(line, str) for line in value):
            return "\n".join(value)
        if not isinstance(value, str):
            raise place.error(
                f"test {number} of {name!r} holds {shown(value)}, expected text for stdin or from stdout; "
                "a function that is to be called is named by a column 'entry_point'"
            )
        return value

    return Tests(
        "program",
        tuple(
            {"input": joined(text, number), "outputs": [joined(right, number) for right in outputs]}
            for number, (text, outputs) in enumerate(tests)
        ),
        starter=starter,
    )


def _apps(row: dict[str, Any], place: Place, value: dict[str, Any], name: str) -> Tests:
    inputs, outputs, starter = value["inputs"], value["outputs"], _text(row, "starter_code")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs) or not inputs:
        raise place.error(f"{name!r} needs as many inputs as outputs, at least one")
    function = value.get("fn_name")
    if not function:
        return _programs(place, [(given, [right]) for given, right in zip(inputs, outputs, strict=True)], name, starter)
    tests = []
    for given, right in zip(inputs, outputs, strict=True):
        # Some rows have the result in a list of one.
        several = [right, right[0]] if isinstance(right, list) and len(right) == 1 else [right]
        tests.append(_call(given) | {"outputs": several})
    return Tests("function", tuple(tests), _named(str(function), starter), starter=starter)


def _is_livecodebench(test: Any) -> bool:
    return isinstance(test, dict) and "testtype" in test


def _livecodebench(row: dict[str, Any], place: Place, public: Any) -> Tests:
    private = row.get("private_test_cases")
    hidden = _unpacked(private, place) if private else []
    tests = [*(public if isinstance(public, list) else []), *hidden]
    if not tests or not all(isinstance(test, dict) and {"input", "output"} <= set(test) for test in tests):
        raise place.error("'public_test_cases' and 'private_test_cases' hold no tests with input and output")
    starter = _text(row, "starter_code")
    metadata = _from_json(row.get("metadata") or {}, place, "metadata")
    function = metadata.get("func_name") if isinstance(metadata, dict) else None
    if not function:
        return _programs(place, [(test["input"], [test["output"]]) for test in tests], "public_test_cases", starter)
    try:
        # An argument a line, as JSON.
        calls = [
            _call([json.loads(line) for line in test["input"].split("\n") if line.strip()])
            | {"outputs": [json.loads(test["output"])]}
            for test in tests
        ]
    except (ValueError, AttributeError, RecursionError) as error:
        raise place.error(f"a test of {function!r} is no JSON: {error}") from error
    return Tests("function", tuple(calls), _named(str(function), starter), starter=starter)


class _Texts(pickle.Unpickler):
    """Reads texts and nothing that could run."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds an object of {module}.{name}")


def _unpacked(value: Any, place: Place) -> list[Any]:
    """Private tests: JSON, which may be pickled as a text, compressed and in base64."""
    if isinstance(value, list):
        return value
    try:
        if value.lstrip().startswith("["):
            return list(json.loads(value))
        unpacker = zlib.decompressobj()
        packed = unpacker.decompress(base64.b64decode(value.encode("ascii"), validate=True), _MAX_UNPACKED)
        text = _Texts(io.BytesIO(packed)).load()
        return list(json.loads(text))
    except Exception as error:
        raise place.error(f"'private_test_cases' cannot be read: {type(error).__name__}: {error}") from error
