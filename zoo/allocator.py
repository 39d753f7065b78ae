"""What the C library's allocator does with memory that was given back.

By default glibc maps large pieces of memory anew each time and unmaps them when they are freed, so that every step of
a model on a CPU pays the system for each of their pages again. Told to keep them, it hands them out as they are.
"""

import ctypes
import os

from zoo.components.linux import system

_TRIM, _MAP = -1, -3
"""glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD."""

KEPT = 1 << 30
"""Bytes up to which a piece is kept when it is freed, and free memory at the heap's end."""

LARGE = 1 << 20
"""Bytes from which on a piece that is freed goes back where freed memory is not kept."""

OWN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
"""Variables by which a user has decided on this."""


def keep_freed_memory() -> None:
    """Pieces that are freed are used again. For the whole process; nothing where the user's variables say otherwise
    or the C library is not glibc."""
    library = _library()
    if library is not None and not any(name in os.environ for name in OWN):
        library.mallopt(_MAP, KEPT)
        library.mallopt(_TRIM, KEPT)


def return_freed_memory() -> None:
    """Large pieces go back to the system as soon as they are freed, until `keep_freed_memory`: what threads that end
    have freed nobody uses again."""
    library = _library()
    if library is not None and not any(name in os.environ for name in OWN):
        library.mallopt(_MAP, LARGE)


def give_back_memory() -> None:
    """What is free goes back to the system now."""
    library = _library()
    if library is not None:
        library.malloc_trim(0)


def _library() -> ctypes.CDLL | None:
    library = system()
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
