"""Asking the system for what will be read next, so that disks work while numbers are converted and copied.

The system reads what it is asked for into its cache by itself, in many pieces at a time; no memory of the process is
taken, and nothing changes where it cannot be asked.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

WINDOW = 64 << 20
"""Bytes that are asked for before they are read."""

STEP = 8 << 20
"""Bytes that are asked for, and read, at a time."""


class Span(NamedTuple):
    """Bytes of a file, from `start` to `stop`."""

    path: Path
    start: int
    stop: int


class ReadAhead:
    """Asks for spans in the order in which they will be read, WINDOW bytes ahead of the reader."""

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self._steps = _steps(spans) if hasattr(os, "posix_fadvise") else iter(())
        self._asked = self._read = 0
        self._path: Path | None = None
        self._file: int | None = None

    def __enter__(self) -> Self:
        self.has_read(0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def has_read(self, count: int) -> None:
        """So many bytes more have been read: asks for what follows."""
        self._read += count
        while self._asked < self._read + WINDOW:
            step = next(self._steps, None)
            if step is None:
                return
            self._asked += step.stop - step.start
            self._ask(step)

    def _ask(self, step: Span) -> None:
        """A fault is no matter here: the reader meets it too, and names it."""
        try:
            if self._path != step.path:
                self._close()
                self._file, self._path = os.open(step.path, os.O_RDONLY), step.path
            if self._file is not None:
                os.posix_fadvise(self._file, step.start, step.stop - step.start, os.POSIX_FADV_WILLNEED)
        except OSError:
            self._path = step.path

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = self._path = None


def _steps(spans: Iterable[Span]) -> Iterator[Span]:
    for path, first, last in spans:
        for start in range(first, last, STEP):
            yield Span(path, start, min(start + STEP, last))
