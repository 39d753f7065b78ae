"""Parts of a file where the system has them, mapped, in large pages, without a copy. Imports no torch.

By default Linux takes what it reads from disks into pages of 4 KiB each, which costs it more time than fast disks take.
Of a part that is mapped to be in huge pages it reads some MiB at a time, each into one page where the file system can.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from io import FileIO

from zoo.components.linux import system

LEAST = 1 << 20
"""Bytes from which on a part is mapped: for fewer, several times as many would come from the disk."""

_POPULATE_READ = 22
"""Linux's MADV_POPULATE_READ: the pages are there when it returns, or it fails."""

_FAILED = ctypes.c_void_p(-1).value
"""The address that mmap answers where it maps nothing: -1."""


class Mapped:
    """One file. Maps nothing where the system has no huge pages for files."""

    def __init__(self, file: FileIO) -> None:
        self._library, self._size = system(), os.fstat(file.fileno()).st_size
        self._address, self._held = 0, (0, 0)
        if self._library is None or not self._size:
            return
        found = self._library.mmap(None, self._size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        if found in (None, _FAILED):  # a file system that maps nothing
            return
        self._address = found
        if self._library.madvise(found, self._size, mmap.MADV_HUGEPAGE):  # a kernel without huge pages
            self.close()

    def close(self) -> None:
        """Unmaps the file: what was read is gone."""
        if self._library is not None and self._address:
            self._library.munmap(self._address, self._size)
        self._address, self._held = 0, (0, 0)

    def read(self, offset: int, size: int) -> int | None:
        """The address of those bytes, not to be written to, once they have come from the disk; good until `let_go`.

        None where they are better read otherwise: few, and those that the system fails at.
        """
        if self._library is None or not self._address or size < LEAST or offset + size > self._size:
            return None
        self.let_go()
        first = self._address + offset // mmap.PAGESIZE * mmap.PAGESIZE
        self._held = first, self._address + offset + size - first
        if self._library.madvise(*self._held, _POPULATE_READ):
            return None
        return self._address + offset

    def let_go(self) -> None:
        """What was read last no longer counts as memory of this process."""
        if self._library is not None and self._held[1]:
            self._library.madvise(*self._held, mmap.MADV_DONTNEED)
        self._held = 0, 0
