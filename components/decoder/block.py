"""Blocks: how a mixer and a feed-forward are joined to the residual stream."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from zoo.components.build import make
from zoo.components.decoder.spec import PrenormSpec
from zoo.components.norm.residual import added, added_and_normed
from zoo.components.step import Step


class Prenorm(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)); either may be missing."""

    mixer_norm: nn.Module
    mixer: nn.Module
    ffn_norm: nn.Module
    ffn: nn.Module

    def __init__(self, spec: PrenormSpec) -> None:
        super().__init__()
        self.spec = spec
        for name, child in spec.children().items():
            self.add_module(name, make(child))

    def forward(self, x_TD: Tensor, step: Step, state: Any) -> Tensor:
        """(T, D) to (T, D); `state` is this layer's, as the mixer knows it."""
        if self.spec.mixer is None:
            return added(x_TD, self.ffn(self.ffn_norm(x_TD)))
        mixed_TD: Tensor = self.mixer(self.mixer_norm(x_TD), step, state)
        if self.spec.ffn is None:
            return added(x_TD, mixed_TD)
        x_TD, normed_TD = added_and_normed(x_TD, mixed_TD, self.ffn_norm)
        return added(x_TD, self.ffn(normed_TD))
