"""Root-mean-square norm whose weight is stored less one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.components.native import small
from zoo.components.norm.spec import RMSPlusOneSpec


class RMSPlusOne(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (1 + weight) in float32, rounded once: bfloat16 holds weights near zero better."""

    def __init__(self, spec: RMSPlusOneSpec) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.dim))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Normalises the last axis of (..., D)."""
        if small.runs(x_TD) and self.weight.dtype is x_TD.dtype:
            return small.rms(x_TD, self.weight, self.spec.eps, plus_one=True)
        normed_TD = F.rms_norm(x_TD.float(), (self.spec.dim,), 1 + self.weight.float(), self.spec.eps)
        return normed_TD.to(x_TD.dtype)
