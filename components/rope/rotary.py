"""Rotary position embeddings in the half layout: lanes i and i + r / 2 turn together (r: rotary_dim)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from zoo.components import fused
from zoo.components.build import load
from zoo.components.native import small
from zoo.components.rope.spec import RopeSpec
from zoo.components.step import Step

Angles = tuple[Tensor, Tensor]
"""cos and signed sin of every row, (T, 1, r) float32 each; sin is negative in the first half."""

GAINS = "rope gains"
"""Where learned gains of rope's angles stand in a step's memo."""


class Rope(nn.Module):
    """Turns queries and keys by their positions. The angles are computed once per step for all equal Specs."""

    def __init__(self, spec: RopeSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, x_THd: Tensor, step: Step) -> Tensor:
        """Turns the first r lanes of every head; the result has x's dtype, the arithmetic is float32."""
        gains_r: Tensor | None = step.memo.get(GAINS)
        angles = step.once(("rope", self.spec), lambda: rope_angles(self.spec, step.positions_T, gains_r))
        return rotate(x_THd, angles)


class LeRoPE(nn.Module):
    """Learned gains of rope's angles, the same in all layers: exp(alpha) for each lane pair."""

    def __init__(self, pairs: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(pairs))

    def forward(self, step: Step) -> None:
        """Says them to every layer of the step."""
        step.memo[GAINS] = self.alpha.float().exp()


def rope_angles(spec: RopeSpec, positions_T: Tensor, gains_r: Tensor | None = None) -> Angles:
    """cos and signed sin of position x frequency x gain, times the kind's factor."""
    frequencies_r, factor = _frequencies(spec, positions_T.device)
    if gains_r is not None:
        frequencies_r = frequencies_r * gains_r
    angles_Tr = torch.outer(positions_T.float(), frequencies_r)
    cos, sin = angles_Tr.cos() * factor, angles_Tr.sin() * factor
    return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)


def rotate(x_THd: Tensor, angles: Angles) -> Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin) for the halves a and b of the first r lanes."""
    cos, sin = angles
    if fused.runs(x_THd, "rope"):
        return fused.rotate(x_THd, cos, sin)
    if small.runs(x_THd):
        return small.rotate(x_THd, cos, sin)
    lanes = cos.shape[-1]
    turning = x_THd if lanes == x_THd.shape[-1] else x_THd[..., :lanes]
    turned = torch.addcmul(turning * cos, turning.roll(lanes // 2, -1), sin).to(x_THd.dtype)
    return turned if turning is x_THd else torch.cat((turned, x_THd[..., lanes:]), -1)


@lru_cache(maxsize=64)
def _frequencies(spec: RopeSpec, device: torch.device) -> tuple[Tensor, float]:
    """Made once, not at every step: a small model feels the dozen small operations."""
    frequencies_r, factor = load(spec.frequencies)(spec)
    return frequencies_r.to(device), factor
