"""Chat templates are programs from a checkpoint: they run in Jinja's sandbox and see plain values only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

from zoo.registry.errors import TextError

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment


class ChatTemplate:
    """A compiled template. `variables` are the names that it reads. Raises TextError if it is faulty."""

    def __init__(self, source: str, where: str) -> None:
        from jinja2 import TemplateError, meta

        self._where = where
        try:
            self._template = _environment().from_string(source)
            self.variables = frozenset(meta.find_undeclared_variables(_environment().parse(source)))
        except TemplateError as fault:
            raise _faulty(where, fault) from fault

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text for `variables`. Raises TextError with the template's own message if it refuses them."""
        from jinja2.exceptions import SecurityError, TemplateError

        try:
            return self._template.render(variables)
        except SecurityError as fault:
            raise TextError(
                "the chat template reaches for what templates may not touch", where=self._where, found=str(fault)
            ) from fault
        except TemplateError as fault:
            raise TextError(
                "the chat template refuses the conversation", where=self._where, found=str(fault)
            ) from fault
        except Exception as fault:  # a template is foreign code and may fail in any way
            raise _faulty(self._where, fault) from fault


def _faulty(where: str, fault: Exception) -> TextError:
    line = getattr(fault, "lineno", None)
    place = f"{where}:{line}" if line else where
    return TextError("the chat template is faulty", where=place, found=f"{type(fault).__name__}: {fault}")


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that templates are written for: the block trimming, globals and filters of transformers."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks an answer for training and changes no text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise, strftime_now=_now)
    return environment


def _raise(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
