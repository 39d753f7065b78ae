"""The cache of all sequences within a budget of bytes: layers that keep the same kind of state share one Store.

With pipeline stages, the first device's Memory also counts the caches of the others, so that a sequence grows only
where all of them have room, and knows what the layers of all stages need to reuse a prefix or to take rows back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from zoo.components.cache.store import Reusable, Store, by_layer, make_store, stored_parts
from zoo.registry.spec import StateSpec

# Room is asked for in steps of so many tokens, so that a decode step seldom has to ask.
GRAIN = 16

StoreFactory = Callable[[StateSpec, int, int | None], Store]
"""(state Spec, number of layers, bytes that its pool takes at once or None) -> Store."""


@dataclass(frozen=True, slots=True)
class Group:
    """Layers of a device, or parts of them, that keep the same state, and the bytes that they may take.

    device: 0 for this one. places: where they stand among what all layers store. moves: a sequence that has gone on no
    longer has the state of all tokens before; None where the store cannot say.
    """

    store: Store
    device: int
    places: list[int]
    budget: int
    moves: bool | None


@dataclass(frozen=True, slots=True)
class Kept:
    """What a device keeps of sequences. states: of its layers, in their order; None keeps nothing. budget: bytes that
    it may take, or None for all that is needed at most."""

    states: Sequence[StateSpec | None]
    make: StoreFactory
    budget: int | None


class Held(Protocol):
    """A store's part of a step of single rows that is run many times: what a store's `hold(batch, tokens)` returns."""

    def views(self) -> list[Any]:
        """One state per layer of the store's group, for one run."""
        ...

    def fits(self, seqs: Sequence[int]) -> bool:
        """Whether a run can be one row of each of these sequences, of which one may stand there several times."""
        ...

    def fill(self, seqs: Sequence[int], past: Sequence[int]) -> None:
        """The next run is one row of each of these sequences, after `past` cached tokens."""
        ...


@dataclass(frozen=True, slots=True)
class HeldStep:
    """A step of single rows that is run many times: the parts of all groups."""

    parts: list[Held]
    places: list[list[int]]
    layers: Sequence[StateSpec | None]

    def fits(self, seqs: Sequence[int]) -> bool:
        """As of each part."""
        return all(part.fits(seqs) for part in self.parts)

    def fill(self, seqs: Sequence[int], past: Sequence[int]) -> None:
        """As of each part."""
        for part in self.parts:
            part.fill(seqs, past)

    def states(self) -> list[Any]:
        """One state per layer of the model, for one run."""
        return _by_layer(self.layers, zip(self.places, (part.views() for part in self.parts), strict=True))


MIRRORED = ("reserve", "free", "mark", "rewind", "snapshot", "adopt", "trim")
"""Methods that change a Memory: on a model's other devices they are repeated, unless they say that nothing was done."""


class Memory:
    """Room for sequences within `budget` bytes, each named by a number. peak: the most bytes that were taken.

    What changes it takes and returns numbers only, does the same wherever the same was done before, and calls nothing
    else of that kind.

    here: what this device keeps; the budget is cut to what `batch` sequences of `context` tokens need.
    elsewhere: what the devices of other stages keep, by stores that only count. Bytes are those of all together.
    pooled: stores take their memory at once, so that a device's budget is divided among them as a sequence of `context`
    tokens would need it; else they share it.
    """

    def __init__(self, here: Kept, *, batch: int, context: int, pooled: bool, elsewhere: Sequence[Kept] = ()) -> None:
        self.layers, self.peak = here.states, 0
        devices = [_grouped(kept, number, batch, context, pooled) for number, kept in enumerate((here, *elsewhere))]
        self._budgets = [budget for budget, _ in devices]
        self._groups = [group for _, groups in devices for group in groups]
        self._here = devices[0][1]
        self._rooms: dict[int, int] = {}
        self._none = [0] * len(self._groups)

    @property
    def budget(self) -> int:
        """Bytes that may be taken."""
        return sum(self._budgets)

    @property
    def used(self) -> int:
        """Bytes taken now."""
        return sum(group.store.nbytes for group in self._groups)

    @property
    def numbers(self) -> list[int]:
        """The sequences that have room."""
        return [*self._rooms]

    @property
    def reusable(self) -> bool:
        """Whether a sequence can begin where another stands."""
        return bool(self._groups) and all(group.moves is not None for group in self._groups)

    @property
    def moves(self) -> bool:
        """Whether a sequence that has gone on may lack the state of fewer tokens, so that it is worth a copy."""
        return any(group.moves for group in self._groups)

    def cost(self, tokens: int) -> int:
        """Bytes that one sequence of `tokens` tokens takes."""
        return sum(self._group_costs(tokens))

    def longest(self, limit: int) -> int:
        """The most tokens, up to `limit`, that one sequence alone may cache."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            fits = self._fits(self._group_costs(middle), self._none)
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def reserve(self, seq: int, tokens: int) -> bool:
        """Make room for the sequence's first `tokens` tokens; False, and nothing done, when the budget is too small."""
        held = self._rooms.get(seq, 0)
        if tokens <= held:
            return True
        before = self._group_costs(held) if held else self._none
        added = [c - b for c, b in zip(self._group_costs(tokens), before, strict=True)]
        if not self._fits(added, self._taken):
            return False
        self._rooms.setdefault(seq, 0)
        for group in self._groups:
            group.store.grow(seq, _rounded(tokens))
        self._rooms[seq] = _rounded(tokens)
        self.peak = max(self.peak, self.used)
        return True

    def free(self, seq: int) -> None:
        """Give a sequence's room back. Safe at any time, also after an interrupted `reserve` or `adopt`."""
        self._free(seq)

    def could(self, seqs: Sequence[int], tokens: int) -> bool:
        """Whether a sequence of `tokens` tokens would have room beside these ones alone, nothing being shared."""
        costs = [self._group_costs(self._rooms[seq]) for seq in seqs]
        return self._fits(self._group_costs(tokens), [sum(column) for column in zip(self._none, *costs, strict=True)])

    def holds(self, seqs: Sequence[int]) -> int:
        """Bytes that these sequences hold, each counted once."""
        return sum(_reusable(group).holds(seqs) for group in self._groups) if self.reusable else self.used

    def serves(self, held: int, tokens: int) -> bool:
        """Whether another can begin with the first `tokens` tokens of a sequence that stands at `held`."""
        return all(isinstance(g.store, Reusable) and g.store.serves(held, tokens) for g in self._groups)

    def snapshot(self, seq: int, number: int, tokens: int) -> bool:
        """A copy under a new number of what a sequence at `tokens` tokens will lack when it has gone on; False, and
        nothing done, when the budget is too small."""
        return self._adopt([(group, seq, False) for group in self._groups if group.moves], number, tokens, tokens)

    def adopt(self, seq: int, base: int, point: int, tokens: int, room: int, move: bool) -> bool:
        """A new sequence with the first `tokens` tokens of others and room for `room`; False, and nothing done, when
        the budget is too small.

        base: whose tokens they are. point: a sequence that stands at `tokens`, or a snapshot of one: from it comes
        what others lack. move: the base ends, and its memory is handed over where it can be.
        """
        sources = [(g, point, move and point == base) if g.moves else (g, base, move) for g in self._groups]
        done = self._adopt(sources, seq, tokens, _rounded(room))
        if done and move:
            self._free(base)
        return done

    def trim(self, seq: int, tokens: int) -> bool:
        """Give back a sequence's room behind its first `tokens` tokens; False, and nothing done, where layers keep
        what has no tail."""
        if self.moves or not all(_reusable(group).trim(seq, _rounded(tokens)) for group in self._groups):
            return False
        self._rooms[seq] = min(self._rooms[seq], _rounded(tokens))
        return True

    @property
    def back(self) -> int | None:
        """How many rows of a sequence can be taken back at most; None for any number."""
        return min((back for group in self._groups if (back := group.store.back) is not None), default=None)

    def mark(self, seq: int, past: int, rows: int) -> None:
        """Up to `rows` of the sequence's next rows, from `past` on, may be taken back: `rewind` must follow."""
        for group in self._groups:
            group.store.mark(seq, past, rows)

    def rewind(self, seq: int, tokens: int) -> None:
        """The marked sequence is `tokens` long: takes back the rows beyond and ends the mark."""
        for group in self._groups:
            group.store.rewind(seq, tokens)

    def states(self, seqs: Sequence[int], rows: Sequence[int], past: Sequence[int]) -> list[Any]:
        """One state per layer of the model for a step of these sequences."""
        views = ((group.places, group.store.views(seqs, rows, past)) for group in self._here)
        return _by_layer(self.layers, views)

    def hold(self, batch: int, tokens: int) -> HeldStep | None:
        """A step of single rows that is run many times; None where a store keeps nothing at a fixed place."""
        parts: list[Held] = []
        for group in self._here:
            part: Held | None = getattr(group.store, "hold", _nothing)(batch, tokens)
            if part is None:
                return None
            parts.append(part)
        return HeldStep(parts, [group.places for group in self._here], self.layers)

    def close(self) -> None:
        """Let go of all memory."""
        self._groups, self._here = [], []
        self._rooms.clear()

    @property
    def _taken(self) -> list[int]:
        return [group.store.nbytes for group in self._groups]

    def _free(self, seq: int) -> None:
        for group in self._groups:
            group.store.free(seq)
        self._rooms.pop(seq, None)

    def _adopt(self, sources: list[tuple[Group, int, bool]], seq: int, tokens: int, room: int) -> bool:
        """Fills groups of a new sequence, each from its source, to be moved or copied."""
        added = [0] * len(self._groups)
        for group, source, move in sources:
            added[self._groups.index(group)] = _reusable(group).takes(source, tokens, room, move)
        if not self._fits(added, self._taken):
            return False
        self._rooms[seq] = room
        for group, source, move in sources:
            _reusable(group).adopt(source, seq, tokens, room, move)
        self.peak = max(self.peak, self.used)
        return True

    def _group_costs(self, tokens: int) -> list[int]:
        return [group.store.cost(_rounded(tokens)) for group in self._groups]

    def _fits(self, added: list[int], taken: list[int]) -> bool:
        totals = [t + a for t, a in zip(taken, added, strict=True)]
        left = [*self._budgets]
        for total, group in zip(totals, self._groups, strict=True):
            left[group.device] -= total
            if total > group.budget:
                return False
        return min(left) >= 0


def _grouped(kept: Kept, device: int, batch: int, context: int, pooled: bool) -> tuple[int, list[Group]]:
    """A device's budget, and its layers by what they keep."""
    places: dict[StateSpec, list[int]] = {}
    for place, spec in enumerate(stored_parts(kept.states)):
        if spec is not None:
            places.setdefault(spec, []).append(place)
    stores = {spec: kept.make(spec, len(found), None) for spec, found in places.items()}
    costs = {spec: store.cost(_rounded(context)) for spec, store in stores.items()}
    most = batch * sum(costs.values())
    budget = most if kept.budget is None else min(kept.budget, most)
    groups = []
    for spec, found in places.items():
        share = budget * costs[spec] // sum(costs.values()) if pooled else budget
        store = kept.make(spec, len(found), share) if pooled else stores[spec]
        moves = not store.serves(context, 1) if isinstance(store, Reusable) else None
        groups.append(Group(store, device, found, share, moves))
    return budget, groups


def _reusable(group: Group) -> Reusable:
    assert isinstance(group.store, Reusable), "only what can be reused is"
    return group.store


def _by_layer(layers: Sequence[StateSpec | None], groups: Iterable[tuple[list[int], list[Any]]]) -> list[Any]:
    """The states of all groups in the order of the model's layers."""
    found: list[Any] = [None] * len(stored_parts(layers))
    for places, states in groups:
        for place, state in zip(places, states, strict=True):
            found[place] = state
    return by_layer(layers, found)


def shares(budget: int | None, *needs: int) -> tuple[int | None, ...]:
    """A budget divided among caches as what they need at most; no budget leaves all of them without."""
    return tuple(None if budget is None else budget * need // max(sum(needs), 1) for need in needs)


def stores(dtype: torch.dtype, device: torch.device, pooled: bool) -> StoreFactory:
    """What makes stores on a device: pages that sequences share, or slabs."""
    storage = "pages" if pooled else "slab"
    return lambda spec, layers, budget: make_store(spec, layers, dtype, device, storage, budget)


def _nothing(batch: int, tokens: int) -> None:
    """The answer of a store without fixed places."""


def _rounded(tokens: int) -> int:
    return -(-tokens // GRAIN) * GRAIN
