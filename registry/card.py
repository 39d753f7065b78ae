"""A checkpoint as data: the card, read from YAML or made from a mapping, with every value's place kept."""

import os
import re
from collections.abc import Mapping
from datetime import date
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, PrivateAttr, ValidationError
from pydantic_core import PydanticCustomError

from zoo.registry.catalog import CARD_SUFFIXES, Catalog, Resource
from zoo.registry.errors import CardError
from zoo.registry.faults import card_error, missing, spot
from zoo.registry.manager import BUILT_IN, log, manager
from zoo.registry.node import Node, from_plain, merge, put, shown, undotted
from zoo.registry.node import Path as Keys
from zoo.registry.reader import read_card, scalar

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
Feature = Literal["chat", "system", "tools", "fim", "vision", "audio", "thinking"]


def _date(value: Any) -> date:
    if isinstance(value, date):
        return value
    if not (isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", value)):
        raise PydanticCustomError("date", "Input should be a day as YYYY-MM-DD")
    try:
        return date.fromisoformat(value)
    except ValueError:
        raise PydanticCustomError("date", "Input should be a day of the calendar") from None


def _name(value: Any) -> str:
    if not (isinstance(value, str) and re.fullmatch(NAME, value)):
        raise PydanticCustomError("name", "Input should be letters, digits, dots, dashes and underscores")
    return value


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PydanticCustomError("node", "Input should be a mapping")
    return value


def _node_or_kind(value: Any) -> dict[str, Any] | str | None:
    if value is not None and not isinstance(value, dict | str):
        raise PydanticCustomError("node", "Input should be a mapping with `kind`, or a kind's name")
    return value


RawNode = Annotated[dict[str, Any] | str | None, PlainValidator(_node_or_kind)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Source(_Part):
    """Where the weights are."""

    hub: str | None = Field(default=None, description="Repository on the Hugging Face hub, as owner/name.")
    path: str | None = Field(default=None, description="Local folder or file, relative to the card's file.")
    revision: str | None = Field(default=None, description="Commit, tag or branch of the hub repository.")
    layout: str = Field(default="auto", description="Naming of the tensors; auto decides by the files' content.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="bfloat16", description="Type of the weights.")


class Text(_Part):
    """How text becomes tokens."""

    tokenizer: RawNode = Field(default=None, description="Tokenizer kind and its settings.")
    chat: RawNode = Field(default=None, description="Chat format: a kind's name, or its settings.")
    features: list[Feature] = Field(default_factory=list, description="What the model was trained for.")


class Card(_Part):
    """A checkpoint: what it is, where its weights are, how it reads text, and the tree of its components."""

    name: Annotated[str, BeforeValidator(_name)] = Field(description="Name of the checkpoint.")
    extends: str | None = Field(default=None, description="Card that this one changes: a name, or a path to a file.")
    family: str = Field(default="", description="Family of models, for listing.")
    summary: str = Field(default="", description="One sentence on the model.")
    license: str = Field(default="", description="Licence of the weights, as an SPDX name where there is one.")
    released: Annotated[date | None, BeforeValidator(lambda v: v if v is None else _date(v))] = Field(
        default=None, description="Day of release, YYYY-MM-DD."
    )
    context_length: int = Field(gt=0, description="The longest sequence in tokens.")
    source: Source = Field(default_factory=Source, description="Where the weights are.")
    text: Text = Field(default_factory=Text, description="How text becomes tokens.")
    unsupported: Annotated[str | None, Field(min_length=1)] = Field(
        default=None, description="What of the checkpoint zoo cannot compute: such a card is listed and not loaded."
    )
    model: Annotated[dict[str, Any], PlainValidator(_mapping)] = Field(
        default_factory=dict, description="Tree of components; left out where `unsupported` says why."
    )

    _node: Node = PrivateAttr()

    @classmethod
    def from_node(cls, node: Node) -> Self:
        """The card of a flat tree. Raises CardError for the first fault."""
        try:
            card = cls.model_validate(node.plain())
        except ValidationError as error:
            raise card_error(error, cls, node, ()) from None
        card._node = node
        card._check_source()
        card._check_model()
        return card

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], origin: str = "card") -> Self:
        """A card from plain values, `extends` followed. `origin` stands for the file in errors."""
        return cls.from_node(flatten(from_plain(data, origin), manager().catalog))

    @property
    def tree(self) -> Node:
        """The whole card with places."""
        return self._node

    @property
    def file(self) -> str:
        """The file that the card was read from, or what it was made from."""
        return self._node.file

    def where(self, path: Keys) -> str:
        """`file:line` of the value at `path`, or of the nearest value around it."""
        return self._node.deepest(path).where

    def local_path(self) -> Path | None:
        """`source.path`, relative to the file that names it; None for a card without one."""
        if self.source.path is None:
            return None
        return Path(self._node.deepest(("source", "path")).file).parent / Path(self.source.path).expanduser()

    def with_overrides(self, overrides: Mapping[str, Any]) -> Self:
        """A card with values changed at dotted paths, such as {"model.layers.0.mixer.window": 8}.

        List positions count the card's runs. A mapping replaces what it stands on. Raises CardError.
        """
        if not isinstance(overrides, Mapping) or not all(isinstance(key, str) for key in overrides):
            raise CardError(
                "not overrides",
                where="overrides",
                found=shown(overrides),
                expected='fields and their values, such as {"model.layers.0.mixer.window": 1024}',
            )
        node = self._node
        for key, value in overrides.items():
            node = put(node, undotted(key), from_plain(value, "override"))
        return type(self).from_node(node)

    def to_dict(self) -> dict[str, Any]:
        """The flat card as plain values, as written: no defaults, nothing to extend."""
        plain = self._node.plain()
        return {key: plain[key] for key in type(self).model_fields if key in plain and key != "extends"}

    def to_yaml(self) -> str:
        """The flat card as YAML that reads back to the same card."""
        return yaml.dump(
            self.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None
        )

    def _check_source(self) -> None:
        source = self.source
        if source.hub and source.path:
            raise self.fault(("source",), "`hub` and `path` both say where the weights are", expected="one of them")
        if source.revision and not source.hub:
            raise self.fault(
                ("source", "revision"), "a revision belongs to a hub repository", expected="`hub` beside it"
            )

    def _check_model(self) -> None:
        has_model = self._node.child("model") is not None
        if self.unsupported is None and not has_model:
            raise missing(type(self), self._node, ("model",))
        if self.unsupported is not None and has_model:
            raise self.fault(("unsupported",), "a model that zoo cannot compute has no tree", expected="no `model`")

    def refusal(self) -> CardError:
        """The error for running a card that says `unsupported`."""
        return self.fault(
            ("unsupported",),
            f"zoo cannot run {self.name} yet: {self.unsupported}",
            hint="`zoo list` shows the cards that it can run",
        )

    def fault(self, path: Keys, message: str, **details: Any) -> CardError:
        """A CardError placed at `path`."""
        return CardError(message, where=spot(self._node, path), **details)


def load_card(ref: str | Path, catalog: Catalog | None = None) -> Card:
    """The card of that name, or of the card file at that path. Raises CardError."""
    catalog = catalog or manager().catalog
    resource = find(ref, catalog)
    card = Card.from_node(flatten(_read(resource.file), catalog))
    if resource.owner and card.name != resource.name:
        raise card.fault(("name",), "a card's name is its file's", found=repr(card.name), expected=repr(resource.name))
    return card


def list_cards(catalog: Catalog | None = None) -> list[Card]:
    """Every known card by name. A plugin's faulty card is left out with a warning; a built-in one raises."""
    catalog = catalog or manager().catalog
    cards = []
    for name, resource in sorted(catalog.cards.items()):
        try:
            cards.append(load_card(name, catalog))
        except CardError as error:
            if resource.owner in BUILT_IN or manager().strict:
                raise
            log.warning("zoo: card %r of plugin %r is left out: %s", name, resource.owner, error)
    return cards


def find(ref: str | Path, catalog: Catalog, folder: Path | None = None, where: str | None = None) -> Resource:
    """The card file for a name or a path (relative to `folder`); a path has a slash or ends in .yaml."""
    text = str(ref)
    if isinstance(ref, str) and "/" not in text and "\\" not in text and not text.endswith(CARD_SUFFIXES):
        return catalog.find_card(text, where)
    path = Path(folder or "", Path(ref).expanduser())
    try:
        if path.is_dir():
            raise CardError(f"{path} is a folder", where=where, expected="a card file")
        if path.is_file():
            return Resource(path.stem, path, "")
    except OSError as error:
        raise CardError("not a path", where=where, found=f"{text[:60]!r}: {error.strerror}") from None
    raise CardError(f"there is no card file at {path}", where=where)


def flatten(node: Node, catalog: Catalog, seen: tuple[str, ...] = ()) -> Node:
    """The card over its parents, key by key."""
    extends = node.child("extends")
    if extends is None or extends.value is None:
        return node
    where = spot(node, ("extends",))
    if not isinstance(extends.value, str):
        raise CardError("wrong value", where=where, found=shown(extends.value), expected="a card's name or path")
    resource = find(extends.value, catalog, Path(extends.file).parent, where)
    seen = (*seen, os.path.realpath(node.file))
    file = os.path.realpath(str(resource.file))
    if file in seen:
        chain = " extends ".join(Path(name).stem for name in (*seen, file))
        raise CardError("cards extend each other in a circle", where=where, found=chain)
    return merge(_heritable(flatten(_read(resource.file), catalog, seen), node), node)


def _heritable(parent: Node, child: Node) -> Node:
    """What a child takes over: not the name, and no place of weights (hub, path, revision) beside its own."""
    kept = {key: value for key, value in parent.value.items() if key not in ("name", "extends")}
    own, theirs = child.child("source"), parent.child("source")
    if own and theirs and theirs.is_map and (own.child("hub") or own.child("path")):
        rest = {key: value for key, value in theirs.value.items() if key not in ("hub", "path", "revision")}
        kept["source"] = Node(rest, theirs.file, theirs.line)
    return Node(kept, parent.file, parent.line)


def _read(file: Traversable | Path) -> Node:
    try:
        return read_card(file.read_bytes(), str(file))
    except OSError as error:
        raise CardError("cannot read the card", where=str(file), found=error.strerror or str(error)) from None


class _Dumper(yaml.SafeDumper):
    """Quotes every text that our reader, or a YAML 1.1 reader, would take for something else; dates stay bare."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        if kind is not yaml.ScalarNode or not implicit[0]:
            return tag
        if tag == "tag:yaml.org,2002:timestamp":
            return "tag:yaml.org,2002:str"
        return "tag:yaml.org,2002:float" if isinstance(scalar(value), float) else tag

    def ignore_aliases(self, data: Any) -> bool:
        return True
