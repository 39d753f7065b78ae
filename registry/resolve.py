"""Card -> Plan: every node becomes the complete Spec of a registered component.

Generic over components: what may stand where, what is inherited and what a missing node means is said by the
`Slot` and `Inherited` marks of the Specs (see zoo.registry.spec). No kind is named here but the root's default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from pydantic.fields import FieldInfo

from zoo.registry.card import Card
from zoo.registry.catalog import Catalog, Entry
from zoo.registry.errors import CardError, nearest
from zoo.registry.faults import locating, missing, spot
from zoo.registry.manager import manager
from zoo.registry.node import Node, Path, shown, unknown_key
from zoo.registry.plan import Plan
from zoo.registry.spec import Inherited, Slot, Spec

__all__ = ["Plan", "resolve"]

MODEL = Slot("model", default="decoder")
MAX_LAYERS = 10_000


def resolve(card: Card, catalog: Catalog | None = None) -> Plan:
    """The complete Specs of a card. Raises CardError, also for a card that says `unsupported`, or PluginError where a
    component cannot be imported."""
    if card.unsupported is not None:
        raise card.refusal()
    catalog = catalog or manager().catalog
    resolver = _Resolver(card.tree, catalog)
    scope = Scope({"context_length": (card.context_length, ("context_length",))})
    model = resolver.component(MODEL, card.tree.value["model"], ("model",), scope)
    text = {name: resolver.optional(Slot(name), ("text", name), scope) for name in ("tokenizer", "chat")}
    _check_layout(card, catalog)
    return Plan(card, model, text["tokenizer"], text["chat"], tuple(resolver.used.values()))


def _check_layout(card: Card, catalog: Catalog) -> None:
    layout, known = card.source.layout, ["auto", *catalog.layouts]
    if layout not in known:
        raise card.fault(
            ("source", "layout"),
            "unknown weight layout",
            found=repr(layout),
            expected=f"one of {', '.join(known)}",
            hint=nearest(layout, known),
        )


@dataclass(frozen=True)
class Scope:
    """What the enclosing nodes hand down: values with the place they were written, and nodes of slots."""

    values: Mapping[str, tuple[Any, Path]] = field(default_factory=dict)
    nodes: Mapping[str, tuple[Node, Path]] = field(default_factory=dict)

    def bound(self, slot: Slot) -> Scope:
        """The scope as a slot's child sees it, with values renamed by `bind`."""
        renamed = {theirs: self.values[mine] for theirs, mine in slot.bind.items() if mine in self.values}
        return replace(self, values={**self.values, **renamed})

    def plain(self) -> dict[str, Any]:
        return {name: value for name, (value, _) in self.values.items()}


class _Resolver:
    def __init__(self, root: Node, catalog: Catalog) -> None:
        self.root, self.catalog = root, catalog
        self.used: dict[tuple[str, str], Entry] = {}

    def optional(self, slot: Slot, path: Path, scope: Scope) -> Spec | None:
        node = self.root.deepest(path)
        if self.root.deepest(path[:-1]).child(path[-1]) is None or node.value is None:
            return None
        return self.component(slot, node, path, scope)

    def component(self, slot: Slot, node: Node, path: Path, scope: Scope, beside: tuple[str, ...] = ()) -> Spec:
        """The Spec of the component that `node` names for `slot`. beside: keys that were taken off the node."""
        if isinstance(node.value, str):
            node = replace(node, value={"kind": node})
        if not node.is_map:
            expected = "a mapping, or a kind's name"
            raise CardError("wrong value", where=spot(self.root, path), found=shown(node.value), expected=expected)
        entry = self.catalog.find(slot.name, self.kind(slot, node, path, scope), spot(self.root, (*path, "kind")))
        self.used[entry.slot, entry.kind] = entry
        cls = self.catalog.spec(entry)
        self.check_keys(cls, node, path, beside)
        return self.fill(cls, entry.kind, node, path, scope)

    def kind(self, slot: Slot, node: Node, path: Path, scope: Scope) -> str:
        written = node.child("kind")
        if written is not None:
            if not isinstance(written.value, str):
                where = spot(self.root, (*path, "kind"))
                raise CardError("wrong value", where=where, found=shown(written.value), expected="a kind's name")
            return written.value
        if slot.default is None:
            kinds = ", ".join(self.catalog.kinds(slot.name))
            raise CardError("the key 'kind' is missing", where=spot(self.root, path), expected=f"one of {kinds}")
        return slot.default if isinstance(slot.default, str) else slot.default(scope.plain())

    def fill(self, cls: type[Spec], kind: str, node: Node, path: Path, scope: Scope) -> Spec:
        """A complete Spec: plain fields from the node, inherited ones from the scope, slots by recursion."""
        own, handed = self.plain(cls, node, path), self.inherited(cls, path, scope)
        nodes = {name: (node.value[name], (*path, name)) for name in slots_of(cls) if name in node.value}
        inner = Scope({**scope.values, **handed, **own}, {**scope.nodes, **nodes})
        values: dict[str, Any] = {"kind": kind}
        values |= {name: value for name, (value, _) in (handed | own).items()}
        for name, slot in slots_of(cls).items():
            found, given = self.slot(slot, cls, name, node, path, inner)
            if found:
                values[name] = given
        origins = {name: origin for name, (_, origin) in handed.items()}
        return locating(  # type: ignore[no-any-return]
            lambda: cls.model_validate(values, strict=True), cls, self.root, path, origins
        )

    def check_keys(self, cls: type[Spec], node: Node, path: Path, beside: tuple[str, ...]) -> None:
        writable = [
            "kind",
            *(name for name, info in cls.model_fields.items() if not inherits(info) and name != "kind"),
        ]
        for key in node.value:
            if key in writable:
                continue
            if key not in cls.model_fields:
                raise unknown_key(node, path, key, [*beside, *writable])
            raise CardError(
                f"the key {key!r} is taken from the enclosing node and may not be written here",
                where=spot(self.root, (*path, key)),
                found=shown(node.value[key].value),
                hint=f"remove {key!r}",
            )
        for name, info in cls.model_fields.items():
            slot = slots_of(cls).get(name)
            needed = info.is_required() and (slot is None or slot.absent == "required")
            if needed and name in writable[1:] and name not in node.value:
                raise missing(cls, self.root, (*path, name))

    def plain(self, cls: type[Spec], node: Node, path: Path) -> dict[str, tuple[Any, Path]]:
        """Plain fields as written, or their defaults, with their place."""
        return {
            name: (
                _tuples(node.value[name].plain())
                if name in node.value
                else info.get_default(call_default_factory=True, validated_data={}),
                (*path, name),
            )
            for name, info in cls.model_fields.items()
            if name != "kind" and name not in slots_of(cls) and not inherits(info)
        }

    def inherited(self, cls: type[Spec], path: Path, scope: Scope) -> dict[str, tuple[Any, Path]]:
        found = {}
        for name, info in cls.model_fields.items():
            if not inherits(info):
                continue
            if name in scope.values:
                found[name] = scope.values[name]
            elif info.is_required():
                raise CardError(
                    f"this kind needs {name!r} from the nodes around it, and none has it", where=spot(self.root, path)
                )
        return found

    def slot(
        self, slot: Slot, cls: type[Spec], name: str, node: Node, path: Path, scope: Scope
    ) -> tuple[bool, Spec | tuple[Spec, ...] | None]:
        """Whether the field gets a value, and which; without one pydantic applies the field's default."""
        child, place = node.child(name), (*path, name)
        if child is None and slot.absent == "inherit" and name in scope.nodes:
            child, place = scope.nodes[name]
        if child is None and slot.absent == "build":
            child = Node({}, node.file, node.line)
        if child is None:
            if cls.model_fields[name].is_required():
                raise missing(cls, self.root, place)
            return False, None
        if child.value is None and nullable(cls.model_fields[name]):
            return True, None
        inner = scope.bound(slot)
        if is_list(cls.model_fields[name]):
            return True, self.items(slot, child, place, inner)
        return True, self.component(slot, child, place, inner)

    def items(self, slot: Slot, node: Node, path: Path, scope: Scope) -> tuple[Spec, ...]:
        if not isinstance(node.value, list):
            raise CardError("wrong value", where=spot(self.root, path), found=shown(node.value), expected="a list")
        if not slot.runs:
            return tuple(self.component(slot, item, (*path, i), scope) for i, item in enumerate(node.value))
        if not node.value:
            raise CardError("the list is empty", where=spot(self.root, path), expected="at least one run")
        blocks: tuple[Spec, ...] = ()
        for i, run in enumerate(node.value):
            blocks += self.run(slot, run, (*path, i), scope)
            if len(blocks) > MAX_LAYERS:
                raise self.too_many(path)
        return blocks

    def run(self, slot: Slot, run: Node, path: Path, scope: Scope) -> tuple[Spec, ...]:
        """`{repeat: n, ...node}` or `{repeat: n, pattern: [run, ...]}`, expanded; a repeated Spec is one object."""
        count = self.repeat(run, path)
        rest = {key: value for key, value in run.value.items() if key != "repeat"} if run.is_map else {}
        if "pattern" not in rest:
            blocks: tuple[Spec, ...] = (
                self.component(slot, replace(run, value=rest or run.value), path, scope, ("repeat", "pattern")),
            )
        elif len(rest) > 1:
            other = next(key for key in rest if key != "pattern")
            where = spot(self.root, (*path, other))
            raise CardError(f"'pattern' and {other!r} stand in one run", where=where, expected="one or the other")
        else:
            blocks = self.items(slot, rest["pattern"], (*path, "pattern"), scope)
        if len(blocks) * count > MAX_LAYERS:
            raise self.too_many(path)
        return blocks * count

    def repeat(self, run: Node, path: Path) -> int:
        node = run.child("repeat")
        if node is None:
            return 1
        if isinstance(node.value, bool) or not isinstance(node.value, int) or node.value < 1:
            where = spot(self.root, (*path, "repeat"))
            raise CardError("wrong value", where=where, found=shown(node.value), expected="an integer of at least 1")
        return node.value

    def too_many(self, path: Path) -> CardError:
        return CardError("too many layers", where=spot(self.root, path), expected=f"at most {MAX_LAYERS}")


def slots_of(cls: type[Spec]) -> dict[str, Slot]:
    """The fields of a Spec class that are slots."""
    found = {}
    for name, info in cls.model_fields.items():
        slot = next((mark for mark in info.metadata if isinstance(mark, Slot)), None)
        if slot is not None:
            found[name] = slot
    return found


def inherits(info: FieldInfo) -> bool:
    """Whether a field is taken from the enclosing node."""
    return any(isinstance(mark, Inherited) for mark in info.metadata)


def nullable(info: FieldInfo) -> bool:
    """Whether a slot's field may be null."""
    return type(None) in get_args(info.annotation)


def is_list(info: FieldInfo) -> bool:
    """Whether a slot's field holds a list of components."""
    return getattr(info.annotation, "__origin__", None) is tuple


def _tuples(value: Any) -> Any:
    """Lists as tuples: Specs are frozen."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
