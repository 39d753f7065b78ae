"""The hooks of a plugin. Each gets a `register` callback, so that the registry knows who brought what.

A plugin is a module (or object) named by an entry point of the group `zoo`, with any of these functions marked
`@hookimpl`. Components are named by dotted paths and imported on first use: keep the plugin module itself light.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources.abc import Traversable
from pathlib import Path

import pluggy

RegisterComponent = Callable[[str, str, str], None]
RegisterFile = Callable[[Traversable | Path], None]
RegisterCommand = Callable[[str, str], None]

hookspec = pluggy.HookspecMarker("zoo")
hookimpl = pluggy.HookimplMarker("zoo")


@hookspec
def register_components(register: RegisterComponent) -> None:
    """Call `register(slot, kind, "package.module:SpecClass")` for every component."""


@hookspec
def register_cards(register: RegisterFile) -> None:
    """Call `register(folder)` for every folder of cards; a card's file is named `<card name>.yaml`."""


@hookspec
def register_layouts(register: RegisterFile) -> None:
    """Call `register(file)` for every table of weight names; the layout's name is the file's stem."""


@hookspec
def register_tokenizers(register: RegisterComponent) -> None:
    """Call `register(slot, kind, "package.module:SpecClass")`; the slot is "tokenizer" or "chat"."""


@hookspec
def register_commands(register: RegisterCommand) -> None:
    """Call `register(name, "package.module:command")` for every click command."""
