"""A resolved card: complete Specs and no tensors, printable."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from pydantic import BaseModel

from zoo.registry.card import Card
from zoo.registry.catalog import Entry
from zoo.registry.spec import Inherited, Spec


@dataclass(frozen=True, slots=True)
class Row:
    """Neighbouring layers that are equal: `first` to `last`, and each of their parts in words."""

    first: int
    last: int
    block: str
    parts: dict[str, str]

    @property
    def layers(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What a card means: the Spec of the model, of its tokenizer and of its chat format.

    entries: the registered components in use, for saying which plugin brought each.
    """

    card: Card
    model: Spec
    tokenizer: Spec | None = None
    chat: Spec | None = None
    entries: tuple[Entry, ...] = field(default=())

    def table(self) -> list[Row]:
        """The layers, equal neighbours in one row."""
        rows: list[Row] = []
        for block, count in runs(_layers(self.model)):
            first = rows[-1].last + 1 if rows else 0
            parts = {name: phrase(child) for name, child in slots(block)}
            rows.append(Row(first, first + count - 1, block.kind, parts))
        return rows

    def describe(self) -> dict[str, Any]:
        """All Specs as nested plain values, inherited sizes included; equal neighbours as one with `repeat`."""
        parts = {"model": self.model, "tokenizer": self.tokenizer, "chat": self.chat}
        return {"name": self.card.name} | {name: describe(spec) for name, spec in parts.items() if spec is not None}


def _layers(model: Spec) -> tuple[Spec, ...]:
    layers = getattr(model, "layers", ())
    return layers if isinstance(layers, tuple) else ()


def runs(specs: tuple[Spec, ...]) -> Iterator[tuple[Spec, int]]:
    """Equal neighbours and how many there are."""
    for _, group in groupby(enumerate(specs), key=_same(specs)):
        members = list(group)
        yield members[0][1], len(members)


def _same(specs: tuple[Spec, ...]) -> Any:
    starts: list[int] = []
    for i, spec in enumerate(specs):
        starts.append(starts[-1] if i and (spec is specs[i - 1] or spec == specs[i - 1]) else i)
    return lambda item: starts[item[0]]


def slots(spec: Spec) -> Iterator[tuple[str, Spec]]:
    """The fields of a Spec that hold one component."""
    for name in type(spec).model_fields:
        value = getattr(spec, name)
        if isinstance(value, Spec):
            yield name, value


def phrase(spec: Spec) -> str:
    """A component in one line: its kind and what its card says, without defaults and inherited sizes."""
    words = []
    for name, info in type(spec).model_fields.items():
        value = getattr(spec, name)
        inherited = any(isinstance(mark, Inherited) for mark in info.metadata)
        if name == "kind" or inherited or (not info.is_required() and value == info.default):
            continue
        if isinstance(value, tuple) and value and isinstance(value[0], Spec):
            words.append(f"{name}=[{', '.join(phrase(item) for item in value)}]")
        else:
            words.append(f"{name}={_worded(value)}")
    return f"{spec.kind}({', '.join(words)})" if words else spec.kind


def _worded(value: Any) -> str:
    if isinstance(value, Spec):
        return phrase(value)
    if isinstance(value, BaseModel):
        return f"({', '.join(f'{name}={_worded(item)}' for name, item in value)})"
    return f"{value:g}" if isinstance(value, float) else str(value)


def describe(value: Any) -> Any:
    """A Spec or a field's value as plain, JSON-able values."""
    if isinstance(value, tuple) and value and isinstance(value[0], Spec):
        return [{"repeat": count, **describe(spec)} for spec, count in runs(value)]
    if isinstance(value, BaseModel):
        return {name: describe(item) for name, item in value}
    return [describe(item) for item in value] if isinstance(value, tuple | list) else value
