"""Ctrl-C where it does no harm: what is half noted down of memory and requests would be lost or be another's later."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], object] | int | None


class _Hold:
    """A block of the main thread that Ctrl-C waits for. twice: a second one does not. open: whether none waits now."""

    def __init__(self, *, twice: bool) -> None:
        self.twice, self.open, self.seen = twice, True, False
        self._before: Handler = None

    def begin(self) -> None:
        """From now on it waits."""
        self._before, self.open = signal.signal(signal.SIGINT, self._note), False

    def end(self) -> None:
        """From now on it is obeyed."""
        signal.signal(signal.SIGINT, self._before)
        self.open = True

    def obey(self) -> None:
        """Obeys the one that has come meanwhile."""
        if self.seen:
            self.seen = False
            signal.raise_signal(signal.SIGINT)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.seen and self.twice:
            raise KeyboardInterrupt
        self.seen = True


_holds: list[_Hold] = []
"""Those that the main thread is in, the innermost last."""


def _possible() -> bool:
    """Other threads are never interrupted; a handler that is not Python's could not be put back."""
    return threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not None


@contextmanager
def uninterrupted(*, twice: bool = False) -> Iterator[None]:
    """Ctrl-C waits for the end of the block. twice: a second one does not."""
    if not _possible():
        yield
        return
    hold = _Hold(twice=twice)
    hold.begin()
    _holds.append(hold)
    try:
        yield
    finally:
        _holds.pop()
        hold.end()
    hold.obey()


@contextmanager
def interruptible() -> Iterator[None]:
    """Within a block that Ctrl-C waits for, one in which it does not: what it interrupts can be done again. It stays
    so within a block that only a second one may interrupt."""
    hold = _holds[-1] if _holds and _possible() else None
    if hold is None or hold.twice or hold.open:
        yield
        return
    hold.end()
    try:
        hold.obey()
        yield
    finally:
        hold.begin()
