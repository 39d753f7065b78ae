"""Blocks that several layers use: by formula, counted once, one state for each use."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import zoo
from zoo.components.cache.spec import FullCacheSpec, JointStateSpec, RecurrentCacheSpec
from zoo.components.cache.store import by_layer, fresh_step, stored_parts
from zoo.registry.errors import CardError
from zoo.testing import check_component

ATTENTION: dict[str, Any] = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "rope": None}
GATED: dict[str, Any] = {"kind": "gated", "hidden_dim": 24}
MAMBA2: dict[str, Any] = {
    "kind": "mamba2",
    "num_heads": 4,
    "head_dim": 6,
    "num_groups": 2,
    "state_size": 5,
    "conv_size": 4,
    "norm_eps": 1e-5,
}
SHARED: dict[str, Any] = {"kind": "transformer", "mixer": ATTENTION, "ffn": GATED, "adapter_rank": 3}
ADAPTED = SHARED | {"adapt_mixer": True}


def using(*numbers: int) -> list[dict[str, Any]]:
    blocks = [{"kind": "sharing", "number": number, "mixer": MAMBA2} for number in numbers]
    return [{"mixer": MAMBA2, "ffn": None}, *blocks, {"mixer": None, "ffn": GATED}]


def card(node: Any, shared: Any) -> dict[str, Any]:
    model = {"dim": 16, "vocab_size": 37, "norm": {"kind": "rms", "eps": 1e-5}, "shared": shared, "layers": node}
    return {"name": "sharing", "context_length": 64, "model": model}


def test_block_is_its_formula(small: Any, filled: Any, close: Any) -> None:
    spec = small(shared=[ADAPTED], layers=using(0, 0))
    model = filled(spec)
    step, x_TD = fresh_step(spec, [5]), torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    step.memo["embeddings"] = embeddings_TD = 2 * x_TD.flip(0)
    holder, block = model.layers[1], model.layers[2]
    adapter = holder.shared.adapters["1"]
    wide = holder.shared.mixer_norm(torch.cat((x_TD, embeddings_TD), dim=1))
    added = zip((adapter.q_up, adapter.k_up, adapter.v_up), adapter.qkv_down(wide).split(3, dim=1), strict=True)
    qkv_TA = holder.shared.mixer.qkv(wide) + torch.cat([up(down) for up, down in added], dim=1)
    q, k, v = (part.unflatten(1, (-1, 6)) for part in qkv_TA.split((24, 12, 12), dim=1))
    mixed = holder.shared.ffn_norm(
        holder.shared.mixer.o(step.states[2][0].attend(q, k, v, scale=6**-0.5, window=None).flatten(1))
    )
    gate, up = (holder.shared.ffn.gate_up(mixed) + adapter.gate_up_up(adapter.gate_up_down(mixed))).chunk(2, dim=1)
    given = block.projection(holder.shared.ffn.down(torch.nn.functional.silu(gate) * up))
    expected = x_TD + block.mixer(block.mixer_norm(x_TD + given), step, step.states[2][1])
    close(block(x_TD, step, step.states[2]), expected)


def test_parameters_stand_once_with_the_first_use(small: Any) -> None:
    spec = small(shared=[SHARED, ADAPTED], layers=using(1, 0, 1, 0, 1))
    names = spec.all_parameters()
    assert {name.split(".")[1] for name in names if ".shared." in name} == {"1", "2"}
    assert "layers.1.shared.adapters.4.q_up.weight" in names
    assert "layers.2.shared.adapters.3.gate_up_up.weight" in names
    assert "layers.2.shared.adapters.3.q_up.weight" not in names
    assert "layers.1.shared.adapters.1.q_up.weight" not in names
    assert all(f"layers.{i}.projection.weight" in names for i in range(1, 6))
    tensors = {tensor.name: tensor.shape for tensor in spec.tensors()}
    assert tensors["layers.1.shared.adapters.0.k_down.weight"] == (3, 32)
    assert tensors["layers.1.shared.mixer.o.weight"] == (16, 24)


def test_operations_are_counted_for_each_use(small: Any) -> None:
    def flops(*numbers: int) -> float:
        return sum((spec.flops(10) for _, spec in small(shared=[SHARED], layers=using(*numbers)).walk()), 0.0)

    per_use = 2 * (48 * 32 + 16 * 24 + 3 * 24 * 16 + 3 * 16 + 3 * 48) + 4 * 4 * 6 * 10
    again = flops(0, 0, 0) - flops(0, 0)
    assert again == flops(0, 0) - flops(0)
    mixer = sum(spec.flops(10) for _, spec in small(layers=[{"mixer": MAMBA2, "ffn": None}]).layers[0].walk())
    assert again == per_use + mixer + 2 * 16 * 16


def test_each_use_keeps_a_state_of_its_own(small: Any) -> None:
    spec = small(shared=[SHARED], layers=using(0, 0))
    recurrent = RecurrentCacheSpec(conv_channels=44, conv_size=4, inner_dim=24, state_size=5)
    joint = JointStateSpec(states=(FullCacheSpec(num_kv_heads=2, head_dim=6), recurrent))
    assert spec.states() == (recurrent, joint, joint, None)
    assert joint.elements(7) == 7 * 24 + recurrent.elements(7)
    assert joint.nbytes(7, 2) == 7 * 48 + recurrent.nbytes(7, 2)
    parts = stored_parts(spec.states())
    assert parts == [recurrent, *joint.states, *joint.states, None]
    assert by_layer(spec.states(), range(6)) == [0, (1, 2), (3, 4), 5]


@pytest.mark.parametrize("shared", [SHARED, ADAPTED | {"mixer": ATTENTION | {"window": 5, "rope": {"theta": 100.0}}}])
def test_every_promise_is_kept(shared: dict[str, Any]) -> None:
    check_component("shared", shared, card=card(using(0, 0), ["HERE"]))
    layers = ["HERE", *using(1, 0, 1)]
    check_component("block", using(0)[1], card=card(layers, [shared, shared | {"adapter_rank": 2}]))


@pytest.mark.parametrize(
    ("numbers", "shared", "message"),
    [
        ((0, 1), [SHARED], "number must be below 1, the count of shared blocks; found 1"),
        ((0, 0), [SHARED, SHARED], "every shared block must be used; found no layer that uses number 1"),
        ((0,), [SHARED | {"ffn": {"kind": "moe", "num_experts": 2, "experts_per_token": 1, "expert": GATED}}], "'moe'"),
        ((0,), [SHARED | {"mixer": MAMBA2}], "must be of kind 'attention'; found 'mamba2'"),
        ((0,), [SHARED | {"use": 3}], "the key 'use'|unknown key 'use'"),
    ],
)
def test_refusals(numbers: tuple[int, ...], shared: list[dict[str, Any]], message: str, small: Any) -> None:
    with pytest.raises(CardError, match=message):
        small(shared=shared, layers=using(*numbers))


def test_layers_without_shared_blocks_say_so(small: Any) -> None:
    with pytest.raises(CardError, match="shared"):
        small(layers=using(0))


def test_models_are_copied_whole(small: Any, filled: Any) -> None:
    spec = small(shared=[SHARED], layers=using(0, 0))
    model = filled(spec)
    other = copy.deepcopy(model)
    assert other.layers[2].in_use[0] is other.layers[1].shared is not model.layers[1].shared
    assert len(list(model.parameters())) == len(spec.all_parameters())
    assert zoo.testing.relative_error(zoo.testing.prefill(other, [1, 2, 3]), zoo.testing.prefill(model, [1, 2, 3])) == 0
