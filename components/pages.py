"""Memory for weights, on Linux in huge pages: it is taken from the system and read faster so.

torch asks for them too where THP_MEM_ALLOC_ENABLE was set before its first allocation, which a program that uses torch
before zoo may have made already.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

HUGE = 2 << 20
"""Bytes from which on memory may hold a huge page."""


def fresh(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A tensor to be filled. Raises what `torch.empty` raises."""
    made = torch.empty(shape, dtype=dtype, device=device)
    library = system()
    if made.is_cpu and made.nbytes >= HUGE and library is not None:
        first = made.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        library.madvise(first, made.data_ptr() + made.nbytes - first, mmap.MADV_HUGEPAGE)
    return made


@cache
def system() -> ctypes.CDLL | None:
    """Linux's C library, whose calls let other threads of Python run meanwhile. None elsewhere."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    return library
