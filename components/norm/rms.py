"""Root-mean-square norm."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.components import fused
from zoo.components.native import small
from zoo.components.norm.spec import RMSSpec


class RMS(nn.Module):
    """x / sqrt(mean(x^2) + eps) in float32, rounded to x's dtype, times the weight.

    The fused kernel gets no weight: with one it rounds once less than the models were trained with.
    across: set where ranks share the lanes, see `rms_reference`.
    """

    def __init__(self, spec: RMSSpec) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.dim))
        self.across: Callable[[Tensor], Tensor] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether a call does nothing but norm rows that are whole: no hooks, no other ranks."""
        return self.across is None and not self._forward_hooks and not self._forward_pre_hooks

    def forward(self, x_TD: Tensor) -> Tensor:
        """Normalises the last axis of (..., D)."""
        if self.across is not None:
            return rms_reference(x_TD, self.weight, self.spec.eps, self.across)
        if fused.runs(x_TD, "norm") and self.spec.dim <= fused.WIDEST:
            return fused.rms(x_TD, self.weight, self.spec.eps)
        if small.runs(x_TD) and self.weight.dtype is x_TD.dtype:
            return small.rms(x_TD, self.weight, self.spec.eps)
        return F.rms_norm(x_TD, (self.spec.dim,), None, self.spec.eps).mul_(self.weight)

    def added(self, x_TD: Tensor, y_TD: Tensor) -> tuple[Tensor, Tensor]:
        """x + y of (T, D) rows, and its norm: what stands between two parts of a block."""
        alike = self.is_plain and y_TD.dtype is x_TD.dtype and y_TD.shape == x_TD.shape and y_TD.stride(-1) == 1
        if alike and fused.runs(x_TD, "norm") and self.spec.dim <= fused.WIDEST:
            return fused.add_rms(x_TD, y_TD, self.weight, self.spec.eps)
        if alike and small.runs(x_TD) and self.weight.dtype is x_TD.dtype:
            return small.add_rms(x_TD, y_TD, self.weight, self.spec.eps)
        total_TD = x_TD + y_TD
        return total_TD, self(total_TD)


def rms_reference(
    x_TD: Tensor, weight_D: Tensor, eps: float, across: Callable[[Tensor], Tensor] = lambda mean_T1: mean_T1
) -> Tensor:
    """The formula, step by step. across: the mean over all ranks that share the lanes, of each one's mean square."""
    x_float = x_TD.float()
    scaled = x_float * torch.rsqrt(across(x_float.square().mean(-1, keepdim=True)) + eps)
    return scaled.to(x_TD.dtype) * weight_D
