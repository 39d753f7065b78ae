"""Threads that wait for others leave the processor to them soon."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import zoo

WAITED = """
import os, statistics, time
import zoo, torch
torch.set_num_threads(2)
numbers = torch.ones(1 << 20)
taken = []
for _ in range(20):
    numbers.add_(1)  # by both threads, of which one then waits for more
    before = time.process_time()
    time.sleep(0.05)
    taken.append(time.process_time() - before)
print(statistics.median(taken), os.environ.get("GOMP_SPINCOUNT"))
"""


def waited(**settings: str) -> tuple[float, str]:
    """Processor seconds that a thread with nothing to do takes before it sleeps, and how often it may look."""
    rest = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", WAITED]
    done = subprocess.run(command, env=rest | settings, capture_output=True, text=True, check=True, timeout=60)
    seconds, spins = done.stdout.split()
    return float(seconds), spins


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch's threads are libgomp's on Linux")
def test_idle_threads_sleep_soon() -> None:
    """Twenty thousand looks take 0.5 to 1 milliseconds; libgomp's own 300,000 take milliseconds."""
    seconds, spins = waited()
    assert spins == zoo.SPINS
    assert seconds < 2e-3
    longer, _ = waited(GOMP_SPINCOUNT="300000")
    assert longer > 4 * seconds


@pytest.mark.parametrize("settings", [{"GOMP_SPINCOUNT": "70"}, {"OMP_WAIT_POLICY": "passive"}])
def test_what_the_user_has_set_stays(settings: dict[str, str]) -> None:
    assert waited(**settings)[1] == settings.get("GOMP_SPINCOUNT", "None")
