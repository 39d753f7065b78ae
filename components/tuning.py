"""Which product of one bfloat16 row with a large matrix is fastest on this CPU: measured, once per process.

Measured in GB/s of weights read, of 25 that the memory gives on both machines:

                                 F.linear   two rows   torch.mv   packed
    2 cores with AVX512-BF16     12 - 15    16 - 18    7 - 9      21 - 29
    2 cores with AMX             12         14         18         not measured

so that no rule about processors would hold. All of them round alike, but for single last bits; the likeliest comes
first and is only left for one that is clearly faster, so that a machine keeps its choice from run to run.
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

GAIN = 1.25
"""How much faster a way must be to replace one before it: more than the noise of the measurement."""

SHAPE = (4096, 6144)
"""Of the matrix to measure with: 50 MB do not fit the caches of a desktop."""

ROUNDS = 6
"""Ways take turns, so that a busy moment of the machine hits all of them."""


def packed(weight_OI: Tensor) -> Tensor:
    """A copy in oneDNN's layout: opaque, of the same shape, dtype and size."""
    result: Tensor = torch.ops.mkldnn._reorder_linear_weight.default(weight_OI, 1)
    return result


def packed_product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x W^T + b with a packed weight, for any number of rows."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise.default(x_TI, weight_OI, bias_O, "none", [], "")
    return result


def row_product() -> RowProduct:
    """The fastest product of one row with a row-major bfloat16 matrix."""
    return _race()[0]


def packing_pays() -> bool:
    """Whether this build has oneDNN's bfloat16 products, and they beat every other on one row."""
    return _race()[1]


def two_rows(x_1I: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """The row twice: oneDNN reads a weight faster for several rows than for one."""
    return F.linear(x_1I.expand(2, -1), weight_OI, bias_O)[:1]


def vector(x_1I: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """The matrix-vector product, which does not go through oneDNN."""
    y_O = torch.mv(weight_OI, x_1I[0]) if bias_O is None else torch.addmv(bias_O, weight_OI, x_1I[0])
    return y_O.unsqueeze(0)


@cache
def _race() -> tuple[RowProduct, bool]:
    """The winner among the products of a plain matrix, and whether a packed one is faster still."""
    weight = torch.ones(SHAPE, dtype=torch.bfloat16)
    runners: list[tuple[RowProduct, Tensor]] = [(way, weight) for way in (two_rows, F.linear, vector)]
    if _has_onednn():
        runners.append((packed_product, packed(weight)))
    seconds = _times(runners)
    best = 0
    for other in (1, 2):
        if seconds[other] * GAIN < seconds[best]:
            best = other
    return runners[best][0], len(runners) > 3 and seconds[3] * GAIN < seconds[best]


def _has_onednn() -> bool:
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _times(runners: list[tuple[RowProduct, Tensor]]) -> list[float]:
    """The best time of each way, the first round left out."""
    x_1I = torch.ones(1, SHAPE[1], dtype=torch.bfloat16)
    rounds: list[list[float]] = []
    with torch.inference_mode():
        for _ in range(ROUNDS):
            rounds.append([])
            for way, weight in runners:
                start = time.perf_counter()
                way(x_1I, weight, None)
                rounds[-1].append(time.perf_counter() - start)
    return [min(times) for times in zip(*rounds[1:], strict=True)]
