"""What ranks compute together: the few operations that modules and steps need, whatever carries them."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from types import TracebackType
from typing import Protocol

from torch import Tensor


class LostError(ConnectionError):
    """Another rank has gone, or has not come in time."""


class Waits:
    """How many seconds a rank has computed since its step began, and since when it waits for others: a block in which
    it does. None: it does not."""

    def __init__(self) -> None:
        self.worked, self._ended = 0.0, monotonic()
        self.since: float | None = None

    def begin(self) -> None:
        """A step begins."""
        self.worked, self._ended = 0.0, monotonic()

    def __enter__(self) -> None:
        self.since = (now := monotonic())
        self.worked += now - self._ended

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.since, self._ended = None, monotonic()


class Group(Protocol):
    """Ranks that work on one model; each calls the same operations in the same order."""

    @property
    def rank(self) -> int:
        """This rank's number."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's tensor, on every rank; may take the place of `x`."""
        ...

    def join(self, x: Tensor, widths: list[int]) -> Tensor:
        """The tensors (R, width) of all ranks side by side, on the first rank; on the others, their own."""
        ...

    def spread(self, x: Tensor) -> Tensor:
        """The first rank's tensor, on every rank: the others pass one of its shape and type."""
        ...

    def send(self, x: Tensor, rank: int) -> Callable[[], None]:
        """A tensor to another rank, which receives it. What comes back waits until the tensor may change; call it."""
        ...

    def receive(self, x: Tensor, rank: int) -> Tensor:
        """The tensor that another rank sends, in place of `x`, which has its shape and type."""
        ...
