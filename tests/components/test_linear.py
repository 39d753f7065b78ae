"""Products: every way and every layout gives the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from zoo.components import linear, native, tuning
from zoo.components.cache.store import fresh_step
from zoo.components.linear import Linear, pack_weights, product
from zoo.components.matrix import values, weight_bytes

needs_onednn = pytest.mark.skipif(not tuning._has_onednn(), reason="this processor has no oneDNN bfloat16 products")


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small weights go the way of large ones, and packing pays."""
    monkeypatch.setattr(linear, "LARGE", 1)
    monkeypatch.setattr(linear, "packing_pays", lambda: True)


@pytest.fixture(params=[F.linear, tuning.two_rows, tuning.vector])
def way(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("bias", [None, torch.ones(7) / 3])
def test_ways_agree(way: Any, bias: Any, close: Callable[..., None]) -> None:
    x, weight = torch.randn(1, 5), torch.randn(7, 5)
    expected = x @ weight.T + (0 if bias is None else bias)
    close(way(x, weight, bias), expected)


@needs_onednn
@pytest.mark.parametrize("rows", [1, 2, 5, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_weights_give_the_same(
    rows: int, bias: bool, everything_is_large: None, close: Callable[..., None]
) -> None:
    layer = Linear(48, 33, bias=bias)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    layer = layer.bfloat16()
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(rows, 48).bfloat16()
    with torch.inference_mode():
        plain, weight = F.linear(x, layer.weight, layer.bias), layer.weight.clone()
        pack_weights(layer)
        close(layer(x), plain, "bfloat16")
    (packed,) = layer.stored["weight"]
    assert (packed.shape, packed.nbytes) == (weight.shape, weight.nbytes)
    assert torch.equal(layer.values("weight"), weight)
    assert torch.equal(layer.values("weight", (slice(3, 5),)), weight[3:5])
    assert (layer.weight.is_meta, layer.weight.shape, layer.weight.dtype) == (True, weight.shape, weight.dtype)
    assert [name for name, _ in layer.named_parameters()] == names


@needs_onednn
def test_stored_weights_change_by_pieces(everything_is_large: None) -> None:
    layer = Linear(48, 33).bfloat16()
    torch.nn.init.normal_(layer.weight)
    piece, expected = torch.randn(2, 48), layer.weight.detach().clone()
    expected[3:5] = piece
    pack_weights(layer)
    layer.replace("weight", (slice(3, 5),), piece)
    assert torch.equal(layer.values("weight"), expected)
    assert torch.equal(layer.stored["weight"][0].plain(), expected)


@needs_onednn
@pytest.mark.parametrize("tied", [False, True])
def test_packed_models_give_the_same(
    tied: bool,
    small: Callable[..., Any],
    filled: Callable[..., Any],
    everything_is_large: None,
    close: Callable[..., None],
) -> None:
    ffn = {"kind": "moe", "num_experts": 4, "experts_per_token": 2, "expert": {"kind": "gated", "hidden_dim": 24}}
    spec = small(ffn=ffn, tied_embeddings=tied)
    model, packed = filled(spec, torch.bfloat16), filled(spec, torch.bfloat16)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert weight_bytes(packed) == weight_bytes(model)
    pack_weights(packed)
    pack_weights(packed)
    assert {name: p.shape for name, p in packed.named_parameters()} == shapes
    assert weight_bytes(packed) == weight_bytes(model)
    assert packed.layers[0].mixer.qkv.weight.is_meta
    assert packed.layers[0].ffn.experts_down.is_meta
    assert not packed.embed.weight.is_meta
    for name in ("layers.0.mixer.qkv.weight", "layers.0.ffn.experts_down"):
        assert torch.equal(values(packed, name, (2,)), values(model, name, (2,)))
    tokens = torch.tensor([3, 1, 30, 8])
    for rows in ([4], [1, 3], [1, 1, 1, 1]):
        step = fresh_step(spec, rows)
        with torch.inference_mode():
            close(packed(tokens, step), model(tokens, fresh_step(spec, rows)), "bfloat16")


def test_small_and_exact_weights_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "packing_pays", lambda: True)
    layers = [Linear(1024, 512).bfloat16(), Linear(8, 8).bfloat16(), Linear(1024, 512), Linear(1024, 512).half()]
    can = [linear.can_pack(layer.weight) for layer in layers]
    assert can == [True, False, False, False]
    monkeypatch.setattr(linear, "packing_pays", lambda: False)
    pack_weights(layers[0])
    assert not layers[0].stored


@pytest.mark.parametrize("rows", [1, 2])
def test_large_single_rows_take_the_fastest_way(
    rows: int, everything_is_large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Any] = []

    def noted(*args: Any) -> Any:
        used.append(args)
        return tuning.vector(*args)

    monkeypatch.setattr(linear, "row_product", lambda: noted)
    monkeypatch.setattr(native, "runs", lambda *_: False)
    x, weight = torch.randn(rows, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    with torch.no_grad():
        product(x, weight)
    assert len(used) == (1 if rows == 1 else 0)
    product(x, weight)
    product(x.float(), weight.float())
    assert len(used) == (1 if rows == 1 else 0)


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Any, float]]:
    """What a race finds, to be filled by the test."""
    found = dict.fromkeys((tuning.packed_product, tuning.two_rows, F.linear, tuning.vector), 1.0)
    monkeypatch.setattr(tuning, "_race", lambda: found)
    tuning.row_product.cache_clear()
    yield found
    tuning.row_product.cache_clear()


def test_expected_ways_win_close_races(seconds: dict[Any, float]) -> None:
    seconds[F.linear] = 0.8
    assert tuning.row_product() is tuning.two_rows
    assert tuning.packing_pays()


def test_clear_winners_win(seconds: dict[Any, float]) -> None:
    seconds[tuning.vector] = 0.5
    assert tuning.row_product() is tuning.vector
    assert not tuning.packing_pays()


def test_without_onednn_nothing_is_packed(seconds: dict[Any, float]) -> None:
    del seconds[tuning.packed_product]
    assert not tuning.packing_pays()


def test_race_is_run_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "SHAPE", (64, 96))
    race = tuning._race.__wrapped__()
    assert {F.linear, tuning.two_rows, tuning.vector} <= set(race)
    assert all(0 < time < 1 for time in race.values())
