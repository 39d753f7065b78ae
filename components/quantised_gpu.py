"""Products with matrices in eight and four bits on CUDA devices, as Triton kernels.

Few rows are multiplied with codes as they lie: each byte is read once, whole numbers are exact in the type of the rows,
and sums are float32. For many rows a matrix is made numbers once, and PyTorch multiplies: its arithmetic then counts
for more than the bytes. The formula is `F.linear` of the plain values (zoo.components.quantised); unlike on a CPU, rows
are not rounded to eight bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.components.kinds import GROUP, LANES, Kind

MANY = 256
"""Rows above which a matrix is made numbers first. By arithmetic, not measured: a tile of rows reads it once more."""

TILE = 64
"""The most rows that a program takes."""

SPAN = 256
"""Bytes of a row that a program reads at once."""


def product(
    kind: Kind, codes: Tensor, scales: Tensor, shape: Sequence[int], x_TI: Tensor, bias_O: Tensor | None
) -> Tensor:
    """x W^T + b of (T, I) rows in x's type. codes, scales: of one matrix (O, I)."""
    if len(x_TI) > MANY:
        return F.linear(x_TI, numbers(kind, codes, scales, shape, x_TI.dtype), bias_O)
    return _multiply(kind, codes, scales, shape, x_TI, bias_O, None)


def grouped(kind: Kind, codes: Tensor, scales: Tensor, shape: Sequence[int], x_NI: Tensor, ends_E: Tensor) -> Tensor:
    """(N, O): rows that stand expert by expert, each times its expert's matrix; rows behind the last end are left out.

    codes, scales: of the first of E matrices (O, I), which lie one behind the other. ends_E: int32, where the rows of
    each expert end.
    """
    return _multiply(kind, codes, scales, shape, x_NI, None, ends_E)


def numbers(kind: Kind, codes: Tensor, scales: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A matrix (O, I) as numbers, row-major."""
    outputs, inputs = shape
    groups, depth, out = codes.shape[-3], 128, 2 * LANES
    o_OI = torch.empty(outputs, inputs, dtype=dtype, device=codes.device)
    grid = (-(-groups * 4 * kind.bits // depth), -(-outputs // out))
    _kernels().numbers[grid](codes, scales, o_OI, inputs, outputs, groups, OUT=out, DEPTH=depth, BITS=kind.bits)
    return o_OI


def _multiply(
    kind: Kind,
    codes: Tensor,
    scales: Tensor,
    shape: Sequence[int],
    x_TI: Tensor,
    bias_O: Tensor | None,
    ends_E: Tensor | None,
) -> Tensor:
    outputs, inputs = shape
    rows, experts = len(x_TI), 0 if ends_E is None else len(ends_E)
    x_TI = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
    y_TO = torch.empty(rows, outputs, dtype=x_TI.dtype, device=x_TI.device)
    tile = min(TILE, max(16, 1 << (-(-rows // max(experts, 1)) - 1).bit_length())) if rows else 16
    out = LANES * (2 if tile == 16 else 4)
    depth = SPAN // x_TI.dtype.itemsize * kind.bits // 8
    # Every expert may have one tile that is not full.
    grid = (-(-rows // tile) + max(experts - 1, 0), -(-outputs // out))
    if rows:
        _kernels().multiply[grid](
            x_TI,
            codes,
            scales,
            scales if bias_O is None else bias_O,
            y_TO,
            codes if ends_E is None else ends_E,
            rows,
            inputs,
            outputs,
            x_TI.stride(0),
            codes.shape[-3],
            experts,
            ROWS=tile,
            OUT=out,
            DEPTH=depth,
            BITS=kind.bits,
            EXPERTS=0 if ends_E is None else 1 << (experts - 1).bit_length(),
            BIASED=bias_O is not None,
        )
    return y_TO


@cache
def _kernels() -> ModuleType:
    from zoo.components import quantised_kernels

    return quantised_kernels


assert GROUP == 32, "the kernels' arithmetic is that of groups of 32 inputs"
