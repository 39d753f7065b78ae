"""What the project asks of Linux about memory, through the C library. Imports no torch."""

from __future__ import annotations

import ctypes
import sys
from functools import cache


@cache
def system() -> ctypes.CDLL | None:
    """Linux's C library, whose calls let other threads of Python run meanwhile. None elsewhere."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    library.mmap.restype = ctypes.c_void_p
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return library
