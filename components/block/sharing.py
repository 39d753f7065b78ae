"""Blocks with a part that several layers use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from zoo.components.block.spec import SharingSpec
from zoo.components.build import make
from zoo.components.linear import Linear
from zoo.components.step import Step


class Sharing(nn.Module):
    """x + mixer(norm(x + projection(shared(x)))).

    The first block that uses a shared one holds it, with its parameters, as `shared`; the others borrow it.
    """

    mixer_norm: nn.Module
    mixer: nn.Module

    def __init__(self, spec: SharingSpec) -> None:
        super().__init__()
        self.spec = spec
        for name, child in spec.children().items():
            self.add_module(name, make(child))
        self.projection = Linear(spec.dim, spec.dim)
        # In a list, for what a module holds as an attribute would be counted as its own.
        self.in_use = [self.get_submodule("shared")] if spec.uses else []

    def borrow(self, holder: Sharing) -> None:
        """Use the shared block that another one holds."""
        self.in_use = holder.in_use

    def forward(self, x_TD: Tensor, step: Step, state: Any) -> Tensor:
        """(T, D) to (T, D); `state` is the shared block's in this use, and the mixer's."""
        (shared,), (shared_state, mixer_state) = self.in_use, state
        given_TD = self.projection(shared(x_TD, step.embeddings_TD, step, shared_state, self.spec.use))
        mixed_TD: Tensor = x_TD + self.mixer(self.mixer_norm(x_TD + given_TD), step, mixer_state)
        return mixed_TD


def connect(layers: Iterable[nn.Module]) -> None:
    """Lets those that share a block with one before them use it."""
    holders: dict[int, Sharing] = {}
    for block in layers:
        if isinstance(block, Sharing):
            block.borrow(holders.setdefault(block.spec.number, block))
