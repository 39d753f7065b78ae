"""Speculative decoding: guesses of the next tokens (drafts) are checked together, so that one step may give several.

A step computes a sequence's last token and its drafts, one row each, and samples a token from every row as it would
without drafts. The sampled tokens up to and including the first that differs from its draft are the sequence's next
ones; the cache rows of the rejected drafts are taken back. So drafts change how many steps there are, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from time import perf_counter
from typing import Protocol

from zoo.engine.ledger import Ledger
from zoo.engine.memory import Memory
from zoo.engine.prefixes import Prefixes
from zoo.engine.scheduler import Work
from zoo.engine.sequence import Sequence

MOST = 7
"""Drafts of a sequence in one step, where its request does not say less: eight rows with the one before them."""

LONGEST_PAUSE = 128
"""Steps after which a sequence whose drafts were all wrong is given another try."""

TRIES = 2
"""Steps with drafts that a sequence gets once it has begun: a model that guesses has read its prompt by then."""

Asked = Items[tuple[Sequence, int]]
"""Sequences, and how many drafts at most each is to get."""


class Source(Protocol):
    """Where drafts come from."""

    def drafts(self, asked: Asked) -> list[list[int]]:
        """The likely next tokens of each of these sequences; nothing where there is no good guess."""
        ...

    def free(self, seq: int) -> None:
        """Forgets a sequence; it may come back."""
        ...

    @property
    def caches(self) -> list[Memory]:
        """What it keeps of sequences beside the cache of the model that is asked."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Bytes of its own weights."""
        ...


class Pace:
    """How many drafts a sequence gets: as measured acceptance deserves, down to nothing but a try now and then.

    proven: the last ones paid. tries: how many may go wrong before that matters; none before it has begun.
    """

    def __init__(self) -> None:
        self.size, self.pause, self.wait, self.proven = MOST // 2, 1, 0, False
        self.tries: int | None = None

    def ask(self, ledger: Ledger) -> int:
        """How many drafts the next step is to have, as far as the ledger allows those that may not pay."""
        if self.wait:
            self.wait -= 1
            return 0
        if self.tries is None:
            if not ledger.may_begin:
                return 0
            self.tries = TRIES
        return self.size if self.proven or self.tries or ledger.may_lose else 0

    def learn(self, drafted: int, right: int, paid: bool) -> None:
        """What came of a step's drafts: all right, more of them; if they did not pay, later, each time by twice."""
        self.size = min(2 * self.size, MOST) if right == drafted else right + 1
        self.proven, self.tries = paid, max(0, (self.tries or 0) - 1)
        if paid:
            self.pause = max(1, self.pause // 4)
        else:
            self.wait, self.pause = self.pause, min(2 * self.pause, LONGEST_PAUSE)


class Drafting:
    """Adds drafts to a step's work, where there is room and they are worth it, and takes back those that were wrong.

    most_rows: rows of a step's decoding sequences, drafts included. clock: seconds.
    """

    def __init__(
        self,
        source: Source,
        memory: Memory,
        prefixes: Prefixes,
        most_rows: int,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self.source, self.memory, self.prefixes, self.most_rows = source, memory, prefixes, most_rows
        self.ledger, self.clock = Ledger(), clock
        self._paces: dict[int, Pace] = {}
        self._marked: set[int] = set()
        self._begun: float | None = None
        self._spent, self._rows, self._drafts = 0.0, 0, 0

    def extended(self, work: list[Work], left: int) -> list[Work]:
        """The work, with drafts for as many sequences as get some: at most `left` rows more. Their rows are marked."""
        start = self.clock()
        found = self._found(work, min(self.most_rows - len(work), left))
        extended = [*work]
        for place, drafts in found:
            seq = work[place].sequence
            extended[place] = Work(seq, 1 + len(drafts), drafts)
            self._marked.add(seq.number)
            self.memory.mark(seq.cache, seq.past, extended[place].rows)
        self._begun = self.clock()
        self._spent = self._begun - start
        return extended

    def ran(self, work: list[Work]) -> None:
        """A step with this work was computed. One that also reads prompts says nothing about the price of drafts."""
        self._rows, self._drafts = len(work), sum(len(item.drafts) for item in work)
        self.ledger.price = None
        if self._begun is not None and all(item.drafts or item.rows == 1 for item in work):
            self.ledger.step(self._rows, self._drafts, self.clock() - self._begun, self._spent)
        self._begun = None

    def settle(self, work: Work, right: int) -> None:
        """The step has moved the sequence on by `right` of the work's drafts: takes the rows of the others back."""
        seq, drafted, price = work.sequence, len(work.drafts), self.ledger.price
        self._rewind(seq)
        # In steps without drafts: a token is worth its share of one, and the drafts cost what they added.
        gain, cost = right / self._rows, 0.0 if price is None else (price - 1) * drafted / self._drafts
        if price is not None:
            self.ledger.gain(gain)
        self._paces[seq.number].learn(drafted, right, right > 0 and gain > cost)

    def free(self, seq: Sequence) -> None:
        """The sequence leaves the cache, perhaps after a step with drafts that was interrupted."""
        self._rewind(seq)
        self.source.free(seq.number)
        self._paces.pop(seq.number, None)

    def _rewind(self, seq: Sequence) -> None:
        if seq.number in self._marked:
            self._marked.remove(seq.number)
            self.memory.rewind(seq.cache, seq.past)

    def _found(self, work: list[Work], room: int) -> list[tuple[int, tuple[int, ...]]]:
        """Drafts by the place of their sequence in the work."""
        if room <= 0 or not self.ledger.knows(len(work)):
            return []
        wishes = [(place, wish) for place, item in enumerate(work) if (wish := self._wish(item.sequence))]
        share = max(1, room // max(len(wishes), 1))
        asked = [(place, min(wish, share)) for place, wish in wishes[:room]]
        asked = [(place, count) for place, count in asked if self._has_room(work[place].sequence, count)]
        found = self.source.drafts([(work[place].sequence, count) for place, count in asked]) if asked else []
        drafts = ((place, tuple(some[:count])) for (place, count), some in zip(asked, found, strict=True))
        return [(place, some) for place, some in drafts if some]

    def _wish(self, seq: Sequence) -> int:
        """How many drafts the sequence should get. The last token that a request may get is never computed, so it is
        never a draft; a prompt's scores come first."""
        limits = (seq.params.drafts, None if self.memory.back is None else self.memory.back - 1)
        most = min([seq.allowed - seq.generated - 1, *(limit for limit in limits if limit is not None)])
        if most <= 0 or seq.scores:
            return 0
        return min(most, self._paces.setdefault(seq.number, Pace()).ask(self.ledger))

    def _has_room(self, seq: Sequence, count: int) -> bool:
        return self.prefixes.grow(seq, len(seq.tokens) + count)
