"""Products: every way and every layout gives the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zoo.components import native
from zoo.components.cache.store import fresh_step
from zoo.components.linear import Linear, fastest
from zoo.components.matrix import Holder, values, weight_bytes
from zoo.components.native import panels

needs_panels = pytest.mark.skipif(native.missing() is not None, reason=f"no native kernels: {native.missing()}")


def pack(module: nn.Module) -> None:
    """Stores all weights as loading does."""
    for holder in module.modules():
        if isinstance(holder, Holder):
            for name in holder.MATRICES:
                if making := fastest(holder.get_parameter(name)):
                    holder.store(name, making)


@needs_panels
@pytest.mark.parametrize("rows", [1, 2, 5, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_weights_give_the_same(rows: int, bias: bool, close: Callable[..., None]) -> None:
    layer = Linear(48, 32, bias=bias)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    layer = layer.bfloat16()
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(rows, 48).bfloat16()
    with torch.inference_mode():
        plain, weight = F.linear(x, layer.weight, layer.bias), layer.weight.clone()
        pack(layer)
        close(layer(x), plain, "bfloat16")
    (packed,) = layer.stored["weight"]
    assert packed.shape == weight.shape
    assert packed.nbytes == weight.nbytes if isinstance(packed, panels.Panels) else packed.nbytes < weight.nbytes
    assert torch.equal(layer.values("weight"), weight)
    assert torch.equal(layer.values("weight", (slice(3, 5),)), weight[3:5])
    assert (layer.weight.is_meta, layer.weight.shape, layer.weight.dtype) == (True, weight.shape, weight.dtype)
    assert [name for name, _ in layer.named_parameters()] == names


@needs_panels
def test_stored_weights_change_by_pieces() -> None:
    layer = Linear(48, 32).bfloat16()
    torch.nn.init.normal_(layer.weight)
    piece, expected = torch.randn(2, 48), layer.weight.detach().clone()
    expected[3:5] = piece
    pack(layer)
    layer.replace("weight", (slice(3, 5),), piece)
    assert torch.equal(layer.values("weight"), expected)
    assert torch.equal(layer.stored["weight"][0].plain(), expected)


@needs_panels
@pytest.mark.parametrize("tied", [False, True])
def test_packed_models_give_the_same(
    tied: bool,
    small: Callable[..., Any],
    filled: Callable[..., Any],
    close: Callable[..., None],
) -> None:
    ffn = {"kind": "moe", "num_experts": 4, "experts_per_token": 2, "expert": {"kind": "gated", "hidden_dim": 24}}
    spec = small(ffn=ffn, tied_embeddings=tied)
    model, packed = filled(spec, torch.bfloat16), filled(spec, torch.bfloat16)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    pack(packed)
    assert {name: p.shape for name, p in packed.named_parameters()} == shapes
    assert (weight_bytes(packed) < weight_bytes(model)) == panels.packs()
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


@needs_panels
def test_what_panels_cannot_hold_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [Linear(12, 48).bfloat16(), Linear(12, 48), Linear(12, 48).half()]
    layers += [Linear(13, 48).bfloat16(), Linear(12, 47).bfloat16(), Linear(12, 15).bfloat16()]
    for layer in layers:
        pack(layer)
    assert [bool(layer.stored) for layer in layers] == [True, False, False, False, True, False]
    monkeypatch.setattr(native, "missing", lambda: "ZOO_NATIVE=off")
    layer = Linear(12, 48).bfloat16()
    pack(layer)
    assert not layer.stored
