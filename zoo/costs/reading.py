"""How fast this machine reads memory, in a glance: a program of its own that needs nothing but the native kernels.

    python reading.py KERNELS THREADS          # bytes per second; nothing where the processor has not what they need

A process that ends leaves neither threads nor memory behind in the one that asks.
"""

import ctypes
import mmap
import sys
import time

BYTES = 1 << 27
"""Read in each turn: more than the caches of most processors hold, and taken from the system in a tenth of a second."""

TURNS = 5


def main() -> None:
    kernels, threads = ctypes.CDLL(sys.argv[1]), int(sys.argv[2])
    if not kernels.zoo_level():
        return
    memory = mmap.mmap(-1, BYTES)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ctypes.memset(address, 1, BYTES)
    kernels.zoo_read.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_int]
    best = float("inf")
    for _ in range(TURNS):
        start = time.perf_counter()
        kernels.zoo_read(address, BYTES, threads)
        best = min(best, time.perf_counter() - start)
    sys.stdout.write(f"{BYTES / best}\n")


if __name__ == "__main__":
    main()
