"""Products of few rows with a large matrix: the work of decoding.

A CPU reads a matrix in PyTorch's row-major layout at about half of the memory's speed. oneDNN's own blocked
layout reaches all of it, so `pack` stores weights that way once they are loaded (same size, same results). The
layout is a property of the weight: `product` asks it, and callers never know.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PACKED_SIZE = 1 << 19
"""Elements from which a packed product beats its own call overhead of ten microseconds."""


class Linear(nn.Module):
    """x W^T, plus a bias where there is one."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x_TI: Tensor) -> Tensor:
        """(T, in) to (T, out)."""
        return product(x_TI, self.weight, self.bias)

    def pack(self) -> None:
        """Stores the weight in oneDNN's layout, for inference on this machine only."""
        self.weight = nn.Parameter(packed(self.weight.detach()), requires_grad=False)


def product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b of (T, in) rows, by the way that suits the weight's layout and the number of rows."""
    if weight_OI.is_mkldnn:
        packed_product = torch.ops.mkldnn._linear_pointwise.default
        result: Tensor = packed_product(x_TI, weight_OI, bias_O, "none", [], "")
        return result
    if len(x_TI) == 1 and weight_OI.dtype is torch.bfloat16 and weight_OI.device.type == "cpu":
        return _single_row(x_TI, weight_OI, bias_O)
    return F.linear(x_TI, weight_OI, bias_O)


def can_pack(weight: Tensor) -> bool:
    """Whether this build and this CPU have oneDNN's bfloat16 products, and `weight` is worth packing."""
    return (
        weight.device.type == "cpu"
        and weight.dtype is torch.bfloat16
        and weight.numel() >= PACKED_SIZE
        and torch.backends.mkldnn.is_available()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def packed(weight_OI: Tensor) -> Tensor:
    """A copy in oneDNN's layout: opaque, same shape and size; `to_dense()` gives the original back."""
    result: Tensor = torch.ops.mkldnn._reorder_linear_weight.default(weight_OI, 1)
    return result


def _single_row(x_1I: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """Two equal rows instead of one: oneDNN's product of several rows reads the weight a third faster."""
    if torch.is_grad_enabled() or weight_OI.numel() < PACKED_SIZE:
        return F.linear(x_1I, weight_OI, bias_O)
    return F.linear(x_1I.expand(2, -1), weight_OI, bias_O)[:1]
