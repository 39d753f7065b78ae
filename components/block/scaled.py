"""Blocks that scale what they add."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from zoo.components.block.spec import ScaledSpec
from zoo.components.build import make
from zoo.components.step import Step


class Scaled(nn.Module):
    """x + scale mixer(norm(x)), then x + scale ffn(norm(x))."""

    def __init__(self, spec: ScaledSpec) -> None:
        super().__init__()
        self.spec = spec
        self.mixer_norm = make(spec.norm)
        self.mixer = make(spec.mixer)
        self.ffn_norm = make(spec.norm)
        self.ffn = make(spec.ffn)

    def forward(self, x_TD: Tensor, step: Step, state: Any) -> Tensor:
        """(T, D) to (T, D); `state` is this layer's, as the mixer knows it."""
        scale = self.spec.residual_scale
        x_TD = x_TD + self.mixer(self.mixer_norm(x_TD), step, state) * scale
        mixed_TD: Tensor = x_TD + self.ffn(self.ffn_norm(x_TD)) * scale
        return mixed_TD
