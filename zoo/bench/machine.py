"""Measuring this machine, once, for the figures that `zoo inspect` gives before anything is loaded."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime

import torch

from zoo.bench.limits import machine_limits
from zoo.costs.profile import Key, Profile


def profile(device: torch.device, progress: Callable[[str], None]) -> Profile:
    """Measures the device. `progress` is told what comes next."""
    start = time.perf_counter()
    progress("reading, multiplying, calling")
    return Profile(
        key=Key.here(torch.cuda.get_device_name(device) if device.type == "cuda" else None),
        measured=datetime.now(UTC).isoformat(timespec="seconds"),
        limits=machine_limits(device),
        seconds=time.perf_counter() - start,
    )
