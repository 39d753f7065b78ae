"""Blocks: how a mixer and a feed-forward are joined to the residual stream."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from zoo.components.build import make
from zoo.components.decoder.spec import PrenormSpec
from zoo.components.step import Step


class Prenorm(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, spec: PrenormSpec) -> None:
        super().__init__()
        self.spec = spec
        self.mixer_norm = make(spec.norm)
        self.mixer = make(spec.mixer)
        self.ffn_norm = make(spec.norm)
        self.ffn = make(spec.ffn)

    def forward(self, x_TD: Tensor, step: Step, state: Any) -> Tensor:
        """(T, D) to (T, D); `state` is this layer's, as the mixer knows it."""
        x_TD = x_TD + self.mixer(self.mixer_norm(x_TD), step, state)
        mixed_TD: Tensor = x_TD + self.ffn(self.ffn_norm(x_TD))
        return mixed_TD
