"""The built-in cards: one YAML file per checkpoint, foldered by family."""

from __future__ import annotations

from importlib.resources import files

from zoo.registry.hooks import RegisterFile, hookimpl


@hookimpl
def register_cards(register: RegisterFile) -> None:
    register(files("zoo.cards"))
