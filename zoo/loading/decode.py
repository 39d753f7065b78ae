"""Codes of quantised tensors to numbers, a few rows at a time: the table of the code, times the scale of its block."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import prod

import torch

from zoo.loading.mapping import Placement
from zoo.loading.pickled import DTYPES
from zoo.loading.reader import BITS, TensorInfo

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of a four-bit code without its sign, which is the highest bit (OCP MX Specification 1.0)."""

ReadBytes = Callable[[TensorInfo, int, int], torch.Tensor]
"""(tensor, start, stop) -> those of its bytes, on the CPU."""


def decoded(codes: torch.Tensor, placement: Placement, rows: tuple[int, int], read: ReadBytes) -> torch.Tensor:
    """The numbers (rows, *row_shape) in float32 of the bytes of rows from `rows[0]` to `rows[1]`, on their device."""
    info, (width, below) = placement.source, (placement.row_shape[-1], prod(placement.row_shape[:-1]))
    assert info.coding is not None
    values = _table(info.dtype).to(codes.device).index_select(0, codes.int()).view(torch.float32).view(-1, width)
    scales = _scales(info, (rows[0] * below, rows[1] * below), read).to(codes.device)
    _multiply(values, scales, info.coding.blocks[-1])
    return values.view(-1, *placement.row_shape)


@cache
def _table(dtype: str) -> torch.Tensor:
    """(256,): what a byte holds, one float32 or two of them, which are moved as one float64."""
    if dtype == "F8_E4M3":
        return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    signed = torch.tensor([*E2M1, *(-value for value in E2M1)])
    pairs = torch.stack([signed.repeat(16), signed.repeat_interleave(16)], dim=1)
    return pairs.view(torch.float64).flatten()


def _multiply(values: torch.Tensor, scales: torch.Tensor, block: int) -> None:
    """Each `block` columns with the scale of theirs; the last block may be cut off."""
    width, groups = values.shape[1], scales.shape[1]
    if groups == 1:
        values.mul_(scales)
    elif groups * block == width:
        values.unflatten(1, (groups, block)).mul_(scales.unsqueeze(2))
    else:
        values.mul_(scales.repeat_interleave(block, dim=1)[:, :width])


def _scales(info: TensorInfo, rows: tuple[int, int], read: ReadBytes) -> torch.Tensor:
    """(rows or 1, blocks) in float32: scales of these rows of the tensor, seen as a matrix of its last axis' width."""
    coding = info.coding
    assert coding is not None
    counts = [-(-length // block) for length, block in zip(info.shape, coding.blocks, strict=True)]
    picked = _scale_rows(info.shape, coding.blocks, counts, torch.arange(*rows))
    low, high = int(picked[0]), int(picked[-1]) + 1
    size = counts[-1] * BITS[coding.scale.dtype] // 8
    scales = _floats(coding.scale, read(coding.scale, low * size, high * size)).view(-1, counts[-1])
    if coding.divisor is not None:
        scales = scales / read(coding.divisor, 0, 4).view(torch.float32)
    return scales if high - low == 1 else scales[picked - low]


def _scale_rows(shape: tuple[int, ...], blocks: tuple[int, ...], counts: list[int], rows: torch.Tensor) -> torch.Tensor:
    """Which row of scales each row of the tensor uses: its place along each axis, counted in blocks."""
    picked, stride = torch.zeros_like(rows), 1
    for length, block, count in reversed([*zip(shape[:-1], blocks[:-1], counts[:-1], strict=True)]):
        picked += rows % length // block * stride
        rows, stride = rows // length, stride * count
    return picked


def _floats(info: TensorInfo, data: torch.Tensor) -> torch.Tensor:
    """Scales as float32; exponents alone are powers of two."""
    if info.dtype in ("U8", "F8_E8M0"):
        return torch.ldexp(torch.ones(data.shape), data.int() - 127)
    return data.view(DTYPES[info.dtype]).float()
