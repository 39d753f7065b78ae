"""Blocks that norm what they add."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from zoo.components.block.spec import PostnormSpec
from zoo.components.build import make
from zoo.components.norm.residual import added
from zoo.components.step import Step


class Postnorm(nn.Module):
    """x + norm(mixer(x)), then x + norm(ffn(x))."""

    def __init__(self, spec: PostnormSpec) -> None:
        super().__init__()
        self.spec = spec
        self.mixer = make(spec.mixer)
        self.mixer_post_norm = make(spec.norm)
        self.ffn = make(spec.ffn)
        self.ffn_post_norm = make(spec.norm)

    def forward(self, x_TD: Tensor, step: Step, state: Any) -> Tensor:
        """(T, D) to (T, D); `state` is this layer's, as the mixer knows it."""
        x_TD = added(x_TD, self.mixer_post_norm(self.mixer(x_TD, step, state)))
        return added(x_TD, self.ffn_post_norm(self.ffn(x_TD)))
