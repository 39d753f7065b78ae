"""Tables of weight names: which tensors of a file are which tensors of a model.

A table is a YAML file that a plugin registers; the layout's name is the file's stem.

    summary: one sentence
    extends: huggingface               # optional: a table whose rows hold here too
    tensors:                           # name in the file -> name in the model
      layers.{i}.attention.wq.{weight|bias}: {to: "layers.{i}.mixer.q.{weight|bias}", transform: interleaved_rope}
      layers.{i}.norm.weight: {to: "layers.{i}.mixer_norm.weight", or: "layers.{i}.ffn_norm.weight"}
    prefixes: {model.language_model.: model.}   # what a name may begin with -> what it then means
    ignore: {rope.freqs: why it is left out, layers.61.**: why all below it is, if the model has no such layer}
    identity: true                     # instead of `tensors`: names in the file are the model's
    signature: [embed.weight]          # with identity: names by which such a file is recognised

`{i}` stands for a number, `{a|b}` for either word; `or` is what a name means where the model has not what `to` says.
Transforms, in the order in which the file's tensor is taken apart:

    stack             it holds `{e}` tensors of the model, along a leading axis or as blocks of rows
    split             it holds the tensors of the list `to` one after the other along its first axis
    transpose         last two axes swapped; before `split`, the pieces lie side by side in columns
    interleaved_rope  rows of each head stand in pairs (0, 1), (2, 3), ...; zoo's stand in halves
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

from zoo.registry.catalog import Resource
from zoo.registry.errors import PluginError, WeightsError, nearest
from zoo.registry.manager import manager
from zoo.registry.node import Node
from zoo.registry.reader import decode, read

TRANSFORMS = ("stack", "split", "transpose", "interleaved_rope")
KEYS = ("summary", "extends", "prefixes", "tensors", "ignore", "identity", "signature")

_BELOW = "**"
_HOLE = re.compile(r"\{(\w+)\}")
_WORDS = re.compile(r"\{(\w+(?:\|\w+)+)\}")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table. stacked: the hole of `targets` that the pattern does not fill, or None."""

    pattern: str
    targets: tuple[str, ...]
    transforms: tuple[str, ...] = ()
    stacked: str | None = None


@dataclass(frozen=True)
class Layout:
    """A way of naming a model's tensors. Rows and ignored names go by their skeleton, numbers as `#`.

    prefixes: what a name may begin with, and what it is looked up with instead.
    """

    name: str
    rows: Mapping[str, tuple[Row, ...]]
    ignored: Mapping[str, str] = field(default_factory=dict)
    identity: bool = False
    signature: frozenset[str] = frozenset()
    prefixes: Mapping[str, str] = field(default_factory=dict)

    def find(self, name: str) -> tuple[Row, dict[str, str]] | None:
        """The row for a tensor of a file and what fills its holes; of several, the first."""
        return next(iter(self.meanings(name)), None)

    def meanings(self, name: str) -> list[tuple[Row, dict[str, str]]]:
        """The rows for a tensor of a file and what fills their holes: a model has the tensors of one of them."""
        if self.identity:
            return [(Row(name, (name,)), {})]
        name = self.plain(name)
        matches = ((row, match(row.pattern, name)) for row in self.rows.get(skeleton(name), ()))
        return [(row, holes) for row, holes in matches if holes is not None]

    def ignores(self, name: str) -> bool:
        """Whether the table leaves this name out on purpose."""
        name = self.plain(name)
        return skeleton(name) in self.ignored or any(
            name.startswith(pattern.removesuffix(_BELOW)) for pattern in self.ignored if pattern.endswith(_BELOW)
        )

    def file_names(self, target: str) -> Iterator[str]:
        """The names that a tensor of the model may have in a file, as the table's rows come."""
        if self.identity:
            yield target
            return
        for row in (row for rows in self.rows.values() for row in rows):
            for candidate in row.targets:
                holes = match(candidate, target)
                if holes is not None:
                    yield fill(row.pattern, holes)

    def score(self, names: Iterable[str]) -> int:
        """How many of the names this layout knows."""
        known = self.signature if self.identity else self.rows.keys()
        return sum(skeleton(self.plain(name)) in known for name in names)

    def plain(self, name: str) -> str:
        """The name as the table's rows say it."""
        prefix = next((prefix for prefix in self.prefixes if name.startswith(prefix)), None)
        return name if prefix is None else self.prefixes[prefix] + name.removeprefix(prefix)


def skeleton(name: str) -> str:
    """A name with every number, or hole for a number, as `#`."""
    return ".".join("#" if _is_number(part) or _HOLE.fullmatch(part) else part for part in name.split("."))


def match(pattern: str, name: str) -> dict[str, str] | None:
    """What fills the pattern's holes in `name`, or None when it is another name."""
    holes: dict[str, str] = {}
    parts, wanted = name.split("."), pattern.split(".")
    if len(parts) != len(wanted):
        return None
    for part, want in zip(parts, wanted, strict=True):
        hole = _HOLE.fullmatch(want)
        if hole and _is_number(part):
            holes[hole[1]] = part
        elif part != want:
            return None
    return holes


def fill(pattern: str, holes: Mapping[str, str]) -> str:
    return _HOLE.sub(lambda match: holes[match[1]], pattern)


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit()


def layouts() -> dict[str, Layout]:
    """Every registered layout by name. Raises PluginError for a table that is not well-formed."""
    return {**_read_once(tuple(manager().layouts().items()))}


@cache
def _read_once(resources: tuple[tuple[str, Resource], ...]) -> dict[str, Layout]:
    """`read_layouts` of files that do not change while a process runs: a load asks several times."""
    return read_layouts(dict(resources))


def layout_named(name: str) -> Layout:
    """Raises WeightsError with the nearest names for a layout that no plugin brings."""
    known = layouts()
    if name not in known:
        raise WeightsError(
            f"unknown weight layout {name!r}", expected=f"auto, {', '.join(known)}", hint=nearest(name, known)
        )
    return known[name]


def detect(names: Iterable[str], known: Iterable[Layout], where: str) -> Layout:
    """The layout that knows most of the names. Raises WeightsError when none knows any."""
    names, known = list(names), list(known)
    best = max(known, key=lambda layout: layout.score(names))
    if best.score(names) == 0:
        hint = "point at the model that it adapts" if any("lora_" in name for name in names) else None
        raise WeightsError(
            "a LoRA adapter, not a model" if hint else "tensor names of no known layout",
            where=where,
            found=", ".join(sorted(names)[:4]) or "no tensor at all",
            expected=f"names of one of the layouts {', '.join(layout.name for layout in known)}",
            hint=hint,
        )
    return best


def read_layouts(resources: Mapping[str, Resource]) -> dict[str, Layout]:
    """The tables of these files by name."""
    nodes = {name: _read(resource) for name, resource in resources.items()}
    return {name: _layout(name, nodes, ()) for name in nodes}


def _read(resource: Resource) -> Node:
    file = str(resource.file)
    node = read(decode(resource.file.read_bytes(), file), file)
    if not node.is_map:
        raise PluginError("a table of weight names is a mapping", where=file, expected="`tensors:` with rows")
    for key, value in node.value.items():
        if key not in KEYS:
            raise PluginError(f"unknown key {key!r}", where=value.where, expected=f"one of {', '.join(KEYS)}")
    return node


def _layout(name: str, nodes: Mapping[str, Node], above: tuple[str, ...]) -> Layout:
    node = nodes[name]
    parts = {key: value.plain() for key, value in node.value.items()}
    rows: dict[str, tuple[Row, ...]] = {}
    tensors = node.child("tensors")
    for pattern, value in (tensors.value if tensors and tensors.is_map else {}).items():
        line = list(_rows(pattern, value))
        for row in line:
            others = rows.get(skeleton(row.pattern), ())
            if any(_same(other, row) for other in others if other not in line):
                raise PluginError(f"{row.pattern!r} is named twice", where=value.where)
            rows[skeleton(row.pattern)] = (*others, row)
    ignored = {
        name if name.endswith(_BELOW) else skeleton(name): reason
        for pattern, reason in parts.get("ignore", {}).items()
        for name in _chosen(pattern)
    }
    prefixes, parent = parts.get("prefixes", {}), _parent(name, nodes, above)
    if parent is not None:
        prefixes = {**parent.prefixes, **prefixes}
        own = {key: (*value, *_others(parent.rows.get(key, ()), value)) for key, value in rows.items()}
        rows, ignored = {**parent.rows, **own}, {**parent.ignored, **ignored}
    if not rows and not parts.get("identity"):
        raise PluginError("a table of weight names without rows", where=node.where, expected="`tensors:` with rows")
    signature = frozenset(skeleton(name) for name in parts.get("signature", ()))
    return Layout(name, rows, ignored, parts.get("identity", False), signature, prefixes)


def _same(one: Row, other: Row) -> bool:
    return _HOLE.sub("{}", one.pattern) == _HOLE.sub("{}", other.pattern)


def _others(inherited: Iterable[Row], own: Iterable[Row]) -> list[Row]:
    """The inherited rows whose names the table does not give itself."""
    return [row for row in inherited if not any(_same(row, mine) for mine in own)]


def _parent(name: str, nodes: Mapping[str, Node], above: tuple[str, ...]) -> Layout | None:
    extends = nodes[name].child("extends")
    if extends is None:
        return None
    others = [other for other in nodes if other not in (*above, name)]
    if extends.value not in others:
        raise PluginError(
            f"the table {name!r} extends {extends.value!r}",
            where=extends.where,
            expected=f"another table, one of {', '.join(others)}"
            if others
            else "no `extends`: there is no other table",
            hint=nearest(str(extends.value), others),
        )
    return _layout(extends.value, nodes, (*above, name))


def _rows(pattern: str, value: Node) -> Iterator[Row]:
    """The rows that a line of a table means, once for each word of `{weight|bias}`."""
    given = value.plain()
    if isinstance(given, str):
        given = {"to": given}
    if not isinstance(given, dict) or "to" not in given or not given.keys() <= {"to", "or", "transform"}:
        raise PluginError(f"row {pattern!r}", where=value.where, expected="a name, or `to`, `or` and `transform`")
    transforms, choice = _tuple(given.get("transform", ())), _WORDS.search(pattern)
    for word in choice[1].split("|") if choice else [""]:
        for targets in (_tuple(given[key]) for key in ("to", "or") if key in given):
            chosen = [text.replace(choice[0], word) if choice else text for text in (pattern, *targets)]
            yield _row(chosen[0], tuple(chosen[1:]), transforms, value.where)


def _chosen(pattern: str) -> list[str]:
    """The names that `{weight|bias}` stands for."""
    choice = _WORDS.search(pattern)
    return [pattern.replace(choice[0], word) for word in choice[1].split("|")] if choice else [pattern]


def _tuple(value: str | list[str] | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _row(pattern: str, targets: tuple[str, ...], transforms: tuple[str, ...], where: str) -> Row:
    unknown = [name for name in transforms if name not in TRANSFORMS]
    if unknown:
        raise PluginError(
            f"unknown transform {unknown[0]!r} of {pattern!r}",
            where=where,
            expected=f"one of {', '.join(TRANSFORMS)}",
            hint=nearest(unknown[0], TRANSFORMS),
        )
    free = {hole for target in targets for hole in _HOLE.findall(target)} - set(_HOLE.findall(pattern))
    for transform, needed, when in (
        ("stack", bool(free), "when `to` has a number that the file's name lacks"),
        ("split", len(targets) > 1, "when `to` lists several names"),
    ):
        if (transform in transforms) != needed or len(free) > 1:
            raise PluginError(f"row {pattern!r}", where=where, expected=f"`{transform}` exactly {when}")
    return Row(pattern, targets, transforms, free.pop() if free else None)
