"""zoo's kernels one by one on a GPU, beside PyTorch's: bytes per second of caches and of weights.

Each is run over so many places of memory that no cache of the device holds them, all runs recorded as one CUDA graph,
so that what the host does between them does not count. Without a GPU the formulas run in the kernels' place: what is
measured then says nothing, but that it can be measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from zoo.components import few, fused, quantised_gpu
from zoo.components.attention import paged
from zoo.components.attention.kernels import attention_rows
from zoo.components.kinds import KINDS
from zoo.components.quantised import Quantised

Call = Callable[[], Any]
PAGE = 16
SPLITS = (64, 128, 256)
"""Lengths of a split of a sequence's keys that are tried; zoo.components.attention.paged says which one is used."""


def seconds_of(calls: Sequence[Call], device: torch.device, repeats: int = 5) -> float:
    """Seconds of one of the calls, which all do the same to different memory: the best of some rounds."""
    if device.type != "cuda":
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return min(replayed(graph.replay) for _ in range(repeats)) / len(calls)


def replayed(run: Call, times: int = 1) -> float:
    """Seconds that the device takes for some runs, one after the other."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(times):
        run()
    stop.record()
    torch.cuda.synchronize()
    milliseconds: float = start.elapsed_time(stop)
    return milliseconds / 1e3 / times


def attention(device: torch.device, dtype: torch.dtype, cases: Sequence[tuple[int, int]], room: int) -> dict[str, Any]:
    """Single rows of B sequences over C tokens each, 32 heads of 128 over 8 key heads: bytes of cache per second.

    room: bytes of cache that are gone through.
    """
    found: dict[str, Any] = {}
    heads, groups, width = 32, 8, 128
    for batch, context in cases:
        pages, one = -(-context // PAGE), 2 * PAGE * groups * width * dtype.itemsize
        copies = max(1, min(64, room // (batch * pages * one)))
        pool = torch.randn(1 + copies * batch * pages, 2, PAGE, groups, width, device=device, dtype=dtype)
        tables = 1 + torch.randperm(copies * batch * pages, device=device).view(copies, batch, pages)
        filled_B = torch.full((batch,), context, dtype=torch.int64, device=device)
        q_BHd = torch.randn(batch, heads, width, device=device, dtype=dtype)
        calls = {}
        for split in SPLITS if fused.runs(q_BHd, "attention") else ():
            calls[str(split)] = [_over_pages(q_BHd, pool, table_BP, filled_B, split) for table_BP in tables]
        calls["gathered"] = [_gathered(q_BHd, pool, table_BP) for table_BP in tables[:2]]
        moved = batch * context * one / PAGE
        rates = {name: moved / seconds_of(runs, device) for name, runs in calls.items()}
        found[f"{batch}x{context}"] = {"bytes": moved, "bytes_per_second": rates, "used": str(paged.SPLIT)}
        del pool, tables, calls
    return found


def _over_pages(
    q_BHd: torch.Tensor, pool: torch.Tensor, table_BP: torch.Tensor, filled_B: torch.Tensor, split: int
) -> Call:
    def run() -> torch.Tensor:
        used, paged.SPLIT = paged.SPLIT, split
        try:
            return paged.attention_pages(q_BHd, pool, table_BP, filled_B, scale=0.1, window=None, softcap=None)
        finally:
            paged.SPLIT = used

    return run


def _gathered(q_BHd: torch.Tensor, pool: torch.Tensor, table_BP: torch.Tensor) -> Call:
    def run() -> torch.Tensor:
        k_BGSd, v_BGSd = (pool[:, plane][table_BP].flatten(1, 2).transpose(1, 2) for plane in range(2))
        seen_BS = torch.ones(k_BGSd.shape[0], k_BGSd.shape[2], dtype=torch.bool, device=pool.device)
        return attention_rows(q_BHd, k_BGSd, v_BGSd, scale=0.1, seen_BS=seen_BS, memo={})

    return run


def products(
    device: torch.device,
    dtype: torch.dtype,
    shapes: dict[str, tuple[int, int]],
    rows: Sequence[int],
    room: int,
) -> dict[str, Any]:
    """Microseconds of products with the matrices (O, I) of a layer, by PyTorch and by zoo's kernels, and the bytes of
    plain weights per second of the faster of both."""
    found: dict[str, Any] = {}
    for name, (outputs, inputs) in shapes.items():
        copies = max(1, min(64, room // (outputs * inputs * dtype.itemsize)))
        weights = torch.randn(copies, outputs, inputs, device=device, dtype=dtype)
        coded = {kind.name: Quantised.of(kind, weights[0]) for kind in KINDS.values()}
        for count in rows:
            x_TI = torch.randn(count, inputs, device=device, dtype=dtype)
            calls = {"torch": [_linear(x_TI, weight_OI) for weight_OI in weights]}
            if count <= few.MOST and fused.runs(x_TI, "rows"):
                calls["rows"] = [_few(x_TI, weight_OI, name == "gate_up") for weight_OI in weights]
            for kind_name, made in coded.items() if fused.runs(x_TI, "products") else ():
                calls[kind_name] = _coded(x_TI, made, copies)
            times = {way: seconds_of(runs, device) for way, runs in calls.items()}
            best = min(times[way] for way in ("torch", "rows") if way in times)
            rate = weights[0].nbytes / best
            microseconds = {way: round(1e6 * took, 2) for way, took in times.items()}
            found[f"{name} {count}"] = {"microseconds": microseconds, "bytes_per_second": rate}
            del calls
        del weights, coded
    return found


def _linear(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> Call:
    return lambda: F.linear(x_TI, weight_OI)


def _few(x_TI: torch.Tensor, weight_OI: torch.Tensor, gated: bool) -> Call:
    return lambda: few.product(x_TI, weight_OI, gated=gated)


def _coded(x_TI: torch.Tensor, made: Quantised, copies: int) -> list[Call]:
    """Over copies of the codes."""

    def call(codes: torch.Tensor, scales: torch.Tensor) -> Call:
        return lambda: quantised_gpu.product(made.kind, codes, scales, made.shape, x_TI, None)

    return [call(made.codes.clone(), made.scales.clone()) for _ in range(copies)]


def experts(
    device: torch.device, dtype: torch.dtype, rows: Sequence[int], sizes: tuple[int, int, int]
) -> dict[str, Any]:
    """Milliseconds of PyTorch's grouped product of `rows` tokens with two of E experts (O, I) each."""
    count, outputs, inputs = sizes
    weight_EIO = torch.randn(count, outputs, inputs, device=device, dtype=dtype).transpose(1, 2)
    found = {}
    for tokens in rows:
        x_NI = torch.randn(2 * tokens, inputs, device=device, dtype=dtype)
        ends_E = torch.linspace(0, 2 * tokens, count + 1, device=device)[1:].to(torch.int32)
        took = seconds_of([partial(F.grouped_mm, x_NI, weight_EIO, offs=ends_E)] * 3, device)
        found[str(tokens)] = 1e3 * took
    return found
