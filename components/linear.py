"""Matrix products, and the layouts of weights that make them fast.

The layout is a property of the weight, and `product` asks it. Where there are native kernels, `fastest` has bfloat16
weights stored in panels, whose kernels are the fastest for every number of rows. Row-major weights, for which panels
have no place, are multiplied with a few rows by the native kernels and with many by PyTorch; without the kernels all
are PyTorch's work. Which it is follows from the processor alone, so that it is the same in every run.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.components import few, native
from zoo.components.kinds import LANES
from zoo.components.matrix import Holder, Making, Matrix
from zoo.components.native import panels


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
    if few.runs(x_TI, weight_OI):
        return few.product(x_TI, weight_OI, bias_O)
    if native.runs(x_TI, weight_OI, bias_O):
        return native.product(x_TI, weight_OI, bias_O)
    return F.linear(x_TI, weight_OI, bias_O)


def fastest(weight: Tensor) -> Making | None:
    """What stores a parameter's matrices in the layout that this CPU reads fastest; None for as they are.

    weight: the parameter, which may still be on the meta device. For inference only: gradients and `state_dict` need
    the plain layout (`zoo.components.matrix.values` gives it back).
    """
    if not panels.pays(weight):
        return None
    if panels.packs():
        return Making(panels.packed, panels.PackedFilling, LANES)
    return Making(panels.Panels.of, panels.PanelsFilling, LANES)
