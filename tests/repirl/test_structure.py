"""The house rules that a machine can check: who imports whom, and how long files and functions are."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from shared import ROOT

PACKAGES = {"repirl_kernels": ROOT / "kernels" / "repirl_kernels", "repirl": ROOT / "repirl"}
# What each package may import of ours: those below it.
BELOW = {"repirl_kernels": set(), "repirl": {"repirl_kernels"}}
# Modules that are no Python.
COMPILED = {"repirl_kernels._native"}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 450, 60, 8


@cache
def sources() -> dict[str, Path]:
    """Module name -> file."""
    modules = {}
    for package, folder in PACKAGES.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            modules[".".join([package, *parts]).removesuffix(".__init__")] = file
    return modules


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(sources()[module].read_text(encoding="utf-8"))


def imported(module: str) -> Iterator[str]:
    """Our modules that a module imports, anywhere in it: in functions and for types, too."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                is_package = sources()[module].name == "__init__.py"
                parents = module.split(".")[: None if node.level == is_package else is_package - node.level]
                start = ".".join([*parents, *filter(None, [node.module])])
            names = [f"{start}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name in COMPILED:
                continue
            while name not in sources() and "." in name:
                name = name.rpartition(".")[0]
            if name in sources() and name != module:
                yield name


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Some circle of a graph, empty if there is none."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for other in sorted(graph[node]):
            if circle := visit(other, [*path, node]):
                return circle
        done.add(node)
        return []

    return next((circle for node in graph if (circle := visit(node, []))), [])


def test_circle_finds_circles():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_no_module_imports_in_a_circle():
    graph = {module: set(imported(module)) for module in sources()}
    assert sum(map(len, graph.values())) > 100
    assert not circle(graph)


def test_nothing_imports_upward():
    for module in sources():
        package = module.partition(".")[0]
        others = {name.partition(".")[0] for name in imported(module)} - {package}
        assert others <= BELOW[package], module
        text = sources()[module].read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) (bench|tests)\b", text, re.M), module
        assert "sys.path.insert" not in text, module
    # Within repirl: the command line and its applications are what nothing else needs.
    for module in sources():
        if module.startswith("repirl.") and not module.startswith(("repirl.apps", "repirl.cli")):
            assert not [name for name in imported(module) if name.startswith(("repirl.apps.", "repirl.cli"))], module


def functions(module: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{sources()[module].relative_to(ROOT)}:{node.lineno} {node.name}", node


def test_the_loop_is_read_in_one_go():
    assert len(sources()["repirl.loop"].read_text().splitlines()) <= 150


@pytest.mark.parametrize("module", [name for name in sources() if name.startswith("repirl.")])
def test_files_and_functions_are_short(module):
    file = sources()[module]
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    for place, function in functions(module):
        assert function.end_lineno - function.lineno + 1 <= MAX_FUNCTION_LINES, place
        arguments = function.args
        count = len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs])
        is_method = bool(arguments.args) and arguments.args[0].arg in ("self", "cls")
        assert count - is_method <= MAX_PARAMETERS, place


def test_only_the_table_knows_systems_by_name():
    """Nowhere else is a system's name compared with; options are asked of its row."""
    for module in sources():
        if module == "repirl.systems":
            continue
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute) and node.left.attr == "objective":
                values = [v for part in node.comparators for v in ast.walk(part) if isinstance(v, ast.Constant)]
                assert not any(isinstance(v.value, str) for v in values), f"{module}:{node.lineno}"
