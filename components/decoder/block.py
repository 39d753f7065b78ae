"""Blocks: how a mixer and a feed-forward are joined to the residual stream."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from zoo.components.build import make
from zoo.components.decoder.spec import PrenormSpec
from zoo.components.norm.rms import RMS
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
            return self._fed(x_TD, self.ffn_norm(x_TD))
        mixed_TD: Tensor = self.mixer(self.mixer_norm(x_TD), step, state)
        if self.spec.ffn is None:
            return x_TD + mixed_TD
        return self._fed(*added(self.ffn_norm, x_TD, mixed_TD))

    def _fed(self, x_TD: Tensor, normed_TD: Tensor) -> Tensor:
        fed_TD: Tensor = self.ffn(normed_TD)
        return x_TD + fed_TD


def added(norm: nn.Module, x_TD: Tensor, y_TD: Tensor) -> tuple[Tensor, Tensor]:
    """x + y, and its norm."""
    if isinstance(norm, RMS):
        return norm.added(x_TD, y_TD)
    total_TD = x_TD + y_TD
    return total_TD, norm(total_TD)
