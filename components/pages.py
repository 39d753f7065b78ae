"""Memory for weights, on Linux in huge pages: it is taken from the system and read faster so.

torch asks for them too where THP_MEM_ALLOC_ENABLE was set before its first allocation, which a program that uses torch
before zoo may have made already.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.components.linux import system

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
