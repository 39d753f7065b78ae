"""Matrix products, and the layouts of weights that make them fast.

A CPU reads a large matrix in PyTorch's row-major layout at about half of the memory's speed. oneDNN's own blocked
layout can reach all of it, so `pack_weights` stores weights that way once they are loaded (same size, same
results). The layout is a property of the weight: `product` asks it, and callers never know.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.components.tuning import LARGE, packed, packed_product, packing_pays, row_product


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
        """Stores the weight in oneDNN's layout if that is worth it; name, shape and dtype stay."""
        if can_pack(self.weight):
            self.weight = nn.Parameter(packed(self.weight.detach()), requires_grad=False)


def product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b of (T, in) rows, by the way that suits the weight's layout and the number of rows."""
    if weight_OI.is_mkldnn:
        return packed_product(x_TI, weight_OI, bias_O)
    if x_TI.shape[0] == 1 and _is_large(weight_OI) and not torch.is_grad_enabled():
        return row_product()(x_TI, weight_OI, bias_O)
    return F.linear(x_TI, weight_OI, bias_O)


@runtime_checkable
class Packable(Protocol):
    """A module that can store its own weights in oneDNN's layout."""

    def pack(self) -> None:
        """Packs what is worth it."""
        ...


@runtime_checkable
class Parted(Protocol):
    """A module that keeps a parameter's numbers elsewhere, in parts of its own."""

    def part(self, name: str, index: tuple[int | slice, ...]) -> Tensor:
        """A piece of one of its own parameters, in the plain layout."""
        ...


def stored(module: nn.Module, name: str, index: tuple[int | slice, ...] = ()) -> Tensor:
    """A piece of a parameter in the plain layout, however the module that owns it stores it."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if isinstance(owner, Parted):
        return owner.part(leaf, index)
    value = owner.get_parameter(leaf).detach()
    return (value.to_dense() if value.is_mkldnn else value)[index]


def pack_weights(module: nn.Module) -> None:
    """Stores the large bfloat16 weights of a loaded model in the layout that this CPU reads fastest.

    Inference only: gradients and `state_dict` need the plain layout (`weight.to_dense()` gives it back). Weights
    are packed one by one, so that memory never holds more than one twice. Does nothing where it would not help.
    """
    for child in module.modules():
        if isinstance(child, Packable):
            child.pack()


def can_pack(weight: Tensor) -> bool:
    """Whether `weight` is worth packing on this machine."""
    return _is_large(weight) and not weight.is_mkldnn and packing_pays()


def _is_large(weight: Tensor) -> bool:
    return weight.dtype is torch.bfloat16 and weight.numel() >= LARGE and weight.device.type == "cpu"
