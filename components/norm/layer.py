"""Layer norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.components.norm.spec import LayerNormSpec


class LayerNorm(nn.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias in float32, rounded once."""

    def __init__(self, spec: LayerNormSpec) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.dim))
        self.bias = nn.Parameter(torch.empty(spec.dim))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Normalises the last axis of (..., D)."""
        return F.layer_norm(x_TD, (self.spec.dim,), self.weight, self.bias, self.spec.eps)
