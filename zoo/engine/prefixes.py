"""Prefix caching: a prompt that begins as an earlier one did goes on from what is cached of that.

Tokens are known here only; the memory gets numbers. A line is one sequence's tokens, from its first on: of a sequence
that runs, or of one that ended, was cancelled or was preempted, whose cache is kept until others need the memory, least
recently used first. Layers that keep a window or a state have forgotten what belongs to an earlier token, so a line can
be continued from its end only, or from a snapshot. Snapshots are taken where others may want to continue: where a
prompt ends and shortly before, where two prompts part, and at the borders of chunks while there is room.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

from zoo.engine.memory import Memory
from zoo.engine.sequence import NOWHERE

if TYPE_CHECKING:
    from zoo.engine.sequence import Sequence as Running

Ids = tuple[int, ...]

FEWEST = 16
"""Tokens below which a prefix is not worth its bookkeeping."""

WORTH = 64
"""Tokens that a snapshot, or waiting for another's prompt, must save."""

LONG = 256
"""Tokens to compute from which a prompt's chunk is cut before its end, which costs a step more, for a snapshot."""

TAIL = 16
"""Tokens by which a line is shortened at least."""

POINTS = 8
"""Snapshots of one line."""

REACH = 32
"""Lines on each side that are looked at for a prompt."""


@dataclass(eq=False, slots=True)
class Line:
    """What is cached of a sequence. number: its name in memory. key, ids: what its states depend on.

    seq: the request, while it runs. ended: how many tokens were cached when it ended. whole: its end can be gone on
    from. points: tokens -> number of a snapshot.
    """

    number: int
    key: str
    ids: Ids
    seq: Running | None = None
    ended: int = 0
    whole: bool = True
    points: dict[int, int] = field(default_factory=dict)

    @property
    def held(self) -> int:
        """Cached tokens."""
        return self.ended if self.seq is None else self.seq.past

    @property
    def place(self) -> tuple[str, Ids, int]:
        """Where it stands among all lines: neighbours share the longest beginnings."""
        return self.key, self.ids, self.number


@dataclass(slots=True)
class Match:
    """The first `tokens` tokens of a line. point: where what moves stands at them. move: the line ends for it."""

    line: Line
    tokens: int
    point: int
    move: bool


@dataclass(slots=True)
class Found:
    """The best match. shared: how many tokens the most similar line has in common. leader: the running sequence that
    is about to cache most of them, `ahead` tokens."""

    match: Match | None = None
    shared: int = 0
    leader: Running | None = None
    ahead: int = 0

    @property
    def tokens(self) -> int:
        return 0 if self.match is None else self.match.tokens


class Prefixes:
    """Gives sequences their memory, and keeps it for others.

    on: without, nothing is kept. limit: bytes that may be kept; None: all that the memory has.
    """

    def __init__(self, memory: Memory, *, on: bool = True, limit: int | None = None) -> None:
        self.memory, self.on, self.limit = memory, on and memory.reusable, limit
        self._lines: list[tuple[str, Ids, int]] = []
        self._of: dict[int, Line] = {}
        # Lines that ended and snapshots of all lines, least recently used first.
        self._kept: OrderedDict[int, Line] = OrderedDict()
        self._numbers = count()

    @property
    def kept(self) -> int:
        """Bytes that only serve later requests."""
        return self.memory.used - self.memory.holds([line.number for line in self._of.values() if line.seq])

    # --- sequences ----------------------------------------------------------------------------------------------

    def admit(self, seq: Running, running: Sequence[Running]) -> bool:
        """Room for all tokens of a sequence, the first of them taken from what is cached where that begins alike.

        False when there is no room, or when it pays to wait for a running one that computes the same tokens.
        """
        found = self._find(seq) if self.on else Found()
        if found.leader is not None and found.ahead >= found.tokens + WORTH:
            if self.memory.moves:
                found.leader.cuts.add(found.ahead)
            return False
        number, match = next(self._numbers), found.match
        roomy, needed = None, TAIL
        while not self._entered(number, seq, match):
            if roomy is None:
                roomy = self.memory.could([other.cache for other in running], len(seq.tokens))
            if not roomy:
                return False
            if self.evict(match, needed):
                needed *= 2
                continue
            if match is None:
                return False
            if match.move or match.line.seq is not None:
                match = None
            else:
                match.move = True
        self._begin(number, seq, match)
        if self.memory.moves:
            seq.cuts = self._cuts(seq, found.shared)
        return True

    def grow(self, seq: Running, tokens: int) -> bool:
        """Room for so many tokens of a running sequence, from what is only kept if need be; False if that is not
        enough."""
        needed = TAIL
        while not self.memory.reserve(seq.cache, tokens):
            if not self.evict(needed=needed):
                return False
            needed *= 2
        return True

    def advanced(self, seq: Running) -> None:
        """A step has moved a sequence on, inside its prompt or to its end: a snapshot may be worth it."""
        if not (self.on and self.memory.moves) or not WORTH <= seq.past <= seq.prompt_length:
            return
        line, wanted = self._of[seq.cache], seq.past in seq.cuts or seq.past == seq.prompt_length
        number = next(self._numbers)
        while seq.past not in line.points:
            if self.memory.snapshot(seq.cache, number, seq.past):
                line.points[seq.past] = number
                self._kept[number] = line
            elif not wanted or not self.evict(Match(line, 0, number, False)):
                return
        if len(line.points) > POINTS:
            self._drop(line.points[_crowded(sorted(line.points))])
        if not wanted and self._over:
            self._drop(number)
        self._shrink()

    def keep(self, seq: Running, *, whole: bool = True) -> None:
        """A sequence ends or makes room: what it cached stays as long as nobody needs its memory.

        whole: its last step was not interrupted, so that also what moves on with each step can be trusted.
        """
        line = self._of.get(seq.cache)
        if line is None or not self.on or seq.past < FEWEST:
            self.discard(seq)
            return
        self._remove(line)
        line.ids, line.ended, line.whole, line.seq = seq.content[: seq.past], seq.past, whole, None
        self._insert(line)
        self._kept[line.number] = line
        seq.cache = NOWHERE
        self._forget_doubles(line)
        self._shrink()

    def discard(self, seq: Running) -> None:
        """A sequence ends, and nothing of it can be trusted or is worth keeping."""
        if seq.cache in self._of:
            self._drop(seq.cache)
        self.memory.free(seq.cache)
        seq.cache = NOWHERE

    def evict(self, spare: Match | None = None, needed: int | None = None) -> bool:
        """Give the memory of what was used longest ago back; False when nothing is left but what `spare` needs.

        needed: tokens for which there is no room: where it can be, a line loses its tail only.
        """
        for number, line in self._kept.items():
            if spare is None or (line is not spare.line and number != spare.point):
                if needed is None or line.number != number or not self._trimmed(line, line.ended - needed):
                    self._drop(number)
                return True
        return False

    # --- everything ---------------------------------------------------------------------------------------------

    def retain(self, keys: Collection[str]) -> None:
        """Forget what depends on other things than these, such as adapters that are gone."""
        for line in [*self._of.values()]:
            if line.key not in keys and line.seq is None:
                self._drop(line.number)

    def clear(self) -> None:
        """Forget all that no sequence runs on."""
        while self.evict():
            pass

    def sweep(self) -> None:
        """Give back what an interruption left without a name, and forget what it left without memory."""
        numbers, known = {*self.memory.numbers}, {*self._of} | {*self._kept}
        for number in numbers - known:
            self.memory.free(number)
        for number in known - numbers:
            if number in self._of or number in self._kept:
                self._drop(number)

    # --- inside -------------------------------------------------------------------------------------------------

    def _find(self, seq: Running) -> Found:
        ids, found = seq.content, Found()
        place = bisect_left(self._lines, (seq.key, ids))
        for near in (self._lines[place : place + REACH], self._lines[max(place - REACH, 0) : place][::-1]):
            for key, others, number in near:
                shared = min(_common(ids, others), seq.reusable) if key == seq.key else 0
                if shared <= max(found.tokens, FEWEST - 1):
                    break
                found.shared = max(found.shared, shared)
                self._consider(self._of[number], shared, found)
        return found

    def _consider(self, line: Line, shared: int, found: Found) -> None:
        """Whether a line that has so many tokens in common serves more of them than what was found."""
        if line.seq is not None and line.held < shared > found.ahead:
            found.leader, found.ahead = line.seq, shared
        for tokens, point in self._ends(line, shared):
            if tokens > max(found.tokens, FEWEST - 1):
                # A line of which little would be lost is handed over; the memory that a copy saves is worth more.
                found.match = Match(line, tokens, point, line.seq is None and line.held - tokens < FEWEST)

    def _ends(self, line: Line, shared: int) -> Iterator[tuple[int, int]]:
        """Where a line can be gone on from within its first `shared` tokens, and who stands there."""
        tokens = min(shared, line.held)
        whole = line.whole and not (line.seq is not None and line.seq.begun)
        if tokens and (whole or not self.memory.moves) and self.memory.serves(line.held, tokens):
            yield tokens, line.number
        yield from ((tokens, number) for tokens, number in line.points.items() if tokens <= shared)

    def _entered(self, number: int, seq: Running, match: Match | None) -> bool:
        if match is None:
            return self.memory.reserve(number, len(seq.tokens))
        base, room = match.line.number, len(seq.tokens)
        try:
            return self.memory.adopt(number, base, match.point, match.tokens, room, match.move)
        except BaseException:
            # Interrupted: what was being handed over is neither's.
            self.memory.free(number)
            if match.move:
                self._drop(base)
            raise

    def _begin(self, number: int, seq: Running, match: Match | None) -> None:
        """A sequence that has its memory starts to run."""
        seq.cache, seq.past = number, 0 if match is None else match.tokens
        if seq.cached_tokens is None:
            seq.cached_tokens = min(seq.past, seq.prompt_length)
        if not self.on:
            return
        line = Line(number, seq.key, seq.content, seq)
        if match is not None:
            for used in (match.line.number, match.point):
                if used in self._kept:
                    self._kept.move_to_end(used)
            if match.move:
                self._take_over(match.line, line, match.tokens)
        self._insert(line)

    def _take_over(self, old: Line, new: Line, tokens: int) -> None:
        """The snapshots of a line that was handed over, as far as they belong to what goes on."""
        for at, number in [*old.points.items()]:
            if at <= tokens:
                new.points[at] = number
                self._kept[number] = new
                del old.points[at]
        self._drop(old.number)

    def _cuts(self, seq: Running, shared: int) -> set[int]:
        """Where a prompt's chunks are to end, so that a snapshot can be taken: where it parts from another, and at
        its last sixteenth token before the end, which the same prompt and one of another last word have too."""
        last = (seq.prompt_length - 1) // 16 * 16
        cuts = {shared} | ({last} if seq.todo >= LONG else set())
        return {cut for cut in cuts if cut >= seq.past + WORTH and cut < seq.prompt_length}

    def _forget_doubles(self, line: Line) -> None:
        """Lines beside one that serve nothing but what it serves, or itself if another does."""
        place = bisect_left(self._lines, line.place)
        before, after = self._lines[max(place - 1, 0) : place], self._lines[place + 1 : place + 2]
        for _, _, number in before:
            other = self._of[number]
            if other.seq is None and self._within(other, line.key, line.ids):
                self._drop(number)
        for key, ids, number in after:
            if self._within(line, key, ids[: self._of[number].held]):
                self._drop(line.number)

    def _within(self, line: Line, key: str, ids: Ids) -> bool:
        same = line.key == key and line.ids == ids[: len(line.ids)]
        return same and (not self.memory.moves or (len(line.ids) == len(ids)))

    def _shrink(self) -> None:
        while self._over and self.evict():
            pass

    @property
    def _over(self) -> bool:
        return self.limit is not None and self.kept > self.limit

    def _insert(self, line: Line) -> None:
        self._of[line.number] = line
        insort(self._lines, line.place)

    def _remove(self, line: Line) -> None:
        del self._of[line.number]
        del self._lines[bisect_left(self._lines, line.place)]

    def _trimmed(self, line: Line, tokens: int) -> bool:
        """Whether a line is still there with its first `tokens` tokens, and the memory of the others is free."""
        tokens = tokens // TAIL * TAIL
        if tokens < WORTH or not self.memory.trim(line.number, tokens):
            return False
        self._remove(line)
        line.ids, line.ended = line.ids[:tokens], tokens
        self._insert(line)
        return True

    def _drop(self, number: int) -> None:
        """Forget a snapshot, or a line with its snapshots."""
        line = self._kept.pop(number, None) or self._of[number]
        if line.number == number:
            self._remove(line)
            for point in line.points.values():
                del self._kept[point]
                self.memory.free(point)
        else:
            line.points = {tokens: point for tokens, point in line.points.items() if point != number}
        self.memory.free(number)


def _common(ids: Ids, others: Ids) -> int:
    """How many first ids are the same."""
    low, high = 0, min(len(ids), len(others))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if ids[low:middle] == others[low:middle] else (low, middle - 1)
    return low


def _crowded(points: list[int]) -> int:
    """The point whose neighbours are closest to each other; never the last one."""
    gaps = [(after - before, at) for before, at, after in zip([0, *points], points, points[1:], strict=False)]
    return min(gaps)[1]
