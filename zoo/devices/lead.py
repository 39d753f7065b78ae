"""The other ranks as the first one has them: it tells them what to do and finds out which of them failed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any

import torch
from torch import Tensor

from zoo.devices.channel import Channel, ClosedError
from zoo.devices.group import LostError, Waits
from zoo.devices.peer import MEETING, Peer, Watch
from zoo.devices.process_group import ProcessGroup
from zoo.devices.processes import Worker
from zoo.devices.pulse import Pulse
from zoo.engine.interrupts import uninterrupted
from zoo.engine.leading import Message
from zoo.engine.memory import MIRRORED, Memory
from zoo.registry.errors import RankError, ZooError, error_of
from zoo.registry.spec import StateSpec

GRACE = 3.0
"""Seconds in which the others end by themselves, and in which the cause of a broken connection becomes known."""


@dataclass(eq=False, slots=True)
class UnderWay:
    """The end of a step that has begun. result: what it gave."""

    wait: Callable[[], Tensor]
    result: Tensor | None = None


class Ranks:
    """The other ranks of a model. Every call on them is made by the thread that runs the engine.

    channels: to each of them, by number. workers: their processes, those that this one has started.
    deadline: seconds after which one that stands still is given up. waits: when this one waits for them.
    """

    def __init__(
        self,
        channels: Mapping[int, Channel],
        workers: Mapping[int, Worker],
        deadline: float,
        waits: Waits | None = None,
    ) -> None:
        self.channels, self.workers, self.deadline = channels, workers, deadline
        self.waits = Waits() if waits is None else waits
        self.peers = [Peer(rank, channel) for rank, channel in sorted(channels.items())]
        self.groups: tuple[ProcessGroup, ProcessGroup] | None = None
        self.elsewhere: Sequence[tuple[Sequence[StateSpec | None], int | None]] = ()
        self.at_end: list[Callable[[], None]] = []
        self._queue: list[tuple[str, Any]] = []
        self._under_way: deque[UnderWay] = deque()
        self._inside = False
        self._fault: ZooError | None = None
        self._closed = False
        self._watch = Watch(self.peers, len(channels) + 1, self.waits, deadline, self._give_up)
        self._pulses = [Pulse(channel, deadline / 10, follows=False) for channel in channels.values()]

    # --- what an engine needs (zoo.engine.leading.Others) -------------------------------------------------------

    def mirror(self, memory: Memory) -> None:
        """They repeat each change at the next step, before it."""
        for name in MIRRORED:
            setattr(memory, name, self._noted(name, getattr(memory, name)))

    @contextmanager
    def together(self, task: str, message: Message, *, settled: bool = True) -> Iterator[None]:
        """Raises RankError when one of them fails in it. Any other error in it ends the run as well.

        Ctrl-C waits for the end of the block, so that no rank is left in the middle of a step; a second one does not.
        """
        self.check()
        if settled:
            self._settle()
        with uninterrupted(twice=True), self._guarded():
            self._tell([*self._queue, (task, message)])
            self._queue.clear()
            self.waits.begin()
            yield

    def later(self, wait: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Errors as in the block. What nobody waits for is waited for all the same, before anything else that others
        send."""
        under_way = UnderWay(wait)
        self._under_way.append(under_way)
        return lambda: self._settle(under_way)

    def spread(self, x: Tensor) -> Tensor:
        """As the group of all does."""
        assert self.groups is not None
        return self.groups[0].spread(x)

    def agree(self) -> None:
        """Raises the error of one that could not do what it was told."""
        self.hear("done")

    def close(self) -> None:
        """They end; those that do not are killed."""
        if not self._closed and self._fault is None:
            with suppress(ClosedError, ZooError):
                self._settle()
                self._tell([("end", None)])
        self._end()

    # --- what a start needs -------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises what ended the run, if anything did."""
        if self._fault is not None:
            self._end()
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
            return [self._answer(peer, word) for peer in self.peers]

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

    def _settle(self, last: UnderWay | None = None) -> Tensor:
        """Waits for what is under way, up to `last`, and gives what that one does."""
        result = torch.empty(0) if last is None else last.result
        while self._under_way and (last is None or last.result is None):
            with uninterrupted(twice=True), self._guarded():
                first = self._under_way.popleft()
                first.result = result = first.wait()
        assert result is not None
        return result

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

    def _answer(self, peer: Peer, word: str) -> Any:
        """Word of progress keeps a rank from being given up."""
        limit = MEETING * self.deadline
        while True:
            try:
                message = peer.receive(limit)
            except TimeoutError:
                raise RankError(
                    f"rank {peer.rank} does not answer",
                    where=peer.host or "devices",
                    found=f"nothing for {limit:g} s; it was last seen in {peer.doing}",
                    expected=word,
                    hint="ZOO_DEADLINE=SECONDS waits longer",
                ) from None
            if "error" in message:
                raise error_of(f"rank {peer.rank}", message["error"])
            if word in message:
                return message[word]

    def _give_up(self, fault: RankError, rank: int) -> None:
        """Ends the run for a rank that stands still, by another thread than the engine's, which may wait for it."""
        if self._fault is None:
            self._fault = fault
        if rank in self.workers:
            self.workers[rank].kill()
        self.channels[rank].close()
        for group in {*(self.groups or ())}:
            group.close()

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
        for peer in self.peers:
            try:
                while "error" not in (message := peer.receive(0.5)):
                    pass
                return error_of(f"rank {peer.rank}", message["error"])
            except (ClosedError, TimeoutError):
                continue
        return None

    def _dead(self, error: BaseException) -> RankError:
        limit = monotonic() + GRACE
        while not (dead := [w for w in self.workers.values() if w.culprit]) and monotonic() < limit and self.workers:
            sleep(0.02)
        count, words = len(self.channels) + 1, str(error).partition("\n")[0][:300]
        if dead:
            return RankError(f"rank {dead[0].rank} of {count} has ended", where="devices", found=dead[0].cause)
        gone = [(peer.gone, peer.rank, peer) for peer in self.peers if peer.gone is not None]
        if gone:
            _, rank, first = min(gone)
            found = f"{words}; it was last seen in {first.doing}"
            return RankError(f"rank {rank} of {count} has gone", where=first.host or "devices", found=found)
        return RankError("the ranks have lost each other", where="devices", found=words)

    def _end(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._watch.stop()
        for pulse in self._pulses:
            pulse.stop()
        for group in {*(self.groups or ())}:
            group.close()
        limit = monotonic() + GRACE
        for channel in self.channels.values():
            channel.close()
        for worker in self.workers.values():
            worker.end(limit)
        for call in self.at_end:
            call()
