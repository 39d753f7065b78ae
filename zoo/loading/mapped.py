"""Parts of a file read where the system has them, mapped, in large pages, without a copy.

By default Linux takes what it reads from disks into pages of 4 KiB each, which costs it more time than fast disks take.
Of a part that is mapped to be in huge pages it reads some MiB at a time, each into one page where the file system can.
"""

from __future__ import annotations

import ctypes
import mmap
from io import FileIO

import numpy as np
import torch

from zoo.components.pages import system

LEAST = 1 << 20
"""Bytes from which on a part is read so: for fewer, several times as many would come from the disk."""

_POPULATE_READ = 22
"""Linux's MADV_POPULATE_READ: the pages are there when it returns, or it fails."""


class Mapped:
    """One file. Maps nothing where the system has no huge pages for files."""

    def __init__(self, file: FileIO) -> None:
        self._memory: mmap.mmap | None = None
        self._address, self._held = 0, (0, 0)
        if system() is None:
            return
        try:
            self._memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        except (OSError, ValueError):  # a file system that maps nothing, an empty file, a kernel without huge pages
            self.close()
            return
        self._address = int(np.frombuffer(self._memory, np.uint8).ctypes.data)

    def close(self) -> None:
        """Unmaps the file: what was read is gone."""
        if self._memory is not None:
            self._memory.close()
        self._memory = None

    def read(self, offset: int, size: int) -> torch.Tensor | None:
        """Those bytes, not to be written to, once they have come from the disk; good until `let_go`.

        None where they are better read otherwise: few, those that the system has already, and those that it fails at.
        """
        library = system()
        if self._memory is None or library is None or size < LEAST or offset + size > len(self._memory):
            return None
        self.let_go()
        first = self._address + offset // mmap.PAGESIZE * mmap.PAGESIZE
        length = self._address + offset + size - first
        there = np.empty(-(-length // mmap.PAGESIZE), np.uint8)
        if library.mincore(first, length, there.ctypes.data) or (there & 1).all():
            return None
        self._held = first, length
        if library.madvise(first, length, _POPULATE_READ):
            return None
        return torch.frombuffer((ctypes.c_char * size).from_address(self._address + offset), dtype=torch.uint8)

    def let_go(self) -> None:
        """What was read last no longer counts as memory of this process."""
        library = system()
        if self._memory is not None and library is not None and self._held[1]:
            library.madvise(*self._held, mmap.MADV_DONTNEED)
        self._held = 0, 0
