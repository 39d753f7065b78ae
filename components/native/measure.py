"""What this machine's memory gives, and how much of it products reach with the native kernels and without."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from zoo.components import native

SHAPE = (8192, 4096)
"""Of the matrix that rates are measured with: 64 MB do not fit the caches of a desktop."""


def read_limit(seconds: float = 0.5, size: int = 1 << 30) -> float | None:
    """The most bytes per second that all threads read from memory, by eight streams each; None without the kernels.

    Reads `size` bytes, which should not fit any cache, as often as `seconds` allow, and takes the best.
    """
    if native.missing():
        return None
    data, read = torch.ones(size, dtype=torch.uint8), native.library().handle.zoo_read
    return size / _best(lambda: read(data.data_ptr(), size, torch.get_num_threads()), seconds)


@torch.inference_mode()
def product_rates(seconds: float = 0.1) -> dict[str, float]:
    """Bytes of weights per second of one bfloat16 row's product: by "torch", and by "native" kernels if there are."""
    weight_OI = torch.ones(SHAPE, dtype=torch.bfloat16)
    x_1I = torch.ones(1, SHAPE[1], dtype=torch.bfloat16)
    ways: dict[str, Callable[[], object]] = {"torch": lambda: F.linear(x_1I, weight_OI)}
    if not native.missing():
        ways["native"] = lambda: native.product(x_1I, weight_OI)
    return {name: weight_OI.nbytes / _best(way, seconds) for name, way in ways.items()}


def plain_read_rate(seconds: float = 0.1, size: int = 1 << 28) -> float:
    """Bytes per second that a sum by PyTorch reads: a limit for machines without the kernels, and a lower one."""
    data = torch.ones(size // 4)
    return size / _best(data.sum, seconds)


def _best(work: Callable[[], object], seconds: float) -> float:
    """The shortest time of `work`, run as often as `seconds` allow, and at least once after a first time."""
    work()
    best, end = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end or best == float("inf"):
        work()
        best = min(best, time.perf_counter() - start)
    return best
