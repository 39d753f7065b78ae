"""Root-mean-square norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.components import fused
from zoo.components.native import small
from zoo.components.norm.spec import RMSSpec


class RMS(nn.Module):
    """x / sqrt(mean(x^2) + eps) in float32, rounded to x's dtype, times the weight.

    The fused kernel gets no weight: with one it rounds once less than the models were trained with.
    """

    def __init__(self, spec: RMSSpec) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.dim))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Normalises the last axis of (..., D)."""
        if fused.runs(x_TD) and self.spec.dim <= fused.WIDEST:
            return fused.rms(x_TD, self.weight, self.spec.eps)
        if small.runs(x_TD) and self.weight.dtype is x_TD.dtype:
            return small.rms(x_TD, self.weight, self.spec.eps)
        return F.rms_norm(x_TD, (self.spec.dim,), None, self.spec.eps).mul_(self.weight)


def rms_reference(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The formula, step by step."""
    x_float = x_TD.float()
    scaled = x_float * torch.rsqrt(x_float.square().mean(-1, keepdim=True) + eps)
    return scaled.to(x_TD.dtype) * weight_D
