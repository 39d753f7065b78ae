"""Who runs in the next step: decodes first, then chunks of prompts, oldest first, within tokens, rows and memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from zoo.engine.memory import Memory
from zoo.engine.prefixes import Prefixes
from zoo.engine.sequence import Sequence

if TYPE_CHECKING:
    from zoo.engine.drafting import Drafting


class Work(NamedTuple):
    """The next `rows` uncached tokens of a sequence, or its last one and guesses of those to come."""

    sequence: Sequence
    rows: int
    drafts: tuple[int, ...] = ()


class Scheduler:
    """Continuous batching by order of arrival.

    A sequence is admitted when its tokens fit in memory, all at once, so a half-read prompt never waits for room.
    A decoding sequence that finds no room takes it from the youngest, which is computed again later with what
    it had generated. That one is first in line then, and needs more room than it left, so that it cannot come back
    before another ends: two sequences never take turns in throwing each other out. What is only kept for later
    requests makes room before any of them does.
    A step looks at those that run and at the first one that waits, however many wait.
    """

    def __init__(
        self,
        memory: Memory,
        prefixes: Prefixes,
        *,
        chunk_tokens: int,
        max_batch_size: int,
        drafting: Drafting | None = None,
    ) -> None:
        self.memory, self.prefixes, self.drafting = memory, prefixes, drafting
        self.chunk_tokens, self.max_batch_size = chunk_tokens, max_batch_size
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def drop(self, seq: Sequence, *, sound: bool = True) -> None:
        """Forget a sequence that ended, wherever it stands. sound: others may go on from what it cached."""
        if sound:
            self._leave(seq)
        else:
            self._forget(seq)
            self.prefixes.discard(seq)
        # Those that run are few, and what ends nearly always runs.
        line = self.running if seq in self.running else self.waiting
        line.remove(seq)

    def restart(self, seqs: Iterable[Sequence], *, forget: bool) -> None:
        """Make all unfinished sequences, in order of arrival, wait after an interrupted step.

        Their tokens before that step are still cached; windows and states may be half written. forget: give the
        memory of all that is cached back.
        """
        self.waiting, self.running = deque(seqs), []
        for seq in self.waiting:
            self._leave(seq, whole=False)
            seq.past = 0
        self.prefixes.sweep()
        if forget:
            self.prefixes.clear()

    def plan(self) -> list[Work]:
        """The next step's work; empty when there is none. At most `chunk_tokens` rows in all."""
        work = self._decodes()
        left = self.chunk_tokens - len(work)
        if self.drafting is not None and work:
            work = self.drafting.extended(work, left)
            left = self.chunk_tokens - sum(item.rows for item in work)
        for seq in self.running:
            if left and seq.todo > 1:
                work.append(Work(seq, min(seq.rows, left)))
                left -= work[-1].rows
        while left and (admitted := self._admitted()):
            work.append(Work(admitted, min(admitted.rows, left)))
            left -= work[-1].rows
        # Those that were let in or had to wait may have said where the chunks before theirs are to end.
        return [item if item.drafts else Work(item.sequence, min(item.rows, item.sequence.rows)) for item in work]

    def ran(self, work: list[Work]) -> None:
        """A step with what was planned has been computed."""
        if self.drafting is not None:
            self.drafting.ran(work)

    def settle(self, work: Work, right: int) -> None:
        """Work with drafts is done, of which so many were right: the rows of the others leave the cache."""
        if self.drafting is not None:
            self.drafting.settle(work, right)

    def _leave(self, seq: Sequence, *, whole: bool = True) -> None:
        """It has no room of its own any more; what it cached is kept for others, and for itself."""
        self._forget(seq)
        self.prefixes.keep(seq, whole=whole and not seq.begun)
        seq.begun = False

    def _forget(self, seq: Sequence) -> None:
        if self.drafting is not None:
            self.drafting.free(seq)

    def _decodes(self) -> list[Work]:
        work: list[Work] = []
        place = 0
        # `_has_room` may shorten `running` behind the current place.
        while place < len(self.running) and len(work) < self.chunk_tokens:
            seq = self.running[place]
            if seq.todo == 1 and self._has_room(seq):
                work.append(Work(seq, 1))
            place += 1
        return work

    def _has_room(self, seq: Sequence) -> bool:
        while not self.prefixes.grow(seq, len(seq.tokens)):
            youngest = self.running.pop()
            self.waiting.appendleft(youngest)
            self._leave(youngest)
            youngest.past = 0
            self.preemptions += 1
            if youngest is seq:
                return False
        return True

    def _admitted(self) -> Sequence | None:
        if not self.waiting or len(self.running) >= self.max_batch_size:
            return None
        seq = self.waiting[0]
        if not self.prefixes.admit(seq, self.running):
            return None
        self.running.append(self.waiting.popleft())
        return seq
