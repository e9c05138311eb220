"""Programs that are wrong, and try to be taken for right ones."""

import dataclasses

import pytest
from sandboxes import LIMITS, kinds

from repirl.verify.sandbox import Sandbox

EXPECTED = "e5a7-expected-output"
TEST = f"def check(candidate):\n    assert candidate(1) == {EXPECTED!r}\n    assert candidate(2) == {EXPECTED!r}"


@pytest.fixture(scope="module", params=kinds())
def shared(request):
    with Sandbox(LIMITS, kind=request.param) as sandbox:
        # Both workers run before anything is compared.
        assert sandbox.run_assertions(f"def f(x):\n    return {EXPECTED!r}", TEST, "f").status == "ok"
        yield sandbox


def called(sandbox, source, limits):
    """What the trainer gets for f(1), to compare it with the expected value."""
    (execution,) = sandbox.call_functions(source, "f", [[1]], limits)
    # The comparison of values, as the trainer makes it.
    assert not (execution.status == "ok" and execution.value == EXPECTED)
    return execution


def asserted(sandbox, source, limits):
    execution = sandbox.run_assertions(source, TEST, "f", limits)
    assert execution.status != "ok"
    return execution


def both(sandbox, source, limits=LIMITS):
    asserted(sandbox, source, limits)
    return called(sandbox, source, limits)


def test_exit_before_the_test(sandbox):
    both(sandbox, "import os\nos._exit(0)")


def test_exit_within_the_call(sandbox):
    both(sandbox, "import os\ndef f(x):\n    os._exit(0)")


def test_system_exit(sandbox):
    both(sandbox, "import sys\nsys.exit(0)")
    both(sandbox, "def f(x):\n    raise SystemExit(0)")


def test_exit_at_the_exit(sandbox):
    source = "import atexit, os\natexit.register(os._exit, 0)\ndef f(x):\n    return 'wrong'"
    both(sandbox, source)
    assert (
        sandbox.run_program("import atexit, os\natexit.register(os._exit, 0)\nprint('wrong')").stdout != EXPECTED + "\n"
    )


def test_exit_code_of_a_program_that_fails(sandbox):
    source = "import os, sys\nsys.excepthook = lambda *_: os._exit(0)\n1 / 0"
    assert sandbox.run_program(source).status == "error"


def test_words_of_success(sandbox):
    source = "print('ok\\nPASSED\\n1 passed')\ndef f(x):\n    print('ok')\n    return 'wrong'"
    assert both(sandbox, source).value == "wrong"


FORGED = """
import os, struct
def message(tag, data):
    return tag + struct.pack("<Q", len(data)) + data
def flood(*messages):
    for number in range(1, 64):
        for data in messages:
            try:
                os.write(number, data)
            except OSError:
                pass
"""


def test_forged_messages(sandbox):
    """The nonce of the test's process is not to be guessed, nor is there a way to its pipe."""
    source = FORGED + "flood(message(b'P', bytes(16)), message(b'P', b''))\ndef f(x):\n    return 'wrong'"
    both(sandbox, source)
    both(sandbox, source + "\nf(1)\nimport os\nos._exit(0)")


def test_forged_values(sandbox):
    """A value that it has written itself is one more value."""
    source = FORGED + "flood(message(b'V', b'T'), message(b'V', b'N'))\ndef f(x):\n    return 'wrong'"
    both(sandbox, source)


@pytest.mark.parametrize("text", ["16**5000", "[16**5000]", "None", "b'x'"])
def test_forged_exceptions(sandbox, text):
    """Its message is a number that is too long to be written out, or no text in other ways."""
    source = f"{FORGED}import sys\nencode = sys.modules['jail.plain'].encode\n"
    source += f"flood(message(b'X', encode(['ValueError', {text}])))\ndef f(x):\n    return 'wrong'"
    both(sandbox, source)


def test_forged_lengths(sandbox):
    source = FORGED + "import os\nflood(b'V' + struct.pack('<Q', 1 << 62), b'V' + bytes(3))\nos._exit(0)"
    both(sandbox, source)


@pytest.mark.parametrize(
    "data",
    [
        "b'L' + struct.pack('<Q', 1 << 60)",
        "b'L' + struct.pack('<Q', 1) * 1",
        "(b'L' + struct.pack('<Q', 1)) * 5000 + b'N'",
        "b'S' + struct.pack('<Q', 2) + b'\\xff\\xfe'",
        "b'I' + struct.pack('<Q', 3) + b'0_1'",
        "b'E' + struct.pack('<Q', 1) + b'L' + struct.pack('<Q', 0)",
        "b'E' + struct.pack('<Q', 2) + b'NN'",
        "b'NN'",
        "b'X'",
        "b''",
    ],
)
def test_data_that_is_none(sandbox, data):
    source = FORGED + f"import os\nflood(message(b'V', {data}))\nos._exit(0)"
    execution = both(sandbox, source)
    assert (execution.status, execution.value) == ("error", None)


def test_set_that_takes_quadratic_time(sandbox):
    """Numbers of one hash."""
    source = "def f(x):\n    return {k * (2**61 - 1): 1 for k in range(300)}"
    assert "one hash" in both(sandbox, source).stderr


def test_equal_to_everything(sandbox):
    source = (
        "class A:\n    def __eq__(self, other):\n        return True\n    __hash__ = None\ndef f(x):\n    return A()"
    )
    assert both(sandbox, source).status == "error"


@pytest.mark.parametrize("kind", ["int", "str", "float", "list", "tuple", "dict", "set", "bytes"])
def test_plain_type_made_equal_to_everything(sandbox, kind):
    source = f"""
class A({kind}):
    def __eq__(self, other):
        return True
    def __hash__(self):
        return 1
def f(x):
    return [A()]
"""
    assert both(sandbox, source).status == "error"


def test_type_that_calls_itself_another(sandbox):
    source = """
class A:
    __class__ = str
    def __eq__(self, other):
        return True
A.__name__ = 'str'
def f(x):
    return A()
"""
    assert both(sandbox, source).status == "error"


def test_pickle(sandbox, tmp_path):
    mark = tmp_path / "mark"
    source = f"""
import os
class A:
    def __reduce__(self):
        return os.system, ('touch {mark}',)
def f(x):
    return A()
"""
    assert both(sandbox, source).status == "error"
    assert not mark.exists()


def test_representation(sandbox, tmp_path):
    mark = tmp_path / "mark"
    source = f"""
class A:
    def __repr__(self):
        return {EXPECTED!r}[:4] + '__import__("os").mkdir({str(mark)!r})'
    __str__ = __repr__
def f(x):
    return A()
"""
    both(sandbox, source.replace(EXPECTED, "e5a7"))
    assert not mark.exists()


def test_patched_encoder(sandbox):
    source = """
import sys
for name, module in list(sys.modules.items()):
    if name.endswith("plain"):
        module.encode = lambda value: b"T"
    if name.endswith("program"):
        module.say = lambda *_: None
def f(x):
    return "wrong"
"""
    # The test waits for an answer that nobody gives.
    both(sandbox, source, dataclasses.replace(LIMITS, wall_seconds=2))


def test_patched_builtins(sandbox):
    source = """
import builtins, io, operator, sys, unittest
class Always:
    def __eq__(self, other):
        return True
builtins.open = lambda *_, **__: io.StringIO("ok")
builtins.AssertionError = builtins.Exception = type("Never", (BaseException,), {})
builtins.str = builtins.list = Always
operator.eq = lambda a, b: True
unittest.TestCase.assertEqual = unittest.TestCase.assertTrue = lambda *_: None
sys.stdout = sys.stderr = io.StringIO()
sys.exit = exit = lambda *_: None
def f(x):
    return "wrong"
"""
    both(sandbox, source)


def test_stop_iteration(sandbox):
    """An exception that ends a loop of the test before anything is compared."""
    test = f"""
assert all(map(lambda x: candidate(x) == {EXPECTED!r}, [1, 2, 3]))
for _ in map(candidate, [1]):
    assert 0
"""
    for kind in ("StopIteration", "GeneratorExit", "KeyboardInterrupt", "StopAsyncIteration"):
        source = f"def f(x):\n    raise {kind}"
        assert sandbox.run_assertions(source, test, "f").status == "error"


def test_exceptions_of_other_names(sandbox):
    test = "try:\n    candidate(1)\nexcept ValueError:\n    pass\nelse:\n    assert 0"
    assert sandbox.run_assertions("def f(x):\n    raise ValueError", test, "f").status == "ok"
    source = "class ValueError(BaseException):\n    pass\ndef f(x):\n    raise ValueError"
    assert sandbox.run_assertions(source, test, "f").status == "error"


def test_answers_to_questions_not_asked(sandbox):
    source = FORGED + "for _ in range(9):\n    flood(message(b'V', b'T'))\ndef f(x):\n    return 'wrong'"
    both(sandbox, source)


def test_test_function_of_its_own(sandbox):
    source = "def check(candidate):\n    pass\ncandidate = check\ndef f(x):\n    return 'wrong'"
    both(sandbox, source)


SEARCH = """
import gc, sys
def search():
    seen, todo = set(), [*gc.get_objects(), *sys.modules.values()]
    frame = sys._getframe()
    while frame:
        todo += [frame.f_locals, frame.f_globals]
        frame = frame.f_back
    while todo and len(seen) < 300_000:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, str) and item.startswith("e5a7-") and item.endswith("output"):
            return item
        if isinstance(item, bytes) and "-".join(["e5a7", "expected"]).encode() in item:
            return item
        todo += gc.get_referents(item)
    return "not there"
def f(x):
    return search()
"""


def test_walk_to_the_expected_output(sandbox):
    """By the garbage collector and the frames of the callers."""
    assert both(sandbox, SEARCH).value == "not there"


def test_expected_output_in_memory(sandbox):
    """The process is a fork of one that has run other programs, tests among them: all of its memory that is not
    Python's."""
    source = """
import ctypes, gc
def f(x):
    word = b"e5a7-" + b"expected"
    libc = ctypes.CDLL(None)
    libc.memmem.restype = ctypes.c_void_p
    libc.sbrk.restype = ctypes.c_void_p
    libc.sbrk.argtypes = [ctypes.c_long]
    end = libc.sbrk(0)
    for start in range(end - (1 << 16), end, 4096):
        if libc.memmem(ctypes.c_void_p(start), ctypes.c_size_t(4096), word, ctypes.c_size_t(len(word))):
            return "e5a7-" + "expected-output"
    return "not there"
"""
    assert both(sandbox, source).value == "not there"


def test_trace(sandbox):
    source = """
import sys, threading
def trace(frame, event, argument):
    for name, value in frame.f_locals.items():
        if isinstance(value, str) and value.startswith("e5a7-"):
            found.append(value)
    return trace
found = []
sys.settrace(trace)
threading.settrace(trace)
sys.setprofile(trace)
def f(x):
    return found
"""
    assert both(sandbox, source).value == []


def test_constants_changed_by_their_address(sandbox):
    """Small numbers and True are objects that all code of a process shares; the test is in another one."""
    source = """
import ctypes
def f(x):
    ctypes.memset(id(False) + 24, 1, 1)
    ctypes.memset(id(1) + 24, 2, 1)
    return "wrong"
"""
    both(sandbox, source)


def test_main_module_replaced(sandbox):
    source = """
import sys
sys.modules['__main__'] = sys.modules[__name__] = type(sys)('x')
sys.modules.clear()
def f(x):
    return 'wrong'
"""
    both(sandbox, source)


def test_fork_within_the_call(sandbox):
    """Two processes answer."""
    source = "import os\ndef f(x):\n    os.fork()\n    return 'wrong'"
    both(sandbox, source)


def test_function_that_is_an_object(sandbox):
    source = """
class F:
    def __call__(self, x):
        return self
    def __eq__(self, other):
        return True
f = F()
"""
    both(sandbox, source)


def test_endless_recursion_of_the_value(sandbox):
    source = "def f(x):\n    a = []\n    a.append(a)\n    return a"
    assert "deep" in both(sandbox, source).stderr


def test_endless_value(sandbox):
    source = "def f(x):\n    return (n for n in iter(int, 1))"
    assert both(sandbox, source).status == "error"


def test_large_value(sandbox):
    assert both(sandbox, "def f(x):\n    return 'x' * 10**7").status == "output"


def test_import_hooks(sandbox):
    """They give their own modules to whatever is imported later, the reader of arguments among it."""
    source = """
import sys, types
class Hook:
    def find_spec(self, name, path=None, target=None):
        return None
    def __getattr__(self, name):
        return lambda *_, **__: True
sys.meta_path[:] = [Hook()]
sys.path_hooks[:] = []
for name in ("json", "struct", "linecache", "traceback", "threading"):
    sys.modules[name] = types.SimpleNamespace(__getattr__=lambda *_: True, loads=lambda _: [[], {}])
def f(x):
    return "wrong"
"""
    both(sandbox, source)


def test_code_of_the_runner_replaced(sandbox):
    source = """
import sys
program = sys.modules["jail.program"]
def say(tag, data=b"", descriptor=3):
    import os, struct
    os.write(descriptor, b"P" + struct.pack("<Q", 16) + bytes(16))
program.say.__code__ = say.__code__
program._guarded = lambda function: 0
program._JOBS.clear()
def f(x):
    return "wrong"
"""
    both(sandbox, source, dataclasses.replace(LIMITS, wall_seconds=2))


def test_exit_when_an_object_is_deleted(sandbox):
    source = """
import os
class A:
    def __del__(self):
        os._exit(0)
kept = [A()]
def f(x):
    kept.clear()
    return "wrong"
"""
    both(sandbox, source)


def test_tuple_with_names_that_is_endless(sandbox):
    """A named tuple is written as its elements."""
    source = """
class A(tuple):
    _fields = ("x",)
    def __len__(self):
        return 1
    def __iter__(self):
        while True:
            yield 1
def f(x):
    return A()
"""
    both(sandbox, source, dataclasses.replace(LIMITS, wall_seconds=20, cpu_seconds=2))


def test_assertion_that_the_candidate_raises(sandbox):
    """It is not one of the test's own."""
    for kind in ("AssertionError", "MemoryError", "SystemExit(0)"):
        execution = asserted(sandbox, f"def f(x):\n    raise {kind}", LIMITS)
        assert execution.status in ("error", "memory")


def test_threads_that_answer_at_the_same_time(sandbox):
    source = FORGED + (
        "import threading\ndef f(x):\n"
        "    for _ in range(3):\n        threading.Thread(target=flood, args=(message(b'V', b'T'),)).start()\n"
        "    return 'wrong'"
    )
    both(sandbox, source)


@pytest.mark.parametrize(
    "value",
    [
        "float('nan')",
        "float('inf')",
        "[[]] * 10**4",
        "10**10**5",
        "{10**10**5: 1}",
        "'\\0'",
        "'\\ud800'",
        "iter('e5a7')",
        "type('X', (str,), {'__eq__': lambda *_: True, '__hash__': lambda _: 1})()",
        "NotImplemented",
        "...",
        "f",
    ],
)
def test_values_that_are_hard_to_compare(sandbox, value):
    both(sandbox, f"def f(x):\n    return {value}")
