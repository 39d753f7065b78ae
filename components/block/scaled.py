"""Blocks that scale what they add."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from zoo.components.block.spec import ScaledSpec
from zoo.components.build import make
from zoo.components.norm.residual import added, added_and_normed
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
        mixed_TD: Tensor = self.mixer(self.mixer_norm(x_TD), step, state) * scale
        x_TD, normed_TD = added_and_normed(x_TD, mixed_TD, self.ffn_norm)
        return added(x_TD, self.ffn(normed_TD) * scale)
