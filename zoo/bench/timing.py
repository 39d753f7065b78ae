"""Seconds of what runs on a device."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of `work`, the GPU's queue drained on both sides."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def fastest(work: Callable[[], Any], repeats: int) -> float:
    """The least of several times, after one that does not count."""
    work()
    return min(seconds(work) for _ in range(repeats))


def typical(work: Callable[[], Any], repeats: int) -> float:
    """The median of several times, after one that does not count."""
    work()
    return median(seconds(work) for _ in range(repeats))
