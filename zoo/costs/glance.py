"""A first idea of a model's speed on a CPU that was not measured yet: decoding waits for memory, which is read here."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from typing import Any

from zoo.costs import reading
from zoo.costs.profile import kernels_file
from zoo.costs.work import Step, Work
from zoo.machine import cores, processor

SHARE = 0.8
"""Of the rate at which memory is read: what decoding of one sequence was measured to reach (docs/benchmarks.md)."""

SECONDS = 5.0
"""After which a glance is given up."""


def glance(work: Work, context: int) -> dict[str, Any] | None:
    """One sequence's decode steps after `context` tokens; None where that cannot be told in a fraction of a second:
    without the native kernels, or in a format that they do not read."""
    if work.dtype != "bfloat16":
        return None
    rate = read_rate()
    if rate is None:
        return None
    return {
        "device": processor(),
        "batch": 1,
        "context": context,
        "tokens_per_second": SHARE * rate / work.read_bytes(Step.decode(1, context)),
        "read_bytes_per_second": rate,
        "share": SHARE,
    }


@cache
def read_rate() -> float | None:
    """Bytes per second that all cores read from main memory together; None where that cannot be measured at once."""
    kernels = kernels_file()
    if kernels is None:
        return None
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    threads = threads if threads.isdigit() and int(threads) else str(cores())
    command = [sys.executable, "-I", "-S", reading.__file__, str(kernels), threads]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True).stdout
        return float(told)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
