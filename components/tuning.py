"""Which product of one bfloat16 row with a large matrix is fastest on this CPU: measured, once per process.

Measured in GB/s of weights read, of 25 to 30 that the memory gives on both machines:

                                 F.linear   two rows   torch.mv   packed
    2 cores with AVX512-BF16     14 - 17    15 - 19    7 - 10     23 - 28
    2 cores with AMX             12         14         18         not measured

so that no rule about processors would hold. All round alike, but for single last bits. What these two machines
suggest comes first and is only left for what is clearly faster, so that a machine keeps its choice from run to run
even when it is busy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

RowProduct = Callable[[Tensor, Tensor, Tensor | None], Tensor]

LARGE = 1 << 19
"""Elements of a matrix from which reading it outweighs the ten microseconds that a packed product costs to call."""

FULL_ROWS = 6
"""Rows of one pass of oneDNN's kernel over a packed matrix: six read it at 25 GB/s, one at 19, twelve at 20."""

GAIN = 1.4
"""How much faster a way must be to replace one that was expected to be faster: more than a busy machine's noise."""

SHAPE = (4096, 6144)
"""Of the matrix to measure with: 50 MB do not fit the caches of a desktop."""

ROUNDS = 10
"""Ways take turns, so that a busy moment of the machine hits all of them."""


def packed(weight_OI: Tensor) -> Tensor:
    """A copy in oneDNN's layout: opaque, of the same shape, dtype and size."""
    result: Tensor = torch.ops.mkldnn._reorder_linear_weight.default(weight_OI, 1)
    return result


def packed_product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x W^T + b with a packed weight, for any number of rows; fewer than FULL_ROWS are filled up with zeros."""
    rows = x_TI.shape[0]
    if rows < FULL_ROWS:
        x_TI = F.pad(x_TI, (0, 0, 0, FULL_ROWS - rows))
    result: Tensor = torch.ops.mkldnn._linear_pointwise.default(x_TI, weight_OI, bias_O, "none", [], "")
    return result[:rows]


@cache
def row_product() -> RowProduct:
    """The fastest product of one row with a row-major bfloat16 matrix."""
    return _winner([way for way in _race() if way is not packed_product], _race())


def packing_pays() -> bool:
    """Whether this build has oneDNN's bfloat16 products, and one row with a packed matrix is fastest of all."""
    return _winner(list(_race()), _race()) is packed_product


def two_rows(x_1I: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """The row twice: oneDNN reads a weight faster for several rows than for one."""
    return F.linear(x_1I.expand(2, -1), weight_OI, bias_O)[:1]


def vector(x_1I: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """The matrix-vector product, which does not go through oneDNN."""
    y_O = torch.mv(weight_OI, x_1I[0]) if bias_O is None else torch.addmv(bias_O, weight_OI, x_1I[0])
    return y_O.unsqueeze(0)


@cache
def _race() -> dict[RowProduct, float]:
    """Seconds of every way that this build has, the one expected to be fastest first."""
    weight = torch.ones(SHAPE, dtype=torch.bfloat16)
    plain: dict[RowProduct, Tensor] = {F.linear: weight, two_rows: weight, vector: weight}
    ways = plain | {packed_product: packed(weight)} if _has_onednn() else plain
    amx = torch.cpu._is_amx_tile_supported()
    order = (vector, two_rows, F.linear, packed_product) if amx else (packed_product, two_rows, F.linear, vector)
    seconds = _times(ways)
    return {way: seconds[way] for way in order if way in seconds}


def _winner(order: list[RowProduct], seconds: dict[RowProduct, float]) -> RowProduct:
    """The first way that no later one beats by GAIN."""
    best = order[0]
    for other in order[1:]:
        if seconds[other] * GAIN < seconds[best]:
            best = other
    return best


def _has_onednn() -> bool:
    available: bool = torch.backends.mkldnn.is_available()
    return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _times(ways: dict[RowProduct, Tensor]) -> dict[RowProduct, float]:
    """The best time of each way with its matrix, the first round left out."""
    x_1I = torch.ones(1, SHAPE[1], dtype=torch.bfloat16)
    best = dict.fromkeys(ways, float("inf"))
    with torch.inference_mode():
        for count in range(ROUNDS):
            for way, weight in ways.items():
                start = time.perf_counter()
                way(x_1I, weight, None)
                if count:
                    best[way] = min(best[way], time.perf_counter() - start)
    return best
