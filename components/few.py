"""Products of few rows with row-major weights, as a Triton kernel for CUDA devices: at the speed of memory if at all.

A program takes a few outputs and all of their inputs, so that there are many programs for any matrix and nothing is
added up afterwards. It can apply the gate of a feed-forward to what it has computed. The formula is `F.linear`.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from zoo.components import fused

MOST = 8
"""Rows up to which the kernel is used: it multiplies on the plain units, which keep up with memory for so many."""

DEPTH = 512
"""Inputs that a program reads at once."""

SUMS = 32
"""Rows of inputs whose products a program keeps apart."""


def runs(x_TI: Tensor, weight_OI: Tensor) -> bool:
    """Whether the kernel multiplies these."""
    fits = 0 < len(x_TI) <= MOST and weight_OI.stride(1) == 1 and weight_OI.dtype is x_TI.dtype
    return fits and fused.runs(x_TI, "rows")


def product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, *, gated: bool = False) -> Tensor:
    """x W^T + b of (T, I) rows; gated: silu(first half) * second half of that, without a bias."""
    rows, inputs = x_TI.shape
    outputs = len(weight_OI) // 2 if gated else len(weight_OI)
    y_TO = torch.empty(rows, outputs, dtype=x_TI.dtype, device=x_TI.device)
    tile = 1 << (rows - 1).bit_length()
    out = min(8, SUMS // (2 * tile if gated else tile))
    _kernels().multiply[(-(-outputs // out),)](
        x_TI,
        weight_OI,
        weight_OI if bias_O is None else bias_O,
        y_TO,
        inputs,
        outputs,
        rows,
        x_TI.stride(0),
        weight_OI.stride(0),
        ROWS=tile,
        OUT=out,
        DEPTH=DEPTH,
        BIASED=bias_O is not None,
        GATED=gated,
    )
    return y_TO


@cache
def _kernels() -> ModuleType:
    from zoo.components import few_kernels

    return few_kernels
