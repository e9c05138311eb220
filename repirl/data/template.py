"""Chat templates. They are programs that come with a model: they may be wrong, refuse, or never end."""

from __future__ import annotations

import inspect
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from jinja2 import Environment, TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from transformers import PreTrainedTokenizerBase

from repirl.config import first_line
from repirl.data.errors import DataError
from repirl.data.values import Messages
from repirl.dataconfig import DataConfig

# Of computing, for one prompt; a template takes less than a millisecond.
_SECONDS = 10.0
# What transformers gives every template.
_GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}


def render(
    messages: Messages, data: DataConfig, tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool = True
) -> str:
    """The messages inside the tokenizer's chat template. DataError, which says why, where that cannot be."""
    template = _template(tokenizer)
    known = frozenset(_GIVEN | set(tokenizer.SPECIAL_TOKENS_ATTRIBUTES) | set(tokenizer.special_tokens_map))
    options = frozenset(inspect.signature(tokenizer.apply_chat_template).parameters)
    _check(template, frozenset(data.chat_template_kwargs), known, options)
    arguments: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, **data.chat_template_kwargs}
    try:
        with _time_limit():
            return str(tokenizer.apply_chat_template(messages, tokenize=False, **arguments))
    except TimeoutError as error:
        raise DataError(
            f"the chat template took more than {_SECONDS:g} seconds for one prompt and was stopped: mend it, or use "
            "data.prompt_template"
        ) from error
    except Exception as error:
        way_out = "; leave out data.system if it is that" if data.system is not None else ""
        raise DataError(f"the chat template fails ({first_line(error)}){way_out}") from error


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            raise DataError(
                f"the tokenizer has the chat templates {sorted(template)} and none of them is 'default': save the "
                "tokenizer with one of them as its chat_template"
            )
        template = template["default"]
    if not template:
        raise DataError("data.chat_template is true but the tokenizer has no chat template; use data.prompt_template")
    return str(template)


class _Generation(Extension):
    """transformers' tag around what the assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@cache
def _check(template: str, given: frozenset[str], known: frozenset[str], options: frozenset[str]) -> None:
    """DataError for a template that is none, for `chat_template_kwargs` that it does not read, and for variables that
    it prints and nobody sets."""
    environment = Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(template)
        read = meta.find_undeclared_variables(tree) - known - set(environment.globals)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        raise DataError(
            f"the chat template is not valid Jinja: {first_line(error)}" + (f" (line {line})" if line else "")
        ) from error
    for name in sorted(given):
        if name in options or name not in read:
            others = sorted(read - options)
            raise DataError(
                f"data.chat_template_kwargs has {name!r}, which the chat template does not read; it reads "
                f"{others if others else 'no variables of that kind'}"
            )
    tested: list[nodes.Node] = [test.node for test in tree.find_all(nodes.Test)]
    tested += [choice.test for choice in tree.find_all(nodes.If)]
    tested += [choice.test for choice in tree.find_all(nodes.CondExpr)]
    guarded = {
        name.name for node in tested for name in [node, *node.find_all(nodes.Name)] if isinstance(name, nodes.Name)
    }
    printed = {name for output in tree.find_all(nodes.Output) for node in output.nodes for name in _printed(node)}
    if unset := sorted((printed & read) - given - guarded):
        raise DataError(
            f"the chat template prints {unset[0]!r}, which nothing sets: set data.chat_template_kwargs.{unset[0]}"
        )


def _printed(node: nodes.Node) -> Iterator[str]:
    """Names whose values become text, unless they have defaults."""
    if isinstance(node, nodes.Name):
        yield node.name
    elif isinstance(node, nodes.Filter) and node.node is not None and node.name not in ("default", "d"):
        yield from _printed(node.node)
    elif isinstance(node, nodes.Add | nodes.Concat):
        for child in node.iter_child_nodes():
            yield from _printed(child)


@contextmanager
def _time_limit() -> Iterator[None]:
    """TimeoutError inside after _SECONDS of this process's computing; no limit but in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
