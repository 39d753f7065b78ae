"""State-space mixers by the native kernels: against their formulas, in chunks, among others, and in the store."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.components import native
from zoo.components.cache.recurrent import RecurrentStore
from zoo.components.cache.spec import RecurrentCacheSpec
from zoo.components.mamba import mamba1, mamba2
from zoo.components.mamba.convolution import CausalConv
from zoo.components.native import recurrent

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"no native kernels: {native.missing()}")

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
Rows = tuple[Tensor, ...]


def drawn(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size).to(dtype)


def convolution(dtype: torch.dtype, channels: int, taps: int) -> tuple[Any, Callable[[int], Rows], Tensor]:
    conv = CausalConv(channels, taps, bias=taps != 3)
    for parameter in conv.parameters():
        torch.nn.init.normal_(parameter)
    wide = channels + 5
    return (
        conv.to(dtype),
        lambda rows: (drawn(rows, wide, dtype=dtype)[:, 2 : 2 + channels],),
        drawn(2, taps - 1, channels, dtype=dtype),
    )


def heads(
    dtype: torch.dtype, heads: int, width: int, groups: int, size: int
) -> tuple[Any, Callable[[int], Rows], Tensor]:
    def rows(count: int) -> Rows:
        x, dt = drawn(count, heads * width + 3, dtype=dtype)[:, : heads * width], 3 * drawn(count, heads, dtype=dtype)
        b, c = (drawn(count, groups, size, dtype=dtype) for _ in range(2))
        return x.unflatten(1, (heads, width)), dt, b, c

    return mamba2.Scan(drawn(heads), drawn(heads), drawn(heads)), rows, drawn(2, heads * width, size)


def channels(dtype: torch.dtype, width: int, size: int) -> tuple[Any, Callable[[int], Rows], Tensor]:
    def rows(count: int) -> Rows:
        return tuple(drawn(count, n, dtype=dtype) for n in (width, width, size, size, width))

    return mamba1.Scan(drawn(width, size), drawn(width), drawn(width)), rows, drawn(2, width, size)


KINDS: dict[str, Callable[[torch.dtype], tuple[Any, Callable[[int], Rows], Tensor]]] = {
    "convolution": lambda dtype: convolution(dtype, 150, 4),
    "three taps": lambda dtype: convolution(dtype, 37, 3),
    "one tap": lambda dtype: convolution(dtype, 37, 1),
    "heads": lambda dtype: heads(dtype, 6, 21, 2, 40),
    "heads of 16": lambda dtype: heads(dtype, 2, 71, 1, 16),
    "heads of 64": lambda dtype: heads(dtype, 3, 22, 3, 64),
    "heads of 128": lambda dtype: heads(dtype, 2, 64, 1, 128),
    "heads of 256": lambda dtype: heads(dtype, 2, 17, 1, 256),
    "channels": lambda dtype: channels(dtype, 37, 16),
    "odd channels": lambda dtype: channels(dtype, 20, 21),
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(3)


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


def batched(rows: Rows, count: int) -> Rows:
    return tuple(value.unflatten(0, (-1, count)) for value in rows)


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("begins", [True, False], ids=["from nothing", "from a state"])
def test_equals_the_formula(kind: str, dtype: torch.dtype, begins: bool, close: Callable[..., None]) -> None:
    function, make, states = KINDS[kind](dtype)
    rows, before = batched(make(2 * 35), 35), None if begins else states
    assert function.moves(*rows)
    kept = states.clone()
    (y, left), (expected, expected_left) = function(before, *rows), function.reference(before, *rows)
    close(y, expected, "same" if y.dtype is torch.float32 else "bfloat16")
    assert y.dtype is expected.dtype
    if states.numel():
        close(left, expected_left, "same")
    assert torch.equal(states, kept)


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_beside_others_equal_single_rows_bit_by_bit(kind: str, dtype: torch.dtype) -> None:
    function, make, states = KINDS[kind](dtype)
    rows, threads = make(19), torch.get_num_threads()
    single, state = [], states[:1]
    for t in range(19):
        y, state = function(state, *(value[t : t + 1].unsqueeze(0) for value in rows))
        single.append(y[0])
    others = make(9)
    torch.set_num_threads(3)
    found, kept = [], states.clone()
    for count, first in ((7, 0), (1, 7), (11, 8)):
        step = [torch.cat((other, value[first : first + count])) for other, value in zip(others, rows, strict=True)]
        places = [[kept[1].data_ptr(), 0, 9, 1], [kept[0].data_ptr(), 9, count, 0]]
        found.append(function.move(recurrent.Places(torch.tensor(places)), *step)[9:])
    torch.set_num_threads(threads)
    assert torch.equal(torch.cat(found), torch.cat(single))
    assert torch.equal(kept[:1], state)


@DTYPES
@pytest.mark.parametrize("storage", ["slab", "pages"])
@pytest.mark.parametrize("layer", [0, 2])
def test_states_move_on_where_they_lie(dtype: torch.dtype, storage: str, layer: int) -> None:
    """Sequences with one row and several, that begin and go on: each as alone, in its own place of every layer."""
    spec = RecurrentCacheSpec(conv_channels=50, conv_size=4, inner_dim=6 * 8, state_size=5)
    store = RecurrentStore(spec, 3, dtype, torch.device("cpu"), storage, 10**6)
    lengths, past = [4, 1, 1], [0, 0, 0]
    parts: list[tuple[Any, Any]] = [("conv", convolution(dtype, 50, 4)), ("ssm", heads(dtype, 6, 8, 2, 5))]
    alone: dict[tuple[str, int], Any] = {}
    for seq in range(3):
        store.grow(seq, 9)
    for lengths in ([4, 1, 1], [1, 1, 3], [2, 1, 1]):
        view = store.views(range(3), lengths, past)[layer]
        for piece, (function, make, _) in parts:
            rows, moved = make(sum(lengths)), []
            found = view.advance(piece, function, *rows)
            for seq, (start, count) in enumerate(zip(accumulate(lengths, initial=0), lengths, strict=False)):
                cut = (value[start : start + count].unsqueeze(0) for value in rows)
                y, alone[piece, seq] = function(alone.get((piece, seq)), *cut)
                moved.append(y[0])
                assert torch.equal(store._held[seq][piece][layer], alone[piece, seq][0])
            assert torch.equal(found, torch.cat(moved))
        past = [before + count for before, count in zip(past, lengths, strict=True)]


def test_no_copies_of_states_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps without marks call the kernels with the store's own memory."""
    spec = RecurrentCacheSpec(conv_channels=50, conv_size=4, inner_dim=6 * 8, state_size=5)
    store = RecurrentStore(spec, 1, torch.bfloat16, torch.device("cpu"), "slab", None)
    store.grow(0, 4)
    function, make, _ = heads(torch.bfloat16, 6, 8, 2, 5)
    seen: list[int] = []
    real = recurrent.ssd

    def noted(places: recurrent.Places, *rest: Any) -> Tensor:
        seen.extend(places.numbers_B4[:, 0].tolist())
        return real(places, *rest)

    monkeypatch.setattr(recurrent, "ssd", noted)
    for past in range(2):
        store.views([0], [1], [past])[0].advance("ssm", function, *make(1))
    assert seen == [store._held[0]["ssm"].data_ptr()] * 2


@DTYPES
def test_gated_norm_equals_the_formula(dtype: torch.dtype, close: Callable[..., None]) -> None:
    norm = mamba2.GatedNorm(3 * 37, 3, 0.1)
    torch.nn.init.normal_(norm.weight)
    norm = norm.to(dtype)
    y, z = drawn(5, 111), drawn(5, 140, dtype=dtype)[:, 7:118] * 3
    expected = norm.reference(y, z)
    alone = torch.cat([norm(row.clone().unsqueeze(0), gate.unsqueeze(0)) for row, gate in zip(y, z, strict=True)])
    found = norm(y.clone(), z)
    close(found, expected, "same" if dtype is torch.float32 else "bfloat16")
    assert torch.equal(found, alone)


def test_extremes_are_those_of_the_formula(close: Callable[..., None]) -> None:
    """Steps of nearly nothing, and ones that forget all; gates far out."""
    function, make, states = channels(torch.float32, 20, 16)
    x, dt, b, c, z = (value.unsqueeze(0) for value in make(6))
    dt[0, :, :4] = torch.tensor([-80.0, -20.0, 30.0, 500.0])
    z[0, :, 4:6] = torch.tensor([-200.0, 200.0])
    for found, expected in zip(
        function(states[:1], x, dt, b, c, z), function.reference(states[:1], x, dt, b, c, z), strict=True
    ):
        close(found, expected, "same")
        assert found.isfinite().all()


def test_what_the_kernels_do_not_take() -> None:
    function, make, _ = heads(torch.bfloat16, 6, 8, 2, 5)
    rows = make(3)
    assert function.moves(*rows)
    assert not function.moves(*(value.half() for value in rows))
    assert not function.moves(rows[0].float(), *rows[1:])
    assert not heads(torch.bfloat16, 2, 8, 2, recurrent.LARGEST + 1)[0].moves(
        *heads(torch.bfloat16, 2, 8, 2, recurrent.LARGEST + 1)[1](2)
    )
    function.d_H = function.d_H.bfloat16()
    assert not function.moves(*rows)
    conv, make, _ = convolution(torch.bfloat16, 8, recurrent.MOST_TAPS + 1)
    assert not conv.moves(*make(2))
    with torch.inference_mode(False), torch.enable_grad():
        assert not convolution(torch.bfloat16, 8, 4)[0].moves(torch.randn(2, 8).bfloat16())


def test_absence_leaves_the_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    function, make, states = heads(torch.float32, 6, 8, 2, 5)
    rows = batched(make(4), 4)
    monkeypatch.setattr(native, "missing", lambda: "ZOO_NATIVE=off")
    for found, expected in zip(function(states[:1], *rows), function.reference(states[:1], *rows), strict=True):
        assert torch.equal(found, expected)
