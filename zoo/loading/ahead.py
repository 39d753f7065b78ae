"""Weights brought from the disk into the system's memory ahead of whoever loads them. Imports no torch.

While Python imports libraries for a second, disks have nothing to do. One thread that maps a file in large pages has
the fastest of them busy and takes next to no time of a processor. Loading does not depend on it: it reads itself what
is not there yet, and tells the faults.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from threading import Condition, Thread
from types import TracebackType
from typing import Self

from zoo.loading.files import local_path, locate
from zoo.loading.hub.cache import RepoCache
from zoo.loading.hub.listing import parse_source
from zoo.loading.mapped import Mapped
from zoo.loading.reader import Progress
from zoo.locating import Located
from zoo.machine import free_memory
from zoo.registry.errors import ZooError

PIECE = 8 << 20
"""Bytes that are brought at a time; who leaves waits for one such piece at most."""

LEAST = 64 << 20
"""Bytes to be ahead where little memory is free."""


class ReadAhead:
    """Reads the weights at a place, while it is open, in the order in which they are loaded.

    It is ahead by no more than half of the memory that stays free beside the weights, so that what it brings is still
    there when it is wanted. Where there is no place (None) and no weights that could be mapped it does nothing.
    """

    def __init__(self, place: Path | None, layout: str = "auto") -> None:
        self._place, self._layout = place, layout
        self._changed, self._passed, self._open = Condition(), 0, True
        self._thread = Thread(target=self._bring, name="zoo-reading-ahead", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._changed:
            self._open = False
            self._changed.notify()
        self._thread.join()

    def passed(self, progress: Progress | None) -> Progress:
        """What loading is to call with the bytes done and the bytes in all, which calls `progress`."""

        def told(done: int, total: int) -> None:
            with self._changed:
                self._passed = done
                self._changed.notify()
            if progress is not None:
                progress(done, total)

        return told

    def _bring(self) -> None:
        if self._place is None:
            return
        try:
            files, begun = locate(self._place, self._layout), 0
            room = max(LEAST, (free_memory() - files.nbytes) // 2)
            for file in (file for file in files.files if file.suffix == ".safetensors"):
                with file.open("rb", buffering=0) as opened, closing(Mapped(opened)) as mapped:
                    for first in range(0, size := file.stat().st_size, PIECE):
                        begun += (length := min(PIECE, size - first))
                        if not self._may(begun - room):
                            return
                        mapped.read(first, length)
                        mapped.let_go()
        except (ZooError, OSError):
            return  # who loads meets the same fault, and tells it

    def _may(self, least: int) -> bool:
        """Waits until so many bytes are loaded. Whether there is still somebody who loads."""
        with self._changed:
            self._changed.wait_for(lambda: self._passed >= least or not self._open)
            return self._open


def weights_at_hand(found: Located, weights: str | Path) -> Path | None:
    """Where the weights are that are going to be loaded, if that is known before anybody is asked; None otherwise."""
    if weights == "random":
        return None
    if weights != "auto":
        return local_path(weights)
    if found.folder is not None or found.card.source.hub is None:
        return found.folder
    try:
        repo, revision, _ = parse_source(found.card.source)
    except ZooError:
        return None
    cache = RepoCache(repo)
    commit = cache.commit(revision)
    return None if commit is None else cache.snapshot(commit)
