"""YAML as people read it: what looks like text is text, and nothing is dropped or multiplied without a word.

YAML 1.1, which PyYAML reads, takes `1:30` for 90, `017` for 15, `no` for false and `1e-4` for text, keeps the last of
two equal keys, and lets a few lines of aliases stand for millions of values. Here numbers and truth values are those of
YAML 1.2's core schema, decimal and without leading zeros; equal keys and such aliases are errors.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

# More values than any configuration has.
MAX_VALUES = 100_000

_RESOLVERS = {
    "tag:yaml.org,2002:bool": r"true|True|TRUE|false|False|FALSE",
    "tag:yaml.org,2002:null": r"~|null|Null|NULL|",
    "tag:yaml.org,2002:int": r"[-+]?(?:0|[1-9][0-9_]*)",
    "tag:yaml.org,2002:float": r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    "tag:yaml.org,2002:merge": r"<<",
}


class YAMLProblem(ValueError):
    """What is wrong with a text, in one line."""


class _Loader(yaml.SafeLoader):
    """Refuses equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, yaml.Node] = {}
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                key = key_node.value
                if key in seen:
                    lines = [mark.line + 1 for mark in (seen[key].start_mark, key_node.start_mark)]
                    raise YAMLProblem(f"{key!r} stands there twice, in lines {lines[0]} and {lines[1]}")
                seen[key] = key_node
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would take for more than text."""


# Tables of their own: those of the base classes are shared.
_Loader.yaml_implicit_resolvers = {}
_Dumper.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeDumper.yaml_implicit_resolvers.items()}
for _tag, _pattern in _RESOLVERS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern})$"), None)


def _count(node: yaml.Node, counts: dict[int, int], path: set[int]) -> int:
    """Values that a node stands for, aliases written out."""
    if id(node) in path:
        raise YAMLProblem("an alias refers to what it is part of")
    if id(node) not in counts:
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        path.add(id(node))
        counts[id(node)] = 1 + sum(_count(part, counts, path) for part in parts)
        path.remove(id(node))
    return counts[id(node)]


def load_yaml(text: str) -> Any:
    """The value of one YAML document of plain types; None for an empty one. YAMLProblem where there is none."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if (count := _count(node, {}, set())) > MAX_VALUES:
                raise YAMLProblem(f"its aliases stand for {count} values; at most {MAX_VALUES} are read")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError as error:
        raise YAMLProblem("it is nested too deep") from error
    except yaml.YAMLError as error:
        raise YAMLProblem(" ".join(str(error).split())) from error
    except YAMLProblem:
        raise
    except ValueError as error:
        # Integers of thousands of digits.
        raise YAMLProblem(str(error)) from error


def dump_yaml(values: Any) -> str:
    """Plain values as YAML, keys in their order; `load_yaml` reads the same back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)
