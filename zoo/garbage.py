"""Blocks in which Python looks for no garbage: of the many objects that importing and loading make, none is garbage."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections(*, freeze: bool = False) -> Iterator[None]:
    """No collection runs in the block.

    freeze: nor does any later one look at the objects that are there at its end, for programs that keep them until they
    end: those of libraries are so many that one collection takes half as long as importing them.
    """
    wanted = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if freeze:
            gc.freeze()
        if wanted:
            gc.enable()
