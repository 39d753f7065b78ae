"""The JSON Schema of cards, for editors: the card's own fields and every registered component's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic.errors import PydanticUserError
from pydantic.fields import FieldInfo

from zoo.registry.card import NAME, Card
from zoo.registry.catalog import Catalog, Entry, one_line
from zoo.registry.errors import PluginError
from zoo.registry.manager import log, manager
from zoo.registry.resolve import MODEL, inherits, is_list, nullable, slots_of
from zoo.registry.spec import Slot, Spec

REPEAT = {"type": "integer", "minimum": 1, "description": "How often the run stands in the list."}

Json = dict[str, Any]


def schema(catalog: Catalog | None = None) -> Json:
    """JSON Schema (draft 2020-12) of a card. A card with `extends` may leave anything out, so its tree stays open.

    A component that cannot be imported is left out with a warning.
    """
    catalog = catalog or manager().catalog
    writer = _Writer(catalog)
    card = Card.model_json_schema(ref_template="#/$defs/{model}")
    defs, properties = card["$defs"], card["properties"]
    properties["name"]["pattern"] = f"^{NAME}$"
    defs["Source"]["properties"]["layout"]["enum"] = ["auto", *catalog.layouts]
    text = defs["Text"]["properties"]
    nodes = {name: writer.node(Slot(name), text[name], nullable=True) for name in ("tokenizer", "chat")}
    text |= {name: {"description": text[name]["description"]} for name in nodes}
    whole = {"model": writer.node(MODEL, properties["model"]), "text": {"properties": nodes}}
    properties["model"] = {"type": "object", "description": properties["model"]["description"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "zoo card",
        **{key: card[key] for key in ("description", "type", "additionalProperties", "properties")},
        "required": ["name"],
        "if": {"properties": {"extends": {"type": "string"}}, "required": ["extends"]},
        "else": {
            "required": card["required"],
            "properties": whole,
            "oneOf": [{"required": ["model"]}, {"required": ["unsupported"]}],
        },
        "$defs": _reachable(defs | writer.defs, [whole, properties]),
    }


class _Writer:
    """Writes a definition for every component kind."""

    def __init__(self, catalog: Catalog) -> None:
        self.specs: dict[str, dict[str, type[Spec]]] = {}
        self.defs: Json = {}
        self.run_slots: set[str] = set()
        raw = {entry: found for entry in catalog.components.values() if (found := self.read(entry, catalog))}
        for entry, definition in raw.items():
            self.component(entry, definition)
        for slot in self.run_slots:
            self.runs(slot)

    def read(self, entry: Entry, catalog: Catalog) -> Json | None:
        try:
            cls = catalog.spec(entry)
            found = cls.model_json_schema(ref_template=f"#/$defs/{entry.slot}.{entry.kind}.{{model}}")
        except (PluginError, PydanticUserError) as error:
            log.warning("zoo: %s %r is left out of the schema: %s", entry.slot, entry.kind, one_line(error))
            return None
        self.specs.setdefault(entry.slot, {})[entry.kind] = cls
        return found

    def component(self, entry: Entry, raw: Json) -> None:
        """Turns pydantic's schema of a Spec into that of its node: slots by reference, nothing inherited."""
        name, cls = f"{entry.slot}.{entry.kind}", self.specs[entry.slot][entry.kind]
        self.defs |= {f"{name}.{model}": definition for model, definition in raw.get("$defs", {}).items()}
        properties: Json = {"kind": {"const": entry.kind}}
        for field, info in cls.model_fields.items():
            if field != "kind" and not inherits(info):
                properties[field] = self.field(slots_of(cls).get(field), info, raw["properties"][field])
        self.defs[name] = {
            **_described(raw),
            "type": "object",
            "properties": properties,
            "required": _required(cls),
            "additionalProperties": False,
        }

    def field(self, slot: Slot | None, info: FieldInfo, raw: Json) -> Json:
        if slot is None:
            return raw
        if not is_list(info):
            return self.node(slot, raw, nullable=nullable(info))
        if not slot.runs:
            return {"type": "array", "items": self.node(slot, {}), **_described(raw)}
        self.run_slots.add(slot.name)
        self.defs[f"{slot.name}.runs"] = self.run_list(slot)
        return {"$ref": f"#/$defs/{slot.name}.runs", **_described(raw)}

    def node(self, slot: Slot, raw: Json, nullable: bool = False) -> Json:
        """What may stand in a slot: a node of one of its kinds, or the name of a kind that needs nothing else."""
        kinds = self.specs.get(slot.name, {})
        options = [_option(slot, kind) for kind in kinds]
        bare = [kind for kind, cls in kinds.items() if not _required(cls)]
        options += [{"enum": bare}] if bare else []
        options += [{"type": "null"}] if nullable else []
        return {"anyOf" if callable(slot.default) else "oneOf": options, **_described(raw)}

    def run_list(self, slot: Slot) -> Json:
        pattern = {
            "type": "object",
            "properties": {"repeat": REPEAT, "pattern": {"$ref": f"#/$defs/{slot.name}.runs"}},
            "required": ["pattern"],
            "additionalProperties": False,
        }
        items = [_option(slot, kind, ".run") for kind in self.specs.get(slot.name, {})]
        return {"type": "array", "minItems": 1, "items": {"oneOf": [*items, pattern]}}

    def runs(self, slot: str) -> None:
        """The nodes of a slot with `repeat` beside their fields."""
        for kind in self.specs.get(slot, {}):
            whole = self.defs[f"{slot}.{kind}"]
            self.defs[f"{slot}.{kind}.run"] = {**whole, "properties": {"repeat": REPEAT, **whole["properties"]}}


def _option(slot: Slot, kind: str, suffix: str = "") -> Json:
    ref: Json = {"$ref": f"#/$defs/{slot.name}.{kind}{suffix}"}
    return ref if callable(slot.default) or slot.default == kind else ref | {"required": ["kind"]}


def _required(cls: type[Spec]) -> list[str]:
    """The keys that a node of this Spec must have beside `kind`."""
    slots = slots_of(cls)
    return [
        name
        for name, info in cls.model_fields.items()
        if name != "kind" and info.is_required() and not inherits(info) and _must_write(slots.get(name))
    ]


def _must_write(slot: Slot | None) -> bool:
    return slot is None or slot.absent == "required"


def _described(raw: Json) -> Json:
    return {"description": raw["description"]} if "description" in raw else {}


def _reachable(defs: Json, roots: Any) -> Json:
    """The definitions that `roots` refer to, directly or through others."""
    found: Json = {}
    pending = [*_references(roots)]
    while pending:
        name = pending.pop()
        if name not in found:
            found[name] = defs[name]
            pending += _references(defs[name])
    return dict(sorted(found.items()))


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"].removeprefix("#/$defs/")
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _references(item)
