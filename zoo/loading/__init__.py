"""Weights: from files, here or on the hub, to tensors in a module. Tables of names are registered like a plugin's."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from importlib.resources.abc import Traversable

from zoo.registry.hooks import hookimpl

OF_FAMILIES = ("glm4", "gpt_oss", "latent", "postnorm")
NAMES = ("mistral", "huggingface", *(f"huggingface_{name}" for name in OF_FAMILIES), "zoo")


@hookimpl
def register_layouts(register: Callable[[Traversable], None]) -> None:
    """One table for each way of naming a model's tensors."""
    for name in NAMES:
        register(resources.files("zoo.loading") / f"{name}.yaml")
