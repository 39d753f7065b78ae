"""Discovery: built-ins and installed plugins go through the same hooks, and none can break the host."""

from __future__ import annotations

import functools
import importlib
import logging
import os
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from importlib.resources.abc import Traversable
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from zoo.registry import hooks
from zoo.registry.catalog import (
    Catalog,
    Command,
    Entry,
    Resource,
    card_files,
    clash,
    one_line,
)
from zoo.registry.environment import switch
from zoo.registry.errors import PluginError, ZooError, nearest

BUILT_IN = ("zoo.components", "zoo.text", "zoo.loading", "zoo.cards", "zoo.cli")
GROUP = "zoo"
DISABLE = "ZOO_DISABLE_PLUGINS"
STRICT = "ZOO_STRICT_PLUGINS"
TEXT_SLOTS = ("tokenizer", "chat")

log = logging.getLogger("zoo.plugins")


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """What became of a plugin. status: "active", "disabled" (by the environment) or "failed: <why>".

    provides: what it registered, such as "mixer retention", "card tiny-retention", "layout x", "command y".
    """

    name: str
    version: str
    origin: str
    status: str
    provides: tuple[str, ...] = ()


class Manager:
    """Loads plugins into one Catalog. `builtins` and `installed` choose what is discovered.

    strict: a plugin that fails is an error instead of a warning. disabled: names of plugins to leave out.
    """

    def __init__(
        self,
        *,
        builtins: bool = True,
        installed: bool = True,
        strict: bool = False,
        disabled: frozenset[str] = frozenset(),
    ) -> None:
        self.strict, self.disabled = strict, disabled
        self.catalog = Catalog()
        self._plugins: dict[str, PluginInfo] = {}
        self._pluggy = pluggy.PluginManager("zoo")
        self._pluggy.add_hookspecs(hooks)
        for module in BUILT_IN if builtins else ():
            self._add(importlib.import_module(module), module, _zoo_version(), "built in")
        for entry in entry_points(group=GROUP) if installed else ():
            self._discover(entry)

    def plugins(self) -> list[PluginInfo]:
        """Every plugin seen, failed and disabled ones included, in the order of loading."""
        return list(self._plugins.values())

    def components(self) -> dict[tuple[str, str], Entry]:
        return self.catalog.components

    def cards(self) -> dict[str, Resource]:
        return self.catalog.cards

    def layouts(self) -> dict[str, Resource]:
        return self.catalog.layouts

    def commands(self) -> dict[str, Command]:
        return self.catalog.commands

    def register(self, plugin: ModuleType | object, name: str, version: str = "", origin: str = "registered") -> None:
        """Adds a plugin by hand (a notebook, a test); the same rules as for an installed one."""
        if name in self.disabled:
            self._plugins[name] = PluginInfo(name, version, origin, "disabled")
            return
        try:
            if name in self._plugins:
                raise PluginError(f"two plugins are named {name!r}", found=f"{self._plugins[name].origin} and {origin}")
            self._add(plugin, name, version, origin)
        except Exception as error:
            self._failed(error, name, version, origin)

    def _discover(self, entry: EntryPoint) -> None:
        version = entry.dist.version if entry.dist else ""
        origin = f"{entry.dist.name} ({entry.value})" if entry.dist else entry.value
        if entry.name in self.disabled:
            self._plugins[entry.name] = PluginInfo(entry.name, version, origin, "disabled")
            return
        try:
            plugin = entry.load()
        except (Exception, SystemExit) as error:
            self._failed(error, entry.name, version, origin)
            return
        self.register(plugin, entry.name, version, origin)

    def _add(self, plugin: ModuleType | object, name: str, version: str, origin: str) -> None:
        self._pluggy.register(plugin, name)
        try:
            self._pluggy.check_pending()
            offered = self._collect(plugin, name)
            self.catalog.add(offered)
        except Exception:
            self._pluggy.unregister(plugin, name)
            raise
        self._plugins[name] = PluginInfo(name, version, origin, "active", tuple(_provides(offered)))

    def _collect(self, plugin: ModuleType | object, name: str) -> Catalog:
        """What one plugin registers, apart from the rest, so that a failing plugin leaves nothing behind."""
        offered, others = Catalog(), [other for other in self._pluggy.get_plugins() if other is not plugin]
        callbacks = _callbacks(offered, name)
        for hook, register in callbacks.items():
            self._pluggy.subset_hook_caller(hook, others)(register=register)
        return offered

    def _failed(self, error: BaseException, name: str, version: str, origin: str) -> None:
        why = error.args[0].rstrip(".") if isinstance(error, ZooError) else one_line(error)
        if self.strict:
            raise PluginError(f"plugin {name!r} of {origin} failed", found=why) from error
        key = name if name not in self._plugins else f"{name} [{origin}]"
        self._plugins[key] = PluginInfo(name, version, origin, f"failed: {why}")
        log.warning("zoo: plugin %r of %s is left out: %s. Silence this with %s=%s.", name, origin, why, DISABLE, name)


def _callbacks(offered: Catalog, owner: str) -> dict[str, Any]:
    """The `register` callback of each hook, writing into `offered`."""

    def component(slot: str, kind: str, spec: str) -> None:
        _claim(offered.components, "component", (slot, kind), Entry(slot, kind, _dotted(spec, owner), owner))

    def tokenizer(slot: str, kind: str, spec: str) -> None:
        if slot not in TEXT_SLOTS:
            raise PluginError(
                f"plugin {owner}: register_tokenizers", found=f"slot {slot!r}", expected="'tokenizer' or 'chat'"
            )
        component(slot, kind, spec)

    def cards(folder: Traversable | Path) -> None:
        if not folder.is_dir():
            raise PluginError(f"plugin {owner}: there is no folder of cards at {folder}")
        for name, file in card_files(folder):
            _claim(offered.cards, "card", name, Resource(name, file, owner))

    def layout(file: Traversable | Path) -> None:
        if not file.is_file():
            raise PluginError(f"plugin {owner}: there is no weight layout at {file}")
        name = file.name.rpartition(".")[0]
        _claim(offered.layouts, "layout", name, Resource(name, file, owner))

    def command(name: str, path: str) -> None:
        _claim(offered.commands, "command", name, Command(name, _dotted(path, owner), owner))

    return {
        "register_components": component,
        "register_tokenizers": tokenizer,
        "register_cards": cards,
        "register_layouts": layout,
        "register_commands": command,
    }


def _claim(table: dict[Any, Any], what: str, key: Any, new: Any) -> None:
    if key in table:
        raise clash(what, key, table[key], new)
    table[key] = new


def _dotted(path: str, owner: str) -> str:
    module, colon, name = path.partition(":") if isinstance(path, str) else ("", "", "")
    if not (module and colon and name.isidentifier()):
        raise PluginError(f"plugin {owner}: not a dotted path", found=repr(path), expected="'package.module:Name'")
    return path


def _provides(offered: Catalog) -> list[str]:
    return [
        *(f"{entry.slot} {entry.kind}" for entry in offered.components.values()),
        *(f"card {name}" for name in offered.cards),
        *(f"layout {name}" for name in offered.layouts),
        *(f"command {name}" for name in offered.commands),
    ]


def _zoo_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("zoo-inference")
    except PackageNotFoundError:
        return "source"


@functools.cache
def manager() -> Manager:
    """The process's plugins, discovered once. ZOO_DISABLE_PLUGINS=a,b leaves plugins out; ZOO_STRICT_PLUGINS=1
    makes a failing plugin an error. Worker processes call this too and so find the same plugins."""
    disabled = frozenset(name.strip() for name in os.environ.get(DISABLE, "").split(",") if name.strip())
    found = Manager(strict=switch(STRICT), disabled=disabled)
    for name in sorted(disabled - {plugin.name for plugin in found.plugins()}):
        hint = nearest(name, (plugin.name for plugin in found.plugins()))
        log.warning(
            "zoo: there is no plugin %r to leave out, as %s says%s", name, DISABLE, f"; {hint}" if hint else "."
        )
    return found
