"""YAML text -> Node tree with line numbers.

Read from yaml's node graph, never constructed as objects, so that nothing in a card can execute. The scalars are
YAML 1.2's: `1e6` is a number and `no` is text. Tags, duplicate keys and anchors that multiply are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import isfinite
from typing import Any

import yaml

from zoo.registry.errors import CardError
from zoo.registry.node import Node

MAX_BYTES = 1 << 20
MAX_NODES = 20_000
MAX_DEPTH = 50

_PLAIN, _TEXT, _MAP, _LIST = "plain", "text", "map", "list"
_INTEGER = re.compile(r"[-+]?[0-9]{1,300}")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}


class _Resolver:
    """Tells plain scalars from quoted ones; any other tag was written by the author."""

    def descend_resolver(self, current_node: object, current_index: object) -> None: ...

    def ascend_resolver(self) -> None: ...

    def resolve(self, kind: type[yaml.Node], value: object, implicit: Any) -> str:
        if kind is yaml.ScalarNode:
            return _PLAIN if implicit[0] else _TEXT
        return _MAP if kind is yaml.MappingNode else _LIST


class PythonLoader(_Resolver, yaml.reader.Reader, yaml.scanner.Scanner, yaml.parser.Parser, yaml.composer.Composer):
    """The parser for machines without libyaml, an order of magnitude slower."""

    def __init__(self, text: str) -> None:
        yaml.reader.Reader.__init__(self, text)
        yaml.scanner.Scanner.__init__(self)
        yaml.parser.Parser.__init__(self)
        yaml.composer.Composer.__init__(self)


_Loader: type[Any] = PythonLoader
if yaml.__with_libyaml__:
    _Loader = type("_Loader", (_Resolver, yaml.cyaml.CParser), {})  # type: ignore[attr-defined]


def read_card(data: bytes, file: str) -> Node:
    """The mapping that a card file holds; CardError with file and line for anything else."""
    node = read(decode(data, file), file)
    if node.value is None:
        raise CardError("the card is empty", where=file, expected="a mapping with `name`, `model`, ...")
    if not node.is_map:
        found = "a list" if isinstance(node.value, list) else f"the single value {str(node.value)[:40]!r}"
        raise CardError("a card is a mapping", where=node.where, found=found, expected="`key: value` lines")
    return node


def decode(data: bytes, file: str) -> str:
    if len(data) > MAX_BYTES:
        raise CardError("too large for a card", where=file, found=f"{len(data)} bytes", expected=f"at most {MAX_BYTES}")
    if b"\0" in data:
        raise CardError("not a text file", where=file, found="binary data", expected="a YAML card in UTF-8")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{data[error.start]:02x}"
        raise CardError("not UTF-8 text", where=f"{file}:{line}", found=found, hint="save the file as UTF-8") from None


def read(text: str, file: str) -> Node:
    """Any YAML text as a Node tree; an empty text gives a Node of None."""
    try:
        root = _Loader(text).get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise CardError("not valid YAML", where=f"{file}:{line}", found=_character(error)) from None
    except yaml.MarkedYAMLError as error:
        raise _syntax(error, text, file) from None
    except RecursionError:
        raise CardError("nested too deeply", where=file, expected=f"at most {MAX_DEPTH} levels") from None
    return Node(None, file) if root is None else _Converter(file).convert(root, 0)


def _character(error: yaml.reader.ReaderError) -> str:
    code = error.character if isinstance(error.character, int) else ord(error.character)
    return f"the control character U+{code:04X}"


def _syntax(error: yaml.MarkedYAMLError, text: str, file: str) -> CardError:
    lines = [*text.splitlines(), ""]
    marks = [min(mark.line, len(lines) - 1) for mark in (error.problem_mark, error.context_mark) if mark]
    line = next((line for line in marks if lines[line].strip()), 0)
    source = lines[line]
    if "\t" in source[: len(source) - len(source.lstrip())]:
        return CardError(
            "a tab stands in the indentation", where=f"{file}:{line + 1}", expected="spaces", hint="YAML forbids tabs"
        )
    problem = (error.problem or "syntax error").removeprefix("but ").removeprefix("found ")
    context = f" ({error.context})" if error.context else ""
    return CardError(f"not valid YAML: {problem}{context}", where=f"{file}:{line + 1}", found=repr(source.strip()[:60]))


class _Converter:
    """Turns yaml's nodes into ours, counting them: aliases may repeat a node, but not without end."""

    def __init__(self, file: str) -> None:
        self.file, self.count = file, 0

    def convert(self, node: yaml.Node, depth: int, line: int | None = None) -> Node:
        line = node.start_mark.line + 1 if line is None else line
        self.tick(line, depth)
        if node.tag not in (_PLAIN, _TEXT, _MAP, _LIST):
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise self.fault("tags are not allowed in a card", line, found=repr(tag), expected="plain values")
        if isinstance(node, yaml.MappingNode):
            return Node(self.mapping(node, depth), self.file, line)
        if isinstance(node, yaml.SequenceNode):
            return Node([self.convert(item, depth + 1) for item in node.value], self.file, line)
        return Node(scalar(node.value) if node.tag == _PLAIN else node.value, self.file, line)

    def tick(self, line: int, depth: int) -> None:
        self.count += 1
        if self.count > MAX_NODES or depth > MAX_DEPTH:
            limit = f"at most {MAX_NODES} values, {MAX_DEPTH} levels deep"
            raise self.fault("too many values", line, expected=limit, hint="do anchors repeat each other?")

    def mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Node]:
        own: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag == _PLAIN and key.value == "<<":
                for source in self.sources(value, line):
                    self.tick(line, depth)
                    merged = self.mapping(source, depth + 1) | merged
                continue
            name = self.key(key, line)
            if name in own:
                first = own[name].line
                raise self.fault(f"the key {name!r} stands twice", line, found=f"the first on line {first}")
            own[name] = self.convert(value, depth + 1, line)
        return {**merged, **own}

    def sources(self, node: yaml.Node, line: int) -> Iterator[yaml.MappingNode]:
        """The mappings that `<<` merges, the strongest first."""
        for item in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(item, yaml.MappingNode):
                raise self.fault("`<<` merges mappings", line, expected="an alias of a mapping, or a list of them")
            yield item

    def key(self, node: yaml.Node, line: int) -> str:
        if not isinstance(node, yaml.ScalarNode) or (node.tag == _PLAIN and not isinstance(scalar(node.value), str)):
            found = repr(node.value) if isinstance(node, yaml.ScalarNode) else "a collection"
            raise self.fault("keys are text", line, found=found)
        return str(node.value)

    def fault(self, message: str, line: int, **details: Any) -> CardError:
        return CardError(message, where=f"{self.file}:{line}", **details)


def scalar(text: str) -> Any:
    """The value of a plain scalar."""
    if text.lower() in _WORDS and text in (text.lower(), text.upper(), text.capitalize()):
        return _WORDS[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text) and isfinite(float(text)):
        return float(text)
    return text
