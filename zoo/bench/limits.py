"""What a device can do at most: bytes read, numbers multiplied, operations called, each measured without zoo's engine.

Streams are places of memory that a core reads from at the same time. A memory controller may need many of them to
reach its rate, so reading is tried with one for each core, with many, and with how matrices are read; the fastest is
the limit, and all are told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.bench.timing import fastest, seconds, typical
from zoo.components import native
from zoo.components.native.panels import Panels, pays
from zoo.costs.profile import Limits

STREAMS = 32
"""Rows that are added up at once: each core reads from so many places."""

READ_BYTES = 1 << 30
"""No processor's caches hold it."""

PRODUCT = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of a product that is limited by multiplying."""

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def machine_limits(
    device: torch.device, total_bytes: int = READ_BYTES, size: int | None = None, repeats: int = 5
) -> Limits:
    """Everything that a profile says of a device itself."""
    read = copy_rates(device, repeats) if device.type == "cuda" else read_rates(total_bytes, repeats)
    return Limits(read=read, multiply=multiply_rates(device, size, repeats), call_s=call_seconds(device))


def read_bandwidth(total_bytes: int = READ_BYTES, repeats: int = 5) -> float:
    """The most bytes per second that are read from main memory, all cores, the best of several ways."""
    return max(read_rates(total_bytes, repeats).values())


def read_rates(total_bytes: int = READ_BYTES, repeats: int = 5) -> dict[str, float]:
    """Bytes per second from main memory by several ways, each the best of its repeats. The ways take turns."""
    data = torch.ones(total_bytes // 4)
    best = dict.fromkeys(ways := read_ways(data), float("inf"))
    for _ in range(repeats + 1):
        for name, read in ways.items():
            best[name] = min(best[name], seconds(read))
    return {name: data.nbytes / time for name, time in best.items()}


def read_ways(data: Tensor) -> Mapping[str, Callable[[], Any]]:
    """Ways to read all of `data`, float32, by name."""
    matrix, rows = data.view(-1, 4096), data.view(STREAMS, -1)
    vector = torch.ones(4096)
    ways: dict[str, Callable[[], Any]] = {}
    if native.missing() is None:
        read, threads = native.library().handle.zoo_read, torch.get_num_threads()
        ways["in C, eight streams for each core"] = lambda: read(data.data_ptr(), data.nbytes, threads)
    return ways | {
        "sum, one stream for each core": data.sum,
        f"sum of {STREAMS} rows, {STREAMS} streams for each core": lambda: rows.sum(0),
        f"largest of {STREAMS // 2} rows, {STREAMS // 2} streams for each core": lambda: data.view(
            STREAMS // 2, -1
        ).amax(0),
        "dot product, two streams for each core": lambda: data.view(2, -1)[0].dot(data.view(2, -1)[1]),
        "matrix times vector": lambda: matrix.mv(vector),
    }


def reading(limits: Limits, total_bytes: int = READ_BYTES) -> Callable[[], float]:
    """What tells at how many bytes per second main memory is read now, by the way that was the fastest."""
    data = torch.ones(total_bytes // 4)
    work = read_ways(data)[limits.read_way]
    return lambda: data.nbytes / typical(work, 5)


def copy_rates(device: torch.device, repeats: int = 5) -> dict[str, float]:
    """Bytes per second that a GPU copies within its memory, read and written together."""
    source = torch.empty(1 << 32, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {"copy": 2 * source.nbytes / fastest(lambda: target.copy_(source), repeats)}


def multiply_rates(device: torch.device, size: int | None = None, repeats: int = 5) -> dict[str, float]:
    """Multiply-adds per second of a large product, by number format."""
    size = size or PRODUCT[device.type]
    rates = {}
    for name, dtype in DTYPES.items():
        ways = multiply_ways(*(torch.randn(size, size, device=device).to(dtype) for _ in range(2)))
        rates[name] = size**3 / min(fastest(way, repeats) for way in ways)
    return rates


def multiply_ways(a_NN: Tensor, b_NN: Tensor) -> list[Callable[[], Any]]:
    """Ways to multiply two large matrices: PyTorch's, and zoo's own where it has one for them."""
    ways: list[Callable[[], Any]] = [lambda: a_NN @ b_NN]
    if pays(b_NN):
        matrix = Panels.of(b_NN)
        ways.append(lambda: matrix.product(a_NN, None))
    return ways


def call_seconds(device: torch.device, count: int = 1000) -> float:
    """Seconds of the smallest operation, called from Python."""
    one = torch.ones(1, device=device)

    def work() -> None:
        with torch.inference_mode():
            for _ in range(count):
                one.add(one)

    return fastest(work, 5) / count
