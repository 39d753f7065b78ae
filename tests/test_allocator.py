"""Memory that is freed is used again, and given back when a model is closed."""

import os
import subprocess
import sys

import pytest

PAGES = """
import resource, torch
from zoo.allocator import keep_freed_memory
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    for _ in range(10):
        torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
KEEP
work()
before = faults()
work()
print(faults() - before)
"""


BACK = """
import torch
from zoo.allocator import give_back_memory, keep_freed_memory
from zoo.machine import resident_memory
keep_freed_memory()
pieces = [torch.empty(8 << 20, dtype=torch.uint8).fill_(1) for _ in range(16)]
del pieces
before = resident_memory()
give_back_memory()
print(before - resident_memory())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_used_again() -> None:
    kept, fresh, own = (
        _faults("keep_freed_memory()", {}),
        _faults("", {}),
        _faults("keep_freed_memory()", {"MALLOC_MMAP_THRESHOLD_": "131072"}),
    )
    assert kept < 0.15 * min(fresh, own), "one piece of ten may lie anew: something small has taken part of a freed one"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_what_was_kept_goes_back() -> None:
    """Of sixteen pieces of 8 MiB that were freed, nearly all."""
    assert _printed(BACK, {}) > 100 << 20


def _faults(keep: str, variables: dict[str, str]) -> int:
    """Page faults of ten uses of 64 MiB each."""
    return _printed(PAGES.replace("KEEP", keep), variables)


def _printed(code: str, variables: dict[str, str]) -> int:
    """The number that a process prints which has no variables about memory but these."""
    unset = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "THP_"))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=unset | variables)
    return int(done.stdout)
