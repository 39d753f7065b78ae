"""Blocks that norm what they read and what they add."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from zoo.components.block.spec import SandwichSpec
from zoo.components.build import make
from zoo.components.norm.residual import added, added_and_normed
from zoo.components.step import Step


class Sandwich(nn.Module):
    """x + norm(mixer(norm(x))), then x + norm(ffn(norm(x)))."""

    def __init__(self, spec: SandwichSpec) -> None:
        super().__init__()
        self.spec = spec
        self.mixer_norm = make(spec.norm)
        self.mixer = make(spec.mixer)
        self.mixer_post_norm = make(spec.norm)
        self.ffn_norm = make(spec.norm)
        self.ffn = make(spec.ffn)
        self.ffn_post_norm = make(spec.norm)

    def forward(self, x_TD: Tensor, step: Step, state: Any) -> Tensor:
        """(T, D) to (T, D); `state` is this layer's, as the mixer knows it."""
        mixed_TD: Tensor = self.mixer_post_norm(self.mixer(self.mixer_norm(x_TD), step, state))
        x_TD, normed_TD = added_and_normed(x_TD, mixed_TD, self.ffn_norm)
        return added(x_TD, self.ffn_post_norm(self.ffn(normed_TD)))
