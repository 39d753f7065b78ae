"""Matrix products, and the layouts of weights that make them fast.

A CPU reads a large matrix in PyTorch's row-major layout at about half of the memory's speed. oneDNN's own blocked
layout can reach all of it, so `pack_weights` stores weights that way once they are loaded (same size, same
results). The layout is a property of the weight: `product` asks it, and callers never know.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.components import native
from zoo.components.matrix import Holder, Index, Matrix
from zoo.components.tuning import LARGE, packed, packed_product, packing_pays, row_product


class Linear(Holder):
    """x W^T, plus a bias where there is one."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x_TI: Tensor) -> Tensor:
        """(T, in) to (T, out)."""
        return product(x_TI, self.matrix("weight"), self.bias)


def product(x_TI: Tensor, weight_OI: Tensor | Matrix, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b of (T, in) rows, by the way that suits the weight's layout and the number of rows."""
    if not isinstance(weight_OI, Tensor):
        return weight_OI.product(x_TI, bias_O)
    if native.runs(x_TI, weight_OI, bias_O):
        return native.product(x_TI, weight_OI, bias_O)
    if x_TI.shape[0] == 1 and _is_large(weight_OI) and not torch.is_grad_enabled():
        return row_product()(x_TI, weight_OI, bias_O)
    return F.linear(x_TI, weight_OI, bias_O)


@dataclass(frozen=True, slots=True)
class Packed:
    """A bfloat16 matrix in oneDNN's layout: of the same size, and exactly the same values."""

    weight_OI: Tensor

    @classmethod
    def of(cls, weight_OI: Tensor) -> Packed:
        """Packs row-major values."""
        return cls(packed(weight_OI))

    @property
    def shape(self) -> torch.Size:
        return self.weight_OI.shape

    @property
    def nbytes(self) -> int:
        return self.weight_OI.numel() * self.weight_OI.itemsize

    @property
    def device(self) -> torch.device:
        return self.weight_OI.device

    def product(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        return packed_product(x_TI, self.weight_OI, bias_O)

    def plain(self, index: Index = ()) -> Tensor:
        return self.weight_OI.to_dense()[index]

    def renewed(self, weight_OI: Tensor) -> Packed:
        return Packed.of(weight_OI)


def pack_weights(module: nn.Module) -> None:
    """Stores the large bfloat16 weights of a loaded model in the layout that this CPU reads fastest.

    Inference only: gradients and `state_dict` need the plain layout (`zoo.components.matrix.values` gives it back).
    Parameters are packed one by one, so that memory never holds more than one twice. Does nothing where it would not
    help.
    """
    for holder in module.modules():
        if isinstance(holder, Holder):
            for name in holder.MATRICES:
                if name not in holder.stored and can_pack(holder.get_parameter(name)):
                    holder.store(name, Packed.of)


def can_pack(weight: Tensor) -> bool:
    """Whether the matrices of `weight` are worth packing on this machine."""
    return _is_large(weight if weight.ndim == 2 else weight[0]) and packing_pays()


def _is_large(weight: Tensor) -> bool:
    return weight.dtype is torch.bfloat16 and weight.numel() >= LARGE and weight.device.type == "cpu"
