"""Prompt lookup: drafts are what followed the sequence's last tokens where they stood before, in prompt or answer.

Quoting, editing and summarising repeat what is there. Every pair of tokens points to the last place where it stood,
and that one to the place before, as deflate finds its matches (RFC 1951, section 4); among a few candidates the one
with the longest match wins.
"""

from __future__ import annotations

from zoo.engine.drafting import Asked
from zoo.engine.memory import Memory

CANDIDATES = 16
"""Earlier places of a sequence's last pair that are looked at, the latest first."""

LONGEST = 64
"""Tokens after which a match is long enough."""


class Lookup:
    """A `zoo.engine.drafting.Source`."""

    def __init__(self) -> None:
        self._chains: dict[int, Chains] = {}

    def drafts(self, asked: Asked) -> list[list[int]]:
        """The tokens behind the longest earlier match of each sequence's end."""
        return [self._chains.setdefault(seq.number, Chains()).drafts(seq.tokens, count) for seq, count in asked]

    def free(self, seq: int) -> None:
        """Forgets a sequence's places."""
        self._chains.pop(seq, None)

    @property
    def caches(self) -> list[Memory]:
        """None: places of tokens are small."""
        return []

    @property
    def weight_bytes(self) -> int:
        """It has none."""
        return 0


class Chains:
    """Where the pairs of one growing list of tokens stand."""

    def __init__(self) -> None:
        self._last: dict[int, int] = {}
        # For the token at each place: where the pair that ends with it ended before; -1 for nowhere.
        self._before: list[int] = []

    def drafts(self, tokens: list[int], count: int) -> list[int]:
        """Up to `count` tokens that followed the longest earlier match of the end of `tokens`, of two or more."""
        self._extend(tokens)
        place = self._match(tokens)
        if place < 0:
            return []
        found = tokens[place + 1 : place + 1 + count]
        # A match that reaches up to the end is a period: it goes on with itself.
        while len(found) < count:
            found.append(found[place + 1 + len(found) - len(tokens)])
        return found

    def _extend(self, tokens: list[int]) -> None:
        for place in range(len(self._before), len(tokens)):
            pair = (tokens[place - 1] << 32) | tokens[place] if place else -1
            self._before.append(self._last.get(pair, -1))
            self._last[pair] = place

    def _match(self, tokens: list[int]) -> int:
        """Where the longest match ends, the latest of equally long ones; -1 for none."""
        best, longest, place = -1, 1, self._before[-1]
        for _ in range(CANDIDATES):
            if place < 0:
                break
            length = _agreeing(tokens, place, longest)
            if length > longest:
                best, longest = place, length
            if longest >= LONGEST:
                break
            place = self._before[place]
        return best


def _agreeing(tokens: list[int], place: int, beat: int) -> int:
    """How many tokens up to `place` are those up to the end; 0 where they cannot be more than `beat`."""
    end = len(tokens) - 1
    if place < beat or tokens[place - beat] != tokens[end - beat]:
        return 0
    length = 0
    while length <= min(place, LONGEST - 1) and tokens[place - length] == tokens[end - length]:
        length += 1
    return length
