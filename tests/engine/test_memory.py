from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import pytest

from zoo.engine.memory import MIRRORED, Kept, Memory
from zoo.registry.spec import StateSpec


class Bounded(StateSpec):
    """`limit` elements at most."""

    module: ClassVar[str] = "none:none"
    kind: Literal["bounded"] = "bounded"
    limit: int

    def elements(self, tokens: int) -> int:
        return min(tokens, self.limit)


class CountingStore:
    """Bytes = elements x layers; remembers what was asked for."""

    def __init__(self, spec: StateSpec, num_layers: int, budget: int | None) -> None:
        self.spec, self.num_layers, self.budget = spec, num_layers, budget
        self.rooms: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        return sum(map(self.cost, self.rooms.values()))

    def cost(self, tokens: int) -> int:
        assert isinstance(self.spec, Bounded)
        return self.num_layers * self.spec.elements(tokens)

    def grow(self, seq: int, tokens: int) -> None:
        self.rooms[seq] = tokens
        assert self.budget is None or self.nbytes <= self.budget

    def free(self, seq: int) -> None:
        self.rooms.pop(seq, None)

    @property
    def back(self) -> int | None:
        assert isinstance(self.spec, Bounded)
        return self.spec.limit

    def mark(self, seq: int, past: int, rows: int) -> None:
        self.rooms[seq] -= rows

    def rewind(self, seq: int, tokens: int) -> None:
        self.rooms[seq] = tokens

    def views(self, seqs: Sequence[int], rows: Sequence[int], past: Sequence[int]) -> list[Any]:
        return [(self.spec, layer, tuple(seqs)) for layer in range(self.num_layers)]


LONG, SHORT = Bounded(limit=1000), Bounded(limit=32)


def memory(
    budget: int | None, states: Sequence[StateSpec | None] = (LONG, SHORT, None, LONG), **options: Any
) -> Memory:
    here = Kept(states, CountingStore, budget)
    return Memory(here, **{"batch": 4, "context": 160, "pooled": False, **options})


def test_layers_of_one_state_share_a_store_and_views_come_back_in_layer_order() -> None:
    states = memory(None).states([7], [1], [0])
    assert states == [(LONG, 0, (7,)), (SHORT, 0, (7,)), None, (LONG, 1, (7,))]


def test_room_is_reserved_in_grains_and_given_back() -> None:
    held = memory(1000)
    assert held.reserve(1, 17)
    assert held.used == held.cost(32) == 2 * 32 + 32
    assert held.reserve(1, 32)
    assert held.used == held.cost(32)
    assert held.reserve(1, 33)
    assert held.used == 2 * 48 + 32
    held.free(1)
    held.free(1)
    assert (held.used, held.peak) == (0, 128)


def test_a_refused_reservation_changes_nothing() -> None:
    held = memory(200)
    assert held.reserve(1, 32)
    assert not held.reserve(2, 48)
    assert held.used == 96
    assert held.reserve(2, 32)


def test_the_budget_is_what_the_batch_needs_or_less() -> None:
    assert memory(None).budget == 4 * (2 * 160 + 32)
    assert memory(10**9).budget == 4 * (2 * 160 + 32)
    assert memory(50).budget == 50


def test_the_longest_sequence_is_found() -> None:
    held = memory(2 * 64 + 32)
    assert held.longest(160) == 64
    assert held.longest(20) == 20
    assert memory(10).longest(160) == 0


def test_pools_divide_the_budget() -> None:
    held = memory(2 * 160 + 32, pooled=True)
    assert held.longest(160) == 160
    assert held.reserve(1, 160)
    assert not held.reserve(2, 1)
    held.free(1)
    # The window's share alone is what two short sequences exceed.
    assert held.reserve(1, 32)
    assert not held.reserve(2, 32)
    assert held.used == 2 * 32 + 32


def test_marks_reach_every_store() -> None:
    held = memory(None)
    held.reserve(1, 32)
    assert held.back == 32
    assert memory(None, (None,)).back is None
    rooms = [group.store.rooms for group in held._groups]  # type: ignore[attr-defined]
    held.mark(1, 20, 3)
    assert rooms == [{1: 29}, {1: 29}]
    held.rewind(1, 21)
    assert rooms == [{1: 21}, {1: 21}]


def test_a_model_without_states_needs_no_memory() -> None:
    held = memory(None, (None, None))
    assert held.reserve(1, 10**6)
    assert (held.used, held.budget, held.longest(160)) == (0, 0, 160)


def test_an_interrupted_reservation_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    held = memory(None)
    grown: list[int] = []
    plain = CountingStore.grow

    def interrupted(self: CountingStore, seq: int, tokens: int) -> None:
        if grown:
            raise KeyboardInterrupt
        grown.append(seq)
        plain(self, seq, tokens)

    monkeypatch.setattr(CountingStore, "grow", interrupted)
    with pytest.raises(KeyboardInterrupt):
        held.reserve(1, 16)
    held.free(1)
    assert held.used == 0


READS = {"cost", "longest", "could", "holds", "serves", "states", "hold"}
"""Methods of Memory that change nothing that other ranks hold; `close` is each rank's own."""


def test_every_method_that_changes_the_cache_is_mirrored_on_other_ranks() -> None:
    """A method that is in neither list would leave the other ranks' caches behind."""
    methods = {name for name, value in vars(Memory).items() if callable(value) and not name.startswith("_")}
    assert methods == {*MIRRORED} | READS | {"close"}
