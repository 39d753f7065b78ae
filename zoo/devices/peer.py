"""The messages of one other rank, and the watch that notices a rank which hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any

from zoo.devices.channel import Channel, ClosedError
from zoo.devices.group import LostError, Waits
from zoo.registry.errors import RankError

TICK = 1.0
"""Seconds between two looks at the other ranks, unless the deadline is short."""

MEETING = 10
"""Deadlines in which ranks must have started and found each other, and in which one that loads must have come on."""

SLACK = 10
"""How many times as long as this rank has computed in a step, for each rank, it waits for the others in it."""


class Peer:
    """A thread reads what the rank says: signs of life, which are noted, and all else, which `receive` gives.

    silent: seconds since the last word, as `Watch` counts them. patience: how many deadlines that may be. doing, waits,
    host: as it said last. gone: when its connection broke (monotonic seconds).
    """

    def __init__(self, rank: int, channel: Channel) -> None:
        self.rank, self.channel = rank, channel
        self.silent, self.doing, self.waits, self.host, self.patience = 0.0, "its start", False, "", 1
        self.gone: float | None = None
        self._heard: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=self._read, name=f"zoo hears rank {rank}", daemon=True).start()

    def receive(self, seconds: float | None = None) -> Any:
        """The next message. Raises ClosedError, and TimeoutError when none comes in time; None: it may take forever."""
        if self.gone is not None and self._heard.empty():
            raise ClosedError("the connection was closed")
        try:
            message = self._heard.get(timeout=seconds)
        except Empty:
            raise TimeoutError from None
        if message is None:
            raise ClosedError("the connection was closed")
        return message

    def _read(self) -> None:
        try:
            while True:
                message = self.channel.receive()
                self.silent = 0.0
                if "alive" in message:
                    self.doing, self.waits, self.host = message["alive"], message["waits"], message["host"]
                else:
                    self._heard.put(message)
        except (LostError, ValueError, OSError):
            self.gone = monotonic()
            self._heard.put(None)


class Watch:
    """A thread that finds the rank which stands still, and has it given up: one that is silent for `deadline` seconds,
    or is heard but lets this one wait so long, and `SLACK` times longer than this one has computed in the step.

    size: ranks in all. give_up: called with the error and the rank's number, and not again.
    """

    def __init__(
        self, peers: Sequence[Peer], size: int, waits: Waits, deadline: float, give_up: Callable[[RankError, int], None]
    ) -> None:
        self._peers, self._size, self._waits, self._deadline, self._give_up = peers, size, waits, deadline, give_up
        self._since, self._waited = waits.since, 0.0
        self._over = threading.Event()
        threading.Thread(target=self._run, name="zoo watches ranks", daemon=True).start()

    def stop(self) -> None:
        """Looks no more."""
        self._over.set()

    def _run(self) -> None:
        before = monotonic()
        while not self._over.wait(tick := min(TICK, self._deadline / 10)):
            # Time in which this process itself was stopped is nobody's silence.
            before, passed = (now := monotonic()), min(now - before, 2 * tick)
            for peer in self._peers:
                peer.silent += passed
            if self._waits.since != self._since:
                self._since, self._waited = self._waits.since, 0.0
            self._waited += passed
            lost = self._silent() or self._late()
            if lost is not None:
                self._give_up(*lost)
                return

    def _silent(self) -> tuple[RankError, int] | None:
        for peer in self._peers:
            if peer.silent > peer.patience * self._deadline and peer.gone is None:
                return self._fault(peer, "gives no sign of life", f"none for {peer.silent:.0f} s"), peer.rank
        return None

    def _late(self) -> tuple[RankError, int] | None:
        limit = max(self._deadline, SLACK * self._size * self._waits.worked)
        if self._since is None or self._waited <= limit:
            return None
        late = [*(peer for peer in self._peers if not peer.waits), *self._peers][0]
        return self._fault(late, "does not come on", f"waited for {self._waited:.0f} s"), late.rank

    def _fault(self, peer: Peer, what: str, found: str) -> RankError:
        return RankError(
            f"rank {peer.rank} of {self._size} {what}",
            where=peer.host or "devices",
            found=f"{found}; it was last seen in {peer.doing}",
            hint="ZOO_DEADLINE=SECONDS waits longer",
        )
