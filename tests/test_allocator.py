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


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    kept, fresh, own = (
        _faults("keep_freed_memory()", {}),
        _faults("", {}),
        _faults("keep_freed_memory()", {"MALLOC_MMAP_THRESHOLD_": "131072"}),
    )
    assert kept < 100 < min(fresh, own)


def _faults(keep: str, variables: dict[str, str]) -> int:
    """Page faults of ten uses of 64 MiB each."""
    command = [sys.executable, "-c", PAGES.replace("KEEP", keep)]
    unset = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=unset | variables)
    return int(done.stdout)
