"""The first rank of a run: it meets the others, tells them what to do, and says which of them failed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from time import monotonic, sleep
from types import FrameType
from typing import Any

from torch import Tensor

from zoo.devices.channel import Channel, ClosedError
from zoo.devices.group import LostError
from zoo.devices.process_group import ProcessGroup
from zoo.devices.processes import Worker
from zoo.engine.leading import Message
from zoo.engine.memory import MIRRORED, Memory
from zoo.registry import errors
from zoo.registry.errors import RankError, ZooError

GRACE = 3.0
"""Seconds in which the others end by themselves, and in which the cause of a broken connection becomes known."""


class Ranks:
    """The other ranks of a model. Every call on them is made by the thread that runs the engine.

    channels: to each of them, by number. workers: their processes, those that this one has started.
    deadline: seconds within which one answers.
    """

    def __init__(self, channels: Mapping[int, Channel], workers: Mapping[int, Worker], deadline: float) -> None:
        self.channels, self.workers, self.deadline = channels, workers, deadline
        self.groups: tuple[ProcessGroup, ProcessGroup] | None = None
        self.at_end: list[Callable[[], None]] = []
        self._queue: list[tuple[str, Any]] = []
        self._inside = False
        self._fault: ZooError | None = None
        self._closed = False

    # --- what an engine needs (zoo.engine.leading.Others) -------------------------------------------------------

    def mirror(self, memory: Memory) -> None:
        """They repeat each change at the next step, before it."""
        for name in MIRRORED:
            setattr(memory, name, self._noted(name, getattr(memory, name)))

    @contextmanager
    def together(self, task: str, message: Message) -> Iterator[None]:
        """Raises RankError when one of them fails in it. Any other error in it ends the run as well.

        Ctrl-C waits for the end of the block, so that no rank is left in the middle of a step; a second one does not.
        """
        self.check()
        with _uninterrupted():
            try:
                self._tell([*self._queue, (task, message)])
                self._queue.clear()
                yield
            except BaseException as error:
                fault = self._explained(error)
                self._end()
                if fault is not None:
                    raise fault from error
                raise

    def spread(self, x: Tensor) -> Tensor:
        """As the group of all does."""
        assert self.groups is not None
        return self.groups[0].spread(x)

    def close(self) -> None:
        """They end; those that do not are killed."""
        if not self._closed and self._fault is None:
            with suppress(ClosedError):
                self._tell([("end", None)])
        self._end()

    # --- what a start needs -------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises what ended the run, if anything did."""
        if self._fault is not None:
            raise self._fault
        if self._closed:
            raise ZooError("the model was closed", hint="load it again")

    def tell(self, message: Any) -> None:
        """A message to each of them, before there is an engine. Raises RankError."""
        with self._guarded():
            self._tell(message)

    def hear(self, word: str) -> list[Any]:
        """What each of them answers: the value of `word`, by the order of their numbers.

        Raises the error that one of them answers with, and RankError for one that is silent or has ended.
        """
        with self._guarded():
            return [self._answer(rank, channel, word) for rank, channel in sorted(self.channels.items())]

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            fault = self._explained(error)
            self._end()
            if fault is not None:
                raise fault from error
            raise

    # --- inside -------------------------------------------------------------------------------------------------

    def _noted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if self._inside:
                return method(*arguments)
            self._inside = True
            try:
                result = method(*arguments)
            finally:
                self._inside = False
            if result is not False:
                self._queue.append((name, arguments))
            return result

        return call

    def _tell(self, message: Any) -> None:
        for _, channel in sorted(self.channels.items()):
            channel.send(message)

    def _answer(self, rank: int, channel: Channel, word: str) -> Any:
        """Word of progress keeps a rank from being given up."""
        while True:
            channel.wait_at_most(self.deadline)
            try:
                message = channel.receive()
            except TimeoutError:
                raise RankError(
                    f"rank {rank} does not answer", found=f"nothing for {self.deadline:g} s", expected=word
                ) from None
            finally:
                channel.wait_at_most(None)
            if "error" in message:
                raise _error(rank, message["error"])
            if word in message:
                return message[word]

    def _explained(self, error: BaseException) -> ZooError | None:
        """The fault of another rank that an error here comes of; None for an error of this rank's own."""
        if self._fault is None and isinstance(error, LostError):
            self._fault = self._told() or self._dead(error)
        elif self._fault is None:
            self._fault = RankError("the run over several devices was ended", found=str(error) or type(error).__name__)
            return None
        return self._fault

    def _told(self) -> ZooError | None:
        """The error that a rank sent before it ended."""
        for rank, channel in sorted(self.channels.items()):
            channel.wait_at_most(0.5)
            try:
                while "error" not in (message := channel.receive()):
                    pass
                return _error(rank, message["error"])
            except (ClosedError, TimeoutError):
                continue
        return None

    def _dead(self, error: BaseException) -> RankError:
        limit = monotonic() + GRACE
        while not (dead := [w for w in self.workers.values() if w.culprit]) and monotonic() < limit and self.workers:
            sleep(0.02)
        if dead:
            return RankError(
                f"rank {dead[0].rank} of {len(self.channels) + 1} has ended", where="devices", found=dead[0].cause
            )
        return RankError(
            "the ranks have lost each other",
            where="devices",
            found=str(error).partition("\n")[0][:300],
            hint=f"a step may take {self.deadline:g} s; ZOO_DEADLINE=SECONDS allows more",
        )

    def _end(self) -> None:
        if self._closed:
            return
        self._closed = True
        for group in {*(self.groups or ())}:
            group.close()
        limit = monotonic() + GRACE
        for channel in self.channels.values():
            channel.close()
        for worker in self.workers.values():
            worker.end(limit)
        for call in self.at_end:
            call()


def _error(rank: int, fields: Mapping[str, Any]) -> ZooError:
    """Another rank's error, as its own kind."""
    kind = getattr(errors, str(fields.get("kind")), ZooError)
    details = {name: fields.get(name) for name in ("found", "expected", "hint")}
    where = f"rank {rank}" + (f", {fields['where']}" if fields.get("where") else "")
    found: ZooError = kind(str(fields.get("message")), where=where, **details)
    return found


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block; a second one does not."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if seen:
        signal.raise_signal(signal.SIGINT)
