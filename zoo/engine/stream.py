"""One request's chunks as an iterator."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

from zoo.engine.request import Chunk

if TYPE_CHECKING:
    from zoo.engine.engine import Engine


class Stream(Iterator[Chunk]):
    """Chunks as they are made; each `next` runs the engine when none lies ready.

    Several open streams may be read in turn: what a step makes for the others is kept for them. Closing the stream,
    leaving its `with` block, or dropping it cancels the request and frees its memory. Raises the request's error.
    """

    def __init__(self, engine: Engine, request_id: str) -> None:
        self._engine, self.request_id, self._open = engine, request_id, True

    def __next__(self) -> Chunk:
        try:
            chunk = self._engine.receive(self.request_id) if self._open else None
        except BaseException:
            self.close()
            raise
        if chunk is None or chunk.last:
            self.close()
        if chunk is None:
            raise StopIteration
        if chunk.error is not None:
            raise chunk.error
        return chunk

    def close(self) -> None:
        """Cancel what is left of the request."""
        if self._open:
            self._engine.discard(self.request_id)
            self._open = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
