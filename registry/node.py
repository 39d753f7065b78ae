"""The tree of a card: plain values that remember the file and line they were written in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from zoo.registry.errors import CardError, nearest

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Node:
    """A value of a card. `value` is a dict of Nodes, a list of Nodes, or a scalar; `line` is 0 when there is none."""

    value: Any
    file: str
    line: int = 0

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file

    @property
    def is_map(self) -> bool:
        return isinstance(self.value, dict)

    def plain(self) -> Any:
        """The value without its marks."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def deepest(self, path: Path) -> Node:
        """The node at `path`, or the last one on the way to it."""
        node = self
        for key in path:
            child = node.child(key)
            if child is None:
                return node
            node = child
        return node

    def child(self, key: str | int) -> Node | None:
        if isinstance(self.value, dict):
            return self.value.get(key)
        if isinstance(self.value, list) and isinstance(key, int) and -1 < key < len(self.value):
            return self.value[key]  # type: ignore[no-any-return]
        return None


def from_plain(value: Any, file: str) -> Node:
    """Marks a plain value as written in `file`, without lines."""
    if isinstance(value, Mapping):
        return Node({str(key): from_plain(item, file) for key, item in value.items()}, file)
    if isinstance(value, list | tuple):
        return Node([from_plain(item, file) for item in value], file)
    return Node(value, file)


def merge(parent: Node, child: Node) -> Node:
    """`child` over `parent`: mappings merge key by key, all else replaces. A node of another kind replaces too."""
    if not (parent.is_map and child.is_map) or _other_kind(parent, child):
        return child
    merged = dict(parent.value)
    for key, value in child.value.items():
        merged[key] = merge(merged[key], value) if key in merged else value
    return replace(child, value=merged)


def _other_kind(parent: Node, child: Node) -> bool:
    kind = child.value.get("kind")
    return kind is not None and "kind" in parent.value and parent.value["kind"].value != kind.value


def put(node: Node, path: Path, value: Node, done: Path = ()) -> Node:
    """A copy of `node` with `value` at `path`; missing mappings on the way are made, list items must exist."""
    if not path:
        return value
    key, here = path[0], dotted(done) or "the card"
    if node.is_map:
        inner = node.value.get(key, Node({}, value.file))
        return replace(node, value={**node.value, str(key): put(inner, path[1:], value, (*done, key))})
    if not isinstance(node.value, list):
        raise CardError(
            f"cannot set {key!r} inside {here}", where=value.where, found=shown(node.value), expected="a mapping"
        )
    if not isinstance(key, int) or key >= len(node.value):
        raise CardError(
            f"{here} has no item {key!r}", where=value.where, expected=f"an index from 0 to {len(node.value) - 1}"
        )
    items = list(node.value)
    items[key] = put(items[key], path[1:], value, (*done, key))
    return replace(node, value=items)


def dotted(path: Path) -> str:
    """A path as the author reads it: `model.layers.0.mixer`."""
    return ".".join(str(key) for key in path)


def undotted(text: str) -> Path:
    return tuple(int(key) if key.isdigit() else key for key in text.split("."))


def shown(value: Any) -> str:
    """A found value in a message: short, and with its type where the look deceives."""
    if isinstance(value, Mapping):
        return f"a mapping with {', '.join(map(repr, list(value)[:4]))}" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        return f"the text {value[:60]!r}"
    if isinstance(value, bool):
        return str(value).lower()
    return "nothing (null)" if value is None else repr(value)


def unknown_key(node: Node, path: Path, key: str, known: list[str]) -> CardError:
    """The error for `key` in the mapping `node` at `path`, which holds only `known` keys."""
    return CardError(
        f"unknown key {key!r}",
        where=f"{node.value[key].where}: {dotted((*path, key))}",
        expected=f"one of {', '.join(known)}" if known else "no keys here",
        hint=nearest(key, known),
    )
