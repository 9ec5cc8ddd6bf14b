"""Jinja as chat templates expect it: what `transformers` adds, in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.chat.call_history import WrittenArguments
from quant.errors import ConfigError

NEEDS = "the model's chat template needs what neither Loci nor transformers gives to templates"


class ChatTemplate:
    """A compiled template.

    source      its Jinja source
    variables   what it reads that it does not make itself

    Raises ConfigError where it is not valid Jinja, or needs a filter or test that there is not.
    """

    def __init__(self, source: str, now: Callable[[], datetime]) -> None:
        environment = _environment(now)
        self.source = source
        try:
            tree = environment.parse(source)
            self._compiled = environment.from_string(tree)
        except jinja2.TemplateAssertionError as error:
            raise ConfigError(f"{NEEDS}: {error}") from None
        except jinja2.TemplateError as error:
            raise ConfigError(f"the model's chat template is not valid Jinja: {error}") from None
        self.variables = meta.find_undeclared_variables(tree)
        called = {call.node.name for call in tree.find_all(nodes.Call) if isinstance(call.node, nodes.Name)}
        self._lacking = (called & self.variables) - environment.globals.keys()

    def pieces(self, variables: dict[str, Any]) -> Iterator[str]:
        """The rendered text in pieces. Raises whatever the template makes of these variables."""
        return self._compiled.generate(**variables)

    def complaint(self, error: Exception) -> str:
        """What to say of a failure."""
        missing = next(
            (name for name in sorted(self._lacking) if f"'{name}' is undefined" in str(error)), None
        )
        if missing is not None:
            return f"the model's chat template calls {missing}(), which neither Loci nor transformers has"
        if isinstance(error, jinja2.TemplateRuntimeError) and str(error).startswith("No "):
            return f"{NEEDS}: {error}"  # a filter or test that is named where it may not be reached
        return f"the model's chat template rejects these messages: {error}"


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`, which marks assistant text for training: just its body.

    As in transformers, what the body sets is not set behind it.
    """

    tags = {"generation"}  # noqa: RUF012  # as the base class has it

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return caller()


def _environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: now().strftime(layout)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models saw it in training: no HTML escapes, which Jinja's own filter makes."""
    if isinstance(value, WrittenArguments):
        return str(value)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
