"""Stores: what they allocate is what they announce, and it comes back."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from zoo.components.cache.code import RowCode
from zoo.components.cache.kv import KVStore, _spans
from zoo.components.cache.pages import PAGE, HeldPages, Pages
from zoo.components.cache.spec import FullCacheSpec, WindowCacheSpec
from zoo.components.cache.store import make_store
from zoo.registry.errors import CapacityError

FULL = FullCacheSpec(num_kv_heads=2, head_dim=6)
TOKEN = 2 * 2 * 6 * 3 * 4  # bytes of one token in three layers of float32


def _ring(window: int) -> WindowCacheSpec:
    return WindowCacheSpec(num_kv_heads=2, head_dim=6, window=window)


def _store(spec: Any, storage: str, budget: int | None = None) -> KVStore:
    store = make_store(spec, 3, torch.float32, "cpu", storage, budget)
    assert isinstance(store, KVStore)
    return store


def _held(store: KVStore) -> int:
    """Bytes of the slabs' own memory."""
    return sum(slab.untyped_storage().nbytes() for slabs in store.storage._slabs.values() for slab in slabs)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("spec", "storage", "tokens", "slots"),
    [
        (FULL, "slab", 0, 0),
        (FULL, "slab", 1, 256),
        (FULL, "slab", 256, 256),
        (FULL, "slab", 257, 512),
        (_ring(7), "slab", 1, 7),
        (_ring(300), "slab", 5, 256),
        (_ring(300), "slab", 257, 300),
        (_ring(300), "slab", 100_000, 300),
        (FULL, "pages", 1, 16),
        (FULL, "pages", 17, 32),
        (_ring(40), "pages", 100_000, 48),
    ],
)
def test_cost_is_what_is_allocated(spec: Any, storage: str, tokens: int, slots: int) -> None:
    store = _store(spec, storage)
    assert store.cost(tokens) == slots * TOKEN
    store.grow(1, tokens)
    assert store.nbytes == slots * TOKEN
    if storage == "slab":
        assert _held(store) == slots * TOKEN


@pytest.mark.parametrize("storage", ["slab", "pages"])
def test_memory_comes_back(storage: str) -> None:
    store = _store(FULL, storage)
    for seq, tokens in ((1, 300), (2, 5)):
        store.grow(seq, tokens)
    store.free(1)
    assert store.nbytes == store.cost(5)
    store.free(2)
    assert store.nbytes == 0
    if storage == "slab":
        assert _held(store) == 0


def test_pages_are_used_again() -> None:
    store = _store(FULL, "pages", 4 * 16 * TOKEN)
    for seq in range(20):
        store.grow(seq, 64)
        store.free(seq)
    store.grow(1, 32)
    store.grow(2, 32)
    assert store.nbytes == 4 * 16 * TOKEN


@pytest.mark.parametrize(("storage", "unit"), [("slab", 256), ("pages", 16)])
def test_budget_is_kept(storage: str, unit: int) -> None:
    store = _store(FULL, storage, 3 * unit * TOKEN)
    store.grow(1, 2 * unit)
    with pytest.raises(CapacityError, match="the cache is full"):
        store.grow(2, 2 * unit)
    assert store.nbytes == 2 * unit * TOKEN
    store.grow(2, unit)
    store.free(1)
    store.grow(2, 3 * unit)
    assert store.nbytes == 3 * unit * TOKEN


@pytest.mark.parametrize("storage", ["slab", "pages"])
def test_growth_keeps_what_was_written(storage: str) -> None:
    store = _store(FULL, storage)
    k, v = torch.randn(2, 5, 2, 6).unbind()
    store.grow(1, 5)
    store.storage.write(2, 1, 0, (k, v), {})
    for tokens in (40, 300, 1000):
        store.grow(1, tokens)
        store.grow(2, tokens)
    read_k, read_v = store.storage.read(2, 1, 0, 5, {})
    assert torch.equal(read_k, k.transpose(0, 1))
    assert torch.equal(read_v, v.transpose(0, 1))


def test_shrinking_is_no_growth() -> None:
    store = _store(FULL, "slab")
    store.grow(1, 300)
    store.grow(1, 10)
    assert store.nbytes == 512 * TOKEN


def test_ring_needs_no_more_once_it_is_full() -> None:
    store = _store(_ring(30), "slab")
    store.grow(1, 30)
    held = store.storage._slabs[1][0].data_ptr()  # type: ignore[attr-defined]
    for tokens in range(31, 2000, 100):
        store.grow(1, tokens)
    assert store.storage._slabs[1][0].data_ptr() == held  # type: ignore[attr-defined]


@pytest.mark.parametrize("ring", [1, 2, 5])
def test_spans_are_the_slots_of_positions(ring: int) -> None:
    for start in range(12):
        for stop in range(start, min(start + ring, 12) + 1):
            slots = [slot for a, b in _spans(start, stop, ring) for slot in range(a, b)]
            assert slots == [position % ring for position in range(start, stop)]


def test_the_device_decides_the_storage() -> None:
    from zoo.components.cache.pages import Pages
    from zoo.components.cache.slab import Slabs

    assert isinstance(_store(FULL, "auto").storage, Slabs)
    meta = make_store(FULL, 1, torch.float32, "meta")
    assert isinstance(meta, KVStore)
    assert isinstance(meta.storage, Pages)


# --- rows that are taken back ----------------------------------------------------------------------------------------


def _attended(store: KVStore, seqs: list[int], past: list[int], rows: torch.Tensor) -> torch.Tensor:
    """Layer 1's attention of single rows (B, d), the keys and values made of the rows themselves."""
    heads_BGd = rows.unsqueeze(1) * torch.tensor([1.0, -0.5])[:, None]
    view = store.views(seqs, [1] * len(seqs), past)[1]
    attended: torch.Tensor = view.attend(heads_BGd, heads_BGd.flip(2), heads_BGd, scale=0.7, window=store.ring)
    return attended


@pytest.mark.parametrize("storage", ["slab", "pages"])
@pytest.mark.parametrize("spec", [FULL, _ring(5), _ring(20)], ids=["full", "ring of 5", "ring of 20"])
def test_rows_taken_back_leave_no_trace(spec: Any, storage: str) -> None:
    """Two sequences with different numbers of guesses, of which some, none or all hold, before and after the border."""
    store, plain = _store(spec, storage, 8 * 256 * TOKEN), _store(spec, storage, 8 * 256 * TOKEN)
    true = torch.randn(2, 40, 6)
    for seq in (1, 2):
        store.grow(seq, 40)
        plain.grow(seq, 40)
    expected = [[_attended(plain, [s], [p], true[s - 1, p : p + 1]) for p in range(34)] for s in (1, 2)]
    past, counts = [0, 0], torch.Generator().manual_seed(1)
    while max(past) < 28:
        rows = (1 + torch.randint(5, (2,), generator=counts)).tolist()
        right = [int(torch.randint(count, (1,), generator=counts)) for count in rows]
        order = sorted((wave, i) for i in (0, 1) for wave in range(rows[i]))
        for i in (0, 1):
            store.mark(i + 1, past[i], rows[i])
        places = [past[i] + wave for wave, i in order]
        inputs = [true[i, past[i] + wave] if wave <= right[i] else torch.randn(6) for wave, i in order]
        found = _attended(store, [i + 1 for _, i in order], places, torch.stack(inputs))
        for (wave, i), place, row in zip(order, places, found, strict=True):
            if wave <= right[i]:
                torch.testing.assert_close(row, expected[i][place][0])
        for i in (0, 1):
            past[i] += 1 + right[i]
            store.rewind(i + 1, past[i])
        assert not store._covered


def test_a_ring_takes_back_no_more_rows_than_it_has_slots() -> None:
    store = _store(_ring(4), "slab")
    assert (store.back, _store(FULL, "slab").back) == (4, None)
    store.grow(1, 20)
    store.mark(1, 2, 2)
    assert not store._covered, "nothing is overwritten yet"
    with pytest.raises(AssertionError, match="no more rows"):
        store.mark(1, 2, 5)
    store.mark(1, 7, 4)
    assert store._covered
    store.free(1)
    assert not store._covered


@pytest.mark.parametrize("storage", ["slab", "pages"])
@pytest.mark.parametrize("cache_dtype", ["int8", "fp8"])
def test_codes_are_put_back_as_they_were(cache_dtype: Any, storage: str) -> None:
    store = _store(_ring(5).model_copy(update={"cache_dtype": cache_dtype}), storage, 8 * 256 * TOKEN)
    store.grow(1, 20)
    for past in range(9):
        _attended(store, [1], [past], torch.randn(1, 6))
    before = store.storage.take(1, [0, 1, 2, 3, 4])
    store.mark(1, 9, 3)
    _attended(store, [1] * 3, [9, 10, 11], torch.randn(3, 6))
    assert not torch.equal(store.storage.take(1, [0, 1, 2, 3, 4]), before)
    store.rewind(1, 9)
    assert torch.equal(store.storage.take(1, [0, 1, 2, 3, 4]), before)


def _filled(spec: Any, storage: str, tokens: int) -> KVStore:
    """A store with sequence 1, whose slots hold their own numbers."""
    store = _store(spec, storage)
    store.grow(1, tokens)
    slots = store._slots(tokens)
    numbers_T11 = torch.arange(slots).float().view(-1, 1, 1).expand(slots, 2, 6)
    for layer in range(3):
        store.storage.write(layer, 1, 0, (numbers_T11 + layer, numbers_T11 - layer), {})
    return store


def _numbers(store: KVStore, seq: int, slots: int) -> list[float]:
    k, v = store.storage.read(2, seq, 0, slots, {})
    torch.testing.assert_close(k - 2, v + 2, rtol=0.01, atol=0.05)
    return [float(number) for number in k[0, :, 0] - 2]


@pytest.mark.parametrize("move", [False, True])
@pytest.mark.parametrize(("tokens", "room"), [(32, 32), (37, 40), (300, 400), (5, 700), (256, 256)])
@pytest.mark.parametrize(
    "spec", [FULL, FULL.model_copy(update={"cache_dtype": "int8"}), _ring(21)], ids=["full", "coded", "ring"]
)
@pytest.mark.parametrize("storage", ["slab", "pages"])
def test_a_sequence_begins_where_another_stands(spec: Any, storage: str, tokens: int, room: int, move: bool) -> None:
    store = _filled(spec, storage, 310)
    slots = store._slots(tokens)
    before, takes = store.nbytes, store.takes(1, tokens, room, move)
    store.adopt(1, 2, tokens, room, move)
    assert store.nbytes == before + takes == store.holds([1, 2])
    assert store.holds([2]) == store.cost(room)
    expected = [*range(slots)]
    assert _numbers(store, 2, slots) == pytest.approx(expected, rel=0.01, abs=0.05)
    if not move:
        # Neither sees what the other writes from here on.
        new_TGd = torch.full((1, 2, 6), -7.0)
        for seq, slot in ((1, store._slots(310) - 1), (2, slots - 1 if store.ring else slots)):
            store.grow(seq, slot + 1)
            for layer in range(3):
                store.storage.write(layer, seq, slot, (new_TGd + layer, new_TGd - layer), {})
        assert _numbers(store, 1, slots - 1) == pytest.approx(expected[:-1], rel=0.01, abs=0.05)
        assert _numbers(store, 2, slots - 1) == pytest.approx(expected[:-1], rel=0.01, abs=0.05)
    store.free(1)
    store.free(2)
    assert store.nbytes == 0


def test_only_pages_can_be_trimmed() -> None:
    assert not _filled(FULL, "slab", 310).trim(1, 100)
    store = _filled(FULL, "pages", 310)
    store.adopt(1, 2, 64, 64, False)
    assert store.trim(1, 40)
    assert store.holds([1]) == store.cost(40)
    assert store.nbytes == store.cost(64)
    assert _numbers(store, 1, 40) == [*range(40)]


def test_where_a_sequence_can_be_gone_on_from() -> None:
    full, ring = _store(FULL, "slab"), _store(_ring(7), "slab")
    assert [n for n in range(1, 20) if full.serves(19, n)] == [*range(1, 20)]
    assert [n for n in range(1, 8) if ring.serves(7, n)] == [*range(1, 8)]
    # The slot that token 12 took had token 5's numbers, which none after it sees.
    assert [n for n in range(1, 14) if ring.serves(13, n)] == [12, 13]


def test_held_places_follow_every_change_of_tables() -> None:
    """Random growth, sharing, trimming and ends: what is written anew is what a step from nothing would get."""
    draw, batch, count = random.Random(1), 4, 5
    pages = Pages((1, 2, 1), RowCode(None, (4,), torch.float32), torch.device("cpu"), None, None)
    held, seen = HeldPages(pages, batch, count), set()
    slots: dict[int, int] = {}
    for number in range(300):
        seq = draw.choice([*slots, number])
        change = draw.randrange(4) if seq in slots else 0
        if change == 0 and slots.get(seq, 0) < count * PAGE:
            slots[seq] = slots.get(seq, 0) + 1 + draw.randrange(min(30, count * PAGE - slots.get(seq, 0)))
            pages.grow(seq, slots[seq])
        elif change == 1:
            slots[seq] = 1 + draw.randrange(slots[seq])
            pages.trim(seq, slots[seq])
        elif change == 2:
            slots[1000 + number] = 1 + draw.randrange(slots[seq])
            pages.adopt(seq, 1000 + number, slots[1000 + number], slots[1000 + number], move=False)
        elif change == 3:
            pages.free(seq)
            del slots[seq]
        seqs = draw.sample([*slots], min(len(slots), draw.randrange(batch + 1)))
        last, filled = [slots[seq] - 1 for seq in seqs], [slots[seq] for seq in seqs]
        held.fill(seqs, last, filled)
        tables = [pages.table(seq) for seq in seqs]
        spare = [0] * (batch - len(seqs))
        assert held.rows.places[0].tolist() == [t[at // PAGE] for t, at in zip(tables, last, strict=True)] + spare
        assert held.rows.places[1].tolist() == [at % PAGE for at in last] + spare
        assert held.rows.filled_B.tolist() == [*filled, *[1] * len(spare)]
        assert held.rows.tables_BP.tolist() == [
            (table + [0] * count)[:count] for table in [*tables, *[[] for _ in spare]]
        ]
        seen.add((change, len(seqs)))
    assert len(seen) > 12, "every change must have been met with every batch"


def _answers(store: KVStore, seqs: list[int], past: list[int], rows: list[int], spec: Any) -> torch.Tensor:
    """What the layers give for rows of known numbers."""
    draw = torch.Generator().manual_seed(sum(past) + sum(rows))
    heads, width, window = spec.num_kv_heads, spec.head_dim, getattr(spec, "window", None)
    q_THd = torch.randn(sum(rows), 2 * heads, width, generator=draw).to(store.storage.code.dtype)
    k_TGd, v_TGd = torch.randn(2, sum(rows), heads, width, generator=draw).to(q_THd)
    found = [view.attend(q_THd, k_TGd, v_TGd, scale=0.4, window=window) for view in store.views(seqs, rows, past)]
    return torch.stack(found)


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("coded", [None, "int8", "fp8"])
@pytest.mark.parametrize("window", [None, 7, 40])
@pytest.mark.parametrize("storage", ["slab", "pages"])
def test_what_was_no_number_reaches_no_other(
    storage: str, window: int | None, coded: str | None, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences of several lengths stand in memory whose every byte is 255: no number in any type, nor any scale."""
    monkeypatch.setenv("ZOO_ATTENTION", kernel)
    own: dict[str, Any] = {"num_kv_heads": 2, "head_dim": 32, "cache_dtype": coded}
    spec = FullCacheSpec(**own) if window is None else WindowCacheSpec(**own, window=window)
    found = []
    for spoilt in (False, True):
        store = make_store(spec, 3, torch.bfloat16, "cpu", storage, 1 << 20)
        assert isinstance(store, KVStore)
        for seq, tokens in ((1, 5), (2, 19)):
            store.grow(seq, tokens + 3)
        slots = store.storage
        slabs = [] if isinstance(slots, Pages) else [*slots._slabs.values()]  # type: ignore[attr-defined]
        pools = [slots.pool(layer) for layer in range(3)] if isinstance(slots, Pages) else []
        memory = [*pools, *(piece for own_slabs in slabs for piece in own_slabs)]
        for piece in memory:
            piece.view(torch.uint8).fill_(255 if spoilt else 0)
        for seq, tokens in ((1, 5), (2, 19)):
            _answers(store, [seq], [0], [tokens], spec)
        parts = [_answers(store, [1, 2], [5 + more, 19 + more], [1, 1], spec) for more in range(3)]
        found.append(torch.stack(parts))
    assert found[0].isfinite().all()
    assert torch.equal(found[0], found[1])
