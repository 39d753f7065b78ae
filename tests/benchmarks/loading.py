"""Loading a checkpoint from disk and from the system's cache: each load is a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.benchmarks.cases import Bench

FORMATS = {
    "bfloat16": {},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
    "float16": {"dtype": "float16"},
    "float32": {"dtype": "float32"},
}
"""zoo's rows and their options of `zoo.load`."""

TAKEN = 6 << 30
"""Bytes taken and given back before each load: a virtual machine may have to fetch memory that it has not used for a
while from its host, more slowly than disks are read, and that is no part of loading."""


def loads(bench: Bench) -> dict[str, Any]:
    """Seconds of the load, and with one token after it, from disk ("cold") and from the system's cache; memory at most.

    The least of the rounds. "cat" is a copy of the file to nothing.
    """
    file, found = bench.folder / "model.safetensors", dict[str, dict[str, Any]]()
    for name in ("cat", *FORMATS, *(peer for peer in bench.peers if peer == "transformers")):
        row: dict[str, Any] = {}
        for place in ("cold", "warm"):
            runs = [_run(name, file, place) for _ in range(bench.rounds)]
            row |= {f"{place}_{what}": min(run[what] for run in runs) for what in runs[0]}
        found[name] = row
    return {"file_bytes": file.stat().st_size, "sides": found}


def _run(name: str, file: Path, place: str) -> dict[str, float]:
    subprocess.run([sys.executable, "-c", f"import torch; torch.ones({TAKEN}, dtype=torch.uint8)"], check=True)
    if place == "cold":
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    else:
        subprocess.run(["cat", file], stdout=subprocess.DEVNULL, check=True)
    if name == "cat":
        start = time.perf_counter()
        subprocess.run(["cat", file], stdout=subprocess.DEVNULL, check=True)
        return {"seconds": time.perf_counter() - start}
    code = _TRANSFORMERS if name == "transformers" else _ZOO.format(options=FORMATS[name])
    done = subprocess.run([sys.executable, "-c", _PEAK + code, file.parent], capture_output=True, text=True, check=True)
    loaded, token, peak, weights = (float(word) for word in done.stdout.split()[-4:])
    return {"seconds": loaded, "first_token_seconds": token, "peak_over_weights": peak / weights}


_PEAK = """
import sys, time, torch
def peak():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
"""

_ZOO = """
import zoo, zoo.model, zoo.engine.engine, zoo.loading.load
before, start = peak(), time.perf_counter()
model = zoo.load(sys.argv[1], device="cpu", **{options})
loaded = time.perf_counter() - start
model.generate([[5]], max_tokens=1)
print(loaded, time.perf_counter() - start, peak() - before, model.memory.weights)
"""

_TRANSFORMERS = """
import transformers
from transformers.models.mistral import modeling_mistral
before, start = peak(), time.perf_counter()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
loaded = time.perf_counter() - start
with torch.inference_mode():
    model(torch.tensor([[5]]))
print(loaded, time.perf_counter() - start, peak() - before, sum(p.nbytes for p in model.parameters()))
"""
