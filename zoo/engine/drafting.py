"""Guesses of the next tokens, checked all at once: where they are right, one step gives several tokens.

A step computes a sequence's last token and its drafts, one row each, and draws a token from every row as it would
have without them. Those drawn up to the first draft that was wrong are the sequence's next tokens; rows behind it are
taken back. So drafts change how many steps there are, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Protocol

from zoo.engine.memory import Memory
from zoo.engine.prefixes import Prefixes
from zoo.engine.scheduler import Work
from zoo.engine.sequence import Sequence

MOST = 7
"""Drafts of a sequence in one step, where its request does not say less: eight rows with the one before them."""

LONGEST_PAUSE = 128
"""Steps after which a sequence whose drafts were all wrong is given another try."""

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
    """How many drafts a sequence gets: as measured acceptance deserves, down to nothing but a try now and then."""

    def __init__(self) -> None:
        self.size, self.pause, self.wait = MOST // 2, 1, 0

    def ask(self) -> int:
        """How many drafts the next step is to have."""
        if self.wait:
            self.wait -= 1
            return 0
        return self.size

    def learn(self, drafted: int, right: int) -> None:
        """What came of a step's drafts: all right, more of them; none, fewer and later, each time by twice."""
        if right == drafted:
            self.size = min(2 * max(self.size, 1), MOST)
        else:
            self.size = right + 1
        if right:
            self.pause = max(1, self.pause // 4)
        else:
            self.wait, self.pause = self.pause, min(2 * self.pause, LONGEST_PAUSE)


class Drafting:
    """Adds drafts to the work of sequences that decode.

    most_rows: a step has at most so many rows of decoding sequences and drafts together: as many as cost little more
    than one, because all of them read the weights once.
    """

    def __init__(self, source: Source, memory: Memory, prefixes: Prefixes, most_rows: int) -> None:
        self.source, self.memory, self.prefixes, self.most_rows = source, memory, prefixes, most_rows
        self._paces: dict[int, Pace] = {}

    def extended(self, work: list[Work], left: int) -> list[Work]:
        """The work, with drafts for as many sequences as get some: at most `left` rows more. Their rows are marked."""
        room = min(self.most_rows - len(work), left)
        if room <= 0:
            return work
        wishes = [(place, wish) for place, item in enumerate(work) if (wish := self._wish(item.sequence))]
        share = max(1, room // max(len(wishes), 1))
        asked = [(place, min(wish, share)) for place, wish in wishes[:room]]
        asked = [(place, count) for place, count in asked if self._has_room(work[place].sequence, count)]
        found = self.source.drafts([(work[place].sequence, count) for place, count in asked]) if asked else []
        extended = [*work]
        for (place, count), drafts in zip(asked, found, strict=True):
            seq = work[place].sequence
            if drafts:
                extended[place] = Work(seq, 1 + len(drafts[:count]), tuple(drafts[:count]))
                self.memory.mark(seq.cache, seq.past, extended[place].rows)
        return extended

    def settle(self, work: Work, right: int) -> None:
        """A step has moved the sequence on by `right` of the work's drafts: takes the rows of the others back."""
        seq = work.sequence
        self.memory.rewind(seq.cache, seq.past)
        self._paces[seq.number].learn(len(work.drafts), right)

    def free(self, seq: Sequence) -> None:
        """The sequence leaves the cache."""
        self.source.free(seq.number)
        self._paces.pop(seq.number, None)

    def _wish(self, seq: Sequence) -> int:
        """How many drafts the sequence should get. The last token that a request may get is never computed, so it is
        never a draft; a prompt's scores come first."""
        limits = (seq.params.drafts, None if self.memory.back is None else self.memory.back - 1)
        most = min([seq.allowed - seq.generated - 1, *(limit for limit in limits if limit is not None)])
        if most <= 0 or seq.scores:
            return 0
        return min(most, self._paces.setdefault(seq.number, Pace()).ask())

    def _has_room(self, seq: Sequence, count: int) -> bool:
        return self.prefixes.grow(seq, len(seq.tokens) + count)
