"""Stores: what they allocate is what they announce, and it comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from zoo.components.cache.kv import KVStore, _spans
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
