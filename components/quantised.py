"""Matrices in eight and in four bits: how they are made, multiplied with and read.

A weight is code times scale, where the scale belongs to an output (int8) or to 32 inputs of an output (int4). A row
that is multiplied with is rounded to eight bits as well, each 32 of its numbers by a scale of their own, so that the
products are sums of whole numbers, which processors do fastest; the sums of groups are added up in float32. That is
one formula, `product_reference`, and the C source (native/quantised.c) computes the same. Without it, weights are
made numbers again a few rows at a time, which saves memory and no time, and rows are not rounded. On CUDA devices
Triton kernels (quantised_gpu.py) read the same codes.

The layout: blocks of 16 outputs; in a block groups of 32 inputs; in a group fours of inputs, 64 bytes that hold the
four codes of each output. Codes are stored with an offset that makes them unsigned. Of four-bit codes, fours 0 to 3
of a group are the low halves of its bytes, 4 to 7 the high ones.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.components import fused, quantised_gpu
from zoo.components.kinds import GROUP, KINDS, LANES, Kind
from zoo.components.matrix import Matrix
from zoo.components.native import quantised as native
from zoo.components.pages import fresh

log = logging.getLogger("zoo.components")

CPU = torch.device("cpu")
FOURS = GROUP // 4
TRIED = torch.linspace(-9.5, -6.5, 8, device="cpu").tolist()
"""Codes, not rounded, that the largest weight of a group may get: the one with the least error is taken."""

PIECE, MANY = 1 << 19, 1 << 23
"""Elements that are numbers at a time, in float32, on a CPU and elsewhere."""

ROUNDED = 1 << 16
"""Elements that are rounded at a time on a CPU, by each of several threads, with some six numbers for each."""

SMALLEST = 1e-30
"""Scales are at least this, so that groups of zeros can be divided by them."""

TOLERANCE = 1e-5
"""Relative error of the C source's float32 products that the check at first use allows."""


@dataclass(frozen=True, slots=True)
class Quantised:
    """A weight (O, I) of `dtype` in eight or four bits.

    codes: uint8 (blocks, groups, bits, 64), as above. scales: float32 (blocks, 16), or bfloat16 (blocks, groups, 16).
    lost, size: the squared norms of the error and of the weight.
    """

    kind: Kind
    shape: torch.Size
    dtype: torch.dtype
    codes: Tensor
    scales: Tensor
    lost: float
    size: float

    @classmethod
    def of(cls, kind: Kind, weight_OI: Tensor) -> Quantised:
        """Quantises row-major values."""
        filling = QuantisedFilling(kind, weight_OI.shape, weight_OI.dtype, weight_OI.device)
        filling.put(0, weight_OI)
        return filling.matrix()

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def product(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        stored = self.kind, self.codes, self.scales, self.shape
        if self.codes.is_cpu and is_native() and not (torch.is_grad_enabled() and x_TI.requires_grad):
            return native.product(*stored, x_TI, bias_O)
        if fused.runs(x_TI, "products"):
            return quantised_gpu.product(*stored, x_TI, bias_O)
        parts = [F.linear(x_TI, piece) for piece in self._pieces()]
        y_TO = torch.cat(parts, dim=1)
        return y_TO if bias_O is None else y_TO.add_(bias_O)

    def plain(self, index: tuple[int | slice, ...] = ()) -> Tensor:
        rows, *rest = index or (slice(None),)
        first, last, _ = rows.indices(self.shape[0]) if isinstance(rows, slice) else (rows, rows + 1, 1)
        block = first // LANES
        values_OI = self._numbers(block, -(-last // LANES))[first - block * LANES : last - block * LANES]
        values_OI = values_OI[:, : self.shape[1]].to(self.dtype)
        return values_OI[(slice(None) if isinstance(rows, slice) else 0, *rest)]

    def renewed(self, weight_OI: Tensor) -> Quantised:
        return Quantised.of(self.kind, weight_OI)

    def _pieces(self) -> Iterator[Tensor]:
        """The weight a few rows at a time, in its dtype."""
        step = max(1, _piece(self.device) // (self.shape[1] * LANES)) * LANES
        for first in range(0, self.shape[0], step):
            yield self.plain((slice(first, min(first + step, self.shape[0])),))

    def _numbers(self, first: int, last: int) -> Tensor:
        """Blocks as float32 (rows, inputs), what fills them up included."""
        values = codes_of(self.kind, self.codes[first:last]).float()
        scales = self.scales[first:last].float()
        if self.kind.grouped:
            return values.mul_(scales.transpose(1, 2).unsqueeze(3)).flatten(2).flatten(0, 1)
        return values.mul_(scales[:, :, None, None]).flatten(2).flatten(0, 1)


class QuantisedFilling:
    """A matrix that is quantised in the order in which its rows come."""

    def __init__(self, kind: Kind, shape: torch.Size, dtype: torch.dtype, device: torch.device = CPU) -> None:
        self.kind, self.shape, self.dtype = kind, shape, dtype
        self._codes, self._scales = _room(kind, shape, device)
        self._sums: list[tuple[float, float]] = []

    def put(self, first: int, rows_RI: Tensor) -> None:
        block, blocks = first // LANES, -(-len(rows_RI) // LANES)
        codes, scales = (t[block : block + blocks] for t in (self._codes, self._scales))
        if rows_RI.device.type == "cpu" and is_native():
            self._sums.append(native.quantise(self.kind, rows_RI, codes, scales, torch.tensor(TRIED)))
        else:
            self._sums.append(quantise_reference(self.kind, rows_RI, codes, scales))

    def matrix(self) -> Quantised:
        lost, size = (sum(sorted(sums)) for sums in zip(*self._sums, strict=True))
        return Quantised(self.kind, self.shape, self.dtype, self._codes, self._scales, lost, size)


def stacked(matrices: Sequence[Matrix]) -> list[Matrix]:
    """Matrices of experts, where a device's kernel finds them by their number: one behind the other. Others as they
    are."""
    mine = [matrix for matrix in matrices if isinstance(matrix, Quantised) and not matrix.codes.is_cpu]
    if not mine:
        return [*matrices]
    codes, scales = (torch.stack([getattr(matrix, name) for matrix in mine]) for name in ("codes", "scales"))
    return [replace(one, codes=codes[i], scales=scales[i]) for i, one in enumerate(mine)]


def grouped(matrices: Sequence[Matrix], x_NI: Tensor, ends_E: Tensor) -> Tensor:
    """(N, O): rows that stand expert by expert up to `ends_E`, each times the matrix of its expert, all `stacked`.

    What comes of rows behind the last end is not defined.
    """
    first = matrices[0]
    if isinstance(first, Quantised) and fused.runs(x_NI, "products"):
        return quantised_gpu.grouped(first.kind, first.codes, first.scales, first.shape, x_NI, ends_E)
    plain_EOI = torch.stack([matrix.plain() for matrix in matrices])
    return F.grouped_mm(x_NI, plain_EOI.transpose(1, 2), offs=ends_E)


@cache
def is_native() -> bool:
    """Whether the C source is in use: it is there, and right on this processor."""
    if not native.there():
        return False
    errors = [_native_error(kind) for kind in KINDS.values()]
    if all(error < TOLERANCE for error in errors):
        return True
    log.warning("zoo: native products of quantised weights are off by %.0e here and are left out", max(errors))
    return False


def _native_error(kind: Kind) -> float:
    """The relative error of a small product: a processor may not be the one that the tests ran on."""
    draw = torch.Generator().manual_seed(0)
    weight_OI, x_TI, bias_O = (torch.randn(*size, generator=draw) for size in ((37, 75), (9, 75), (37,)))
    codes, scales = _room(kind, weight_OI.shape, weight_OI.device)
    lost, size = native.quantise(kind, weight_OI, codes, scales, torch.tensor(TRIED))
    made = Quantised(kind, weight_OI.shape, weight_OI.dtype, codes, scales, lost, size)
    expected = product_reference(made, x_TI, bias_O)
    found = native.product(kind, codes, scales, made.shape, x_TI, bias_O)
    wrong = float((found - expected).norm() / expected.norm())
    error = float((made.plain() - weight_OI).norm() / weight_OI.norm())
    return max(wrong, abs(error - float((lost / size) ** 0.5)))


def _room(kind: Kind, shape: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix, to be filled."""
    blocks, groups = -(-shape[0] // LANES), -(-shape[1] // GROUP)
    codes = fresh((blocks, groups, kind.bits, 4 * LANES), torch.uint8, device)
    if kind.grouped:
        return codes, fresh((blocks, groups, LANES), torch.bfloat16, device)
    return codes, torch.empty(blocks, LANES, dtype=torch.float32, device=device)


def _piece(device: torch.device) -> int:
    """Elements that are numbers at a time: what fits a processor's caches, or what keeps a device busy."""
    return PIECE if device.type == "cpu" else MANY


def quantise_reference(kind: Kind, weight_OI: Tensor, codes: Tensor, scales: Tensor) -> tuple[float, float]:
    """Fills `codes` and `scales` of a matrix; returns the squared norms of the error and of the weight."""
    blocks, groups = codes.shape[:2]
    lost, size = 0.0, 0.0
    piece = ROUNDED if weight_OI.device.type == "cpu" else MANY
    step = max(1, piece // (groups * GROUP * LANES))
    for first in range(0, blocks, step):
        last = min(first + step, blocks)
        rows = weight_OI[first * LANES : last * LANES].float()
        filled = F.pad(rows, (0, groups * GROUP - rows.shape[1], 0, (last - first) * LANES - len(rows)))
        values = filled.view(last - first, LANES, groups, GROUP)
        whole, scale = (_in_groups if kind.grouped else _in_rows)(values)
        lost += float((whole * scale - values).square().sum())
        size += float(values.square().sum())
        codes[first:last] = stored_codes(kind, whole)
        scales[first:last] = scale[..., 0].transpose(1, 2) if kind.grouped else scale[:, :, 0, 0]
    return lost, size


def product_reference(weight: Quantised, x_TI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b with rows in eight bits, in float32."""
    columns = weight.codes.shape[1] * GROUP
    grouped = F.pad(x_TI.float(), (0, columns - x_TI.shape[1])).unflatten(1, (-1, GROUP))
    most = grouped.abs().amax(-1, keepdim=True)
    whole = (grouped * (127 / most.clamp(min=SMALLEST))).round()
    rounded_TI = (whole * (most / 127)).flatten(1)
    y_TO: Tensor = F.linear(rounded_TI, weight._numbers(0, len(weight.codes)))[:, : weight.shape[0]]
    return y_TO if bias_O is None else y_TO + bias_O.float()


def stored_codes(kind: Kind, whole: Tensor) -> Tensor:
    """Whole numbers (blocks, 16, groups, 32) as bytes (blocks, groups, bits, 64)."""
    offset = 1 << (kind.bits - 1)
    fours: Tensor = (whole + offset).to(torch.uint8).unflatten(3, (FOURS, 4)).permute(0, 2, 3, 1, 4).flatten(3)
    if kind.bits == 8:
        return fours
    stored: Tensor = fours[:, :, : FOURS // 2] | fours[:, :, FOURS // 2 :] << 4
    return stored


def codes_of(kind: Kind, codes: Tensor) -> Tensor:
    """What `stored_codes` was given, as int8."""
    fours = codes if kind.bits == 8 else torch.cat((codes & 15, codes >> 4), dim=2)
    offset = 1 << (kind.bits - 1)
    whole: Tensor = (fours.short() - offset).to(torch.int8).unflatten(3, (LANES, 4)).permute(0, 3, 1, 2, 4).flatten(3)
    return whole


def _in_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers of (blocks, 16, groups, 32) and the scales of the outputs."""
    scale = values.abs().amax((2, 3), keepdim=True) / 127
    return (values / scale.clamp(min=SMALLEST)).round(), scale


def _in_groups(values: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers of (blocks, 16, groups, 32) and the scales of the groups.

    With the largest weight as their unit, w.q / q.q is the scale that fits some whole numbers q best, and leaves
    w.w - (w.q)^2 / q.q.
    """
    most = values.gather(3, values.abs().argmax(3, keepdim=True))
    units = values * torch.where(most.abs() < SMALLEST, 0.0, 1 / most)
    best = torch.full_like(most, -1.0)
    whole, scale = torch.zeros_like(values), torch.zeros_like(most)
    for code in TRIED:
        tried = (units * code).round_().clamp_(-8, 7)
        dot, square = (units * tried).sum(3, keepdim=True), tried.square().sum(3, keepdim=True).clamp_(min=1)
        better = dot * dot / square > best
        best = torch.where(better, dot * dot / square, best)
        whole, scale = torch.where(better, tried, whole), torch.where(better, dot / square, scale)
    return whole, (scale * most).bfloat16().float()
