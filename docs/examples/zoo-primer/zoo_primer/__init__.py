"""Primer's squared-ReLU feed-forward for zoo."""

from __future__ import annotations

from importlib.resources import files

from zoo.registry.hooks import RegisterComponent, RegisterFile, hookimpl


@hookimpl
def register_components(register: RegisterComponent) -> None:
    register("ffn", "relu_squared", "zoo_primer.spec:ReluSquaredSpec")


@hookimpl
def register_cards(register: RegisterFile) -> None:
    register(files("zoo_primer") / "cards")


@hookimpl
def register_layouts(register: RegisterFile) -> None:
    register(files("zoo_primer") / "primer.yaml")
