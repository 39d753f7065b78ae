"""One model over two ranks of one thread each: how fast it is, and what each of them takes while it loads."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

from tests.benchmarks.sides import Cut, Side, Threads, turns
from zoo import load

if TYPE_CHECKING:
    from tests.benchmarks.cases import Bench

ALONE = {"1 process, 2 threads": 2, "1 process, 1 thread": 1}
CUTS = {
    "one group, not cut": (1, 1),
    "each step cut in 2": (2, 1),
    "each step cut in 4": (4, 1),
    "two groups by turns": (1, 2),
}
"""Pieces of a step, and groups."""

TEXT = "How many experts does Mixtral 8x7B have? Mixtral 8x7B has 8 experts. A card says what a model is."
LAYOUTS, KINDS = {"1": 1, "tp=2": 2, "pp=2": 2}, ("none", "int8", "int4")


def layouts(bench: Bench) -> dict[str, Any]:
    """Tokens per second of one process with one thread and with two, and of two ranks."""
    sides: list[Side] = [_threads(bench, name, threads) for name, threads in ALONE.items()]
    sides += [_threads(bench, f"{kind}=2", 1, devices=f"{kind}=2") for kind in ("tp", "pp")]
    return _speeds(bench, sides)


def pieces(bench: Bench) -> dict[str, Any]:
    """Tokens per second of two stages, by how steps are cut and follow each other."""
    bench = replace(bench, batches=bench.batches or (8, 16, 32, 64))
    stages = _threads(bench, "as zoo does it", 1, devices="pp=2")
    return _speeds(bench, [stages, *(Cut(stages, name, *counts) for name, counts in CUTS.items())])


def apart() -> dict[str, Any]:
    """How far the embedded model's logits in eight and four bits are off those of the plain weights, and of each other:
    in one process, and with every layer shared out among two."""
    found: dict[str, Any] = {}
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_batch_size": 1}
    logits = {}
    for kind in KINDS:
        for layout in ("1", "tp=2"):
            with load("tiny", quantize=kind, devices=layout, **options) as model:
                logits[kind, layout] = model.logits(model.encode(TEXT))
    for kind in KINDS[1:]:
        one, two, plain = logits[kind, "1"], logits[kind, "tp=2"], logits["none", "1"]
        pairs = {"one process": (one, plain), "tp=2": (two, plain), "each other": (two, one)}
        found[kind] = {name: float((a - b).norm() / b.norm()) for name, (a, b) in pairs.items()}
    return {"tokens": len(one), "relative_errors": found}


def _threads(bench: Bench, name: str, threads: int, **options: Any) -> Threads:
    return Threads(bench.folder, name, threads, max_batch_size=max(_batches(bench)), **options)


def _batches(bench: Bench) -> Sequence[int]:
    return bench.batches or (16, 64)


def _speeds(bench: Bench, sides: Sequence[Side]) -> dict[str, Any]:
    """Of sequences that decode together, and of one prompt."""
    length, decoded = bench.prompt or 1024, dict[str, Any]()
    try:
        for batch in _batches(bench):
            times = turns(sides, bench.prompts(batch, 16), bench.steps, bench.rounds)
            decoded[str(batch)] = {
                name: batch / median(s for run in runs for s in run.steps) for name, runs in times.items()
            }
        times = turns(sides, bench.prompts(1, length), 0, bench.rounds)
    finally:
        for side in reversed(sides):
            side.close()
    prompts = {name: length / median(run.prefill for run in runs) for name, runs in times.items()}
    return {"prompt": length, "decode_tokens_per_second": decoded, "prefill_tokens_per_second": prompts}


def shares(bench: Bench) -> dict[str, Any]:
    """Bytes of each process, by layout and kind of weights; each is loaded in a fresh process of its own."""
    found = [
        {"layout": layout, "quantize": kind, "rank": rank} | _loaded(bench, layout, kind, rank)
        for layout, count in LAYOUTS.items()
        for kind in KINDS
        for rank in range(count)
    ]
    return {"ranks": found}


def _loaded(bench: Bench, layout: str, kind: str, rank: int) -> dict[str, int]:
    command = [sys.executable, "-c", _LOAD, str(bench.folder), layout, kind, str(rank)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found


_LOAD = """
import json, sys
import torch, zoo.model, zoo.engine.engine, zoo.loading.load
from zoo.components.matrix import weight_bytes
from zoo.device import choose
from zoo.devices.run import spread
from zoo.devices.shares import Part
from zoo.loading.fill import filled
from zoo.locating import locate
from zoo.registry.resolve import resolve

def peak():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))

folder, layout, kind, rank = sys.argv[1:]
kind = None if kind == "none" else kind
plan, placement, part = resolve(locate(folder).card), choose("cpu", "auto", "bfloat16"), None
if layout != "1":
    torch.set_num_threads(1)
    mesh = spread(plan, layout).laid(plan, placement, kind, plan.model.context_length).mesh
    part = Part.of(plan, mesh, int(rank))
read, before = [0], peak()
module, *_ = filled(plan, placement, folder, quantize=kind, progress=lambda done, total: read.append(done), part=part)
print(json.dumps({"reads": max(read), "holds": weight_bytes(module), "grows": peak() - before}))
"""
