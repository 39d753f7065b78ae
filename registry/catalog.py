"""What is known by name: components, cards, weight layouts and commands, each with the plugin that brought it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from zoo.registry.errors import CardError, PluginError, nearest
from zoo.registry.spec import Spec

CARD_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class Entry:
    """A component: the `kind` that may stand in `slot`, and where its Spec is."""

    slot: str
    kind: str
    spec_path: str
    owner: str


@dataclass(frozen=True, slots=True)
class Resource:
    """A card or a weight layout: a file known by its stem."""

    name: str
    file: Traversable | Path
    owner: str


@dataclass(frozen=True, slots=True)
class Command:
    name: str
    path: str
    owner: str


@dataclass
class Catalog:
    components: dict[tuple[str, str], Entry] = field(default_factory=dict)
    cards: dict[str, Resource] = field(default_factory=dict)
    layouts: dict[str, Resource] = field(default_factory=dict)
    commands: dict[str, Command] = field(default_factory=dict)
    _specs: dict[tuple[str, str], type[Spec]] = field(default_factory=dict, repr=False)

    def kinds(self, slot: str) -> list[str]:
        """The kinds that may stand in `slot`."""
        return [kind for name, kind in self.components if name == slot]

    def find(self, slot: str, kind: str, where: str | None = None) -> Entry:
        """The component for `kind` in `slot`. Raises CardError with the nearest names."""
        entry = self.components.get((slot, kind))
        if entry is not None:
            return entry
        kinds = self.kinds(slot)
        if not kinds:
            raise CardError(f"no plugin brings a kind for the slot {slot!r}", where=where, found=f"kind {kind!r}")
        raise CardError(
            f"unknown kind of {slot}",
            where=where,
            found=repr(kind),
            expected=f"one of {', '.join(kinds)}",
            hint=nearest(kind, kinds) or self._elsewhere(kind),
        )

    def spec(self, entry: Entry) -> type[Spec]:
        """The Spec class of a component, imported on first use. Raises PluginError naming the plugin."""
        key = (entry.slot, entry.kind)
        if key not in self._specs:
            spec = load_path(entry.spec_path, entry.owner, f"the {entry.slot} {entry.kind!r}")
            if not (isinstance(spec, type) and issubclass(spec, Spec) and hasattr(spec, "module")):
                raise PluginError(
                    f"plugin {entry.owner}: {entry.spec_path} is not a component's Spec",
                    expected="a subclass of zoo.registry.spec.Spec with `module`",
                )
            self._specs[key] = spec
        return self._specs[key]

    def find_card(self, name: str, where: str | None = None) -> Resource:
        """The card file of that name. Raises CardError with the nearest names."""
        if name in self.cards:
            return self.cards[name]
        raise CardError(f"unknown card {name!r}", where=where, hint=nearest(name, self.cards) or "see `zoo list`")

    def add(self, other: Catalog) -> None:
        """Take over all that `other` knows. Raises PluginError, and takes nothing, if a name is claimed already."""
        for mine, theirs, what in self._tables(other):
            for key, new in theirs.items():
                if key in mine:
                    raise clash(what, key, mine[key], new)
        for mine, theirs, _ in self._tables(other):
            mine.update(theirs)

    def _tables(self, other: Catalog) -> Iterator[tuple[dict[Any, Any], dict[Any, Any], str]]:
        yield self.components, other.components, "component"
        yield self.cards, other.cards, "card"
        yield self.layouts, other.layouts, "layout"
        yield self.commands, other.commands, "command"

    def _elsewhere(self, kind: str) -> str | None:
        slots = [slot for slot, name in self.components if name == kind]
        return f"{kind!r} is a kind of {slots[0]}" if slots else None


def clash(what: str, key: Any, old: Any, new: Any) -> PluginError:
    """The error for a name that two registrations claim."""
    name = " ".join(key) if isinstance(key, tuple) else key
    first, second = (f"{item.owner} ({_origin(item)})" for item in (old, new))
    return PluginError(f"the {what} {name!r} is registered twice", found=f"{first} and {second}")


def _origin(item: Any) -> str:
    return str(item.spec_path if isinstance(item, Entry) else item.path if isinstance(item, Command) else item.file)


def load_path(path: str, owner: str, what: str) -> Any:
    """The object at "package.module:name". Raises PluginError naming the plugin that registered it."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        missing = error.name or module
        if module == missing or module.startswith(missing + "."):
            raise PluginError(f"plugin {owner}: there is no module {missing!r} for {what} ({path})") from error
        hint = f"install the package that brings it, for example `pip install {missing.split('.')[0]}`"
        raise PluginError(f"plugin {owner}: {what} needs {missing!r}, which is not installed", hint=hint) from error
    except AttributeError as error:
        raise PluginError(f"plugin {owner}: {what} is registered as {path}", found=one_line(error)) from error
    except Exception as error:
        raise PluginError(f"plugin {owner}: importing {what} ({path}) failed", found=one_line(error)) from error


def one_line(error: BaseException) -> str:
    """An exception in one line: its type and message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def card_files(folder: Traversable | Path) -> Iterator[tuple[str, Traversable | Path]]:
    """(card name, file) of every YAML file in `folder` and below."""
    for item in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if item.is_dir():
            yield from card_files(item)
        elif item.name.endswith(CARD_SUFFIXES):
            yield item.name.rpartition(".")[0], item
