"""Ranks that share a model out compute what one computes, and each reads its own part of the files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.devices.likes import ATTENTION, CLAMPED, GATED, LATENT, MAMBA1, MAMBA2, filled, make_plan
from zoo.assemble import assemble
from zoo.components.decoder.spec import DecoderSpec
from zoo.devices.cut import Load, cut
from zoo.devices.mesh import Mesh
from zoo.devices.shares import Part
from zoo.loading.files import locate as locate_files
from zoo.loading.load import load_weights, random_weights
from zoo.locating import locate
from zoo.registry.plan import Plan
from zoo.registry.resolve import resolve
from zoo.registry.spec import IndivisibleError
from zoo.testing import TOLERANCE, prefill, relative_error, share_out

MIXERS: dict[str, dict[str, Any]] = {
    "dense": ATTENTION,
    "biases": {**ATTENTION, "qkv_bias": True, "o_bias": True, "sinks": True, "window": 5},
    "norm of heads": {**ATTENTION, "qk_norm": {"kind": "rms", "eps": 1e-5}},
    "norm of all heads": {**ATTENTION, "qk_norm": {"kind": "rms", "eps": 1e-5}, "qk_norm_span": "projection"},
    "mamba 1": {**MAMBA1, "bias": True},
    "mamba 2": {**MAMBA2, "num_groups": 4, "bias": True},
    "mamba 2 of one group": {**MAMBA2, "num_groups": 1},
    "latent": LATENT,
}
FFNS: dict[str, dict[str, Any]] = {
    "mixture": {"kind": "moe", "num_experts": 5, "experts_per_token": 2, "expert": GATED, "shared": GATED},
    "mixture with biases": {"kind": "moe", "num_experts": 4, "experts_per_token": 3, "expert": CLAMPED},
    "without a gate": {"kind": "mlp", "hidden_dim": 12, "activation": "relu2"},
}


@pytest.mark.parametrize("mesh", [Mesh(2), Mesh(4), Mesh(2, 2)], ids=str)
@pytest.mark.parametrize(
    ("mixer", "ffn", "model"),
    [
        *((mixer, GATED, {}) for mixer in MIXERS.values()),
        *((ATTENTION, ffn, {}) for ffn in FFNS.values()),
        (ATTENTION, GATED, {"tied_embeddings": True, "logits_softcap": 3.0}),
    ],
    ids=[*MIXERS, *FFNS, "tied"],
)
def test_ranks_give_the_logits_of_one(
    mixer: dict[str, Any], ffn: dict[str, Any], model: dict[str, Any], mesh: Mesh
) -> None:
    plan = make_plan(mixer, ffn, **model)
    module = filled(plan)
    tokens = [5, 66, 0, 31, 32, 33, 34, 16, 17, 50, 1]
    found = share_out(plan, module, mesh, lambda rank: prefill(rank, tokens))
    assert relative_error(found, prefill(module, tokens)) < TOLERANCE


def test_every_rank_draws_its_part_of_the_same_random_weights() -> None:
    plan = make_plan(MIXERS["mamba 2"])
    whole = assemble(plan, torch.float32)
    random_weights(whole, plan)
    found = []
    for rank in range(2):
        part = Part.of(plan, Mesh(2), rank)
        module = assemble(part.local, torch.float32)
        random_weights(module, plan, pieces=part.pieces)
        found.append(module.get_parameter("layers.1.mixer.in_proj.weight"))
    expected = whole.get_parameter("layers.1.mixer.in_proj.weight")
    for at, size in ((0, 40), (40, 40), (80, 12), (92, 12), (104, 8)):
        parts = [part[at // 2 : (at + size) // 2] for part in found]
        assert torch.equal(torch.cat(parts), expected[at : at + size])


def read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes by Linux's /proc")
def test_each_rank_reads_its_part_of_the_files() -> None:
    found = locate("tiny")
    plan = resolve(found.card)
    assert found.folder is not None
    files = locate_files(found.folder, found.card.source.layout)
    whole = assemble(plan, torch.bfloat16)
    load_weights(whole, plan, files)
    joined: dict[str, list[torch.Tensor]] = {}
    for rank in range(2):
        part = Part.of(plan, Mesh(2), rank)
        module = assemble(part.local, torch.bfloat16)
        before = read_bytes()
        load_weights(module, plan, files, pieces=part.pieces)
        read = read_bytes() - before
        held = sum(p.numel() * 2 for p in module.parameters())
        assert held <= read < 1.02 * held
        assert held < 0.52 * sum(p.numel() * 2 for p in whole.parameters())
        for name, parameter in module.named_parameters():
            joined.setdefault(name, []).append(parameter)
    expected = dict(whole.named_parameters())
    assert torch.equal(torch.cat(joined["layers.0.mixer.o.weight"], 1), expected["layers.0.mixer.o.weight"])
    assert torch.equal(torch.cat(joined["head.weight"]), expected["head.weight"])


def test_what_does_not_divide_is_named() -> None:
    with pytest.raises(IndivisibleError, match=r"model\.layers\.0\.mixer\.num_heads: 8, which 3 does not divide"):
        Part.of(make_plan(), Mesh(3), 0)
    three = {**MIXERS["mamba 2"], "num_heads": 12, "num_groups": 3}
    with pytest.raises(IndivisibleError, match=r"layers\.0\.mixer\.num_groups: 3 is neither 1 nor a multiple of 2"):
        Part.of(make_plan(three), Mesh(2), 0)
    with pytest.raises(IndivisibleError, match=r"num_groups: 3 is neither 1 nor a multiple of 6"):
        Part.of(make_plan(three), Mesh(6), 0)


@pytest.mark.parametrize("name", ["mixture", "mixture with biases"])
@pytest.mark.parametrize("mesh", [Mesh(2, ep=2), Mesh(4, ep=4), Mesh(2, 2, 2)], ids=str)
def test_whole_experts_on_each_rank(name: str, mesh: Mesh) -> None:
    plan = make_plan(ffn={**FFNS[name], "num_experts": 8})
    module = filled(plan)
    for tokens in ([5, 66, 0, 31, 32, 33, 34], [9]):
        found = share_out(plan, module, mesh, lambda rank, tokens=tokens: prefill(rank, tokens))  # type: ignore[misc]
        assert relative_error(found, prefill(module, tokens)) < TOLERANCE
    held = Part.of(plan, mesh, 1).local.model.all_parameters()["layers.0.ffn.experts_in"].shape
    assert held[0] == 8 // mesh.ep


def borders(plan: Plan, stages: int, room: list[int] | None = None, **options: Any) -> list[int]:
    assert isinstance(plan.model, DecoderSpec)
    return [*cut(plan.model, stages, Load(**options), room)]


def test_stages_are_of_like_size() -> None:
    layers = [{"repeat": 3, "mixer": ATTENTION, "ffn": GATED}, {"repeat": 4, "mixer": None, "ffn": GATED}]
    plan = make_plan(layers=layers, vocab_size=20)
    assert borders(plan, 1) == [0, 7]
    assert borders(plan, 2) == [0, 2, 7]
    assert borders(plan, 7) == [*range(8)]
    with pytest.raises(IndivisibleError, match="7 layers for 8 stages"):
        borders(plan, 8)


def test_stages_are_cut_for_what_their_devices_have_room_for() -> None:
    plan = make_plan(layers=[{"repeat": 8, "mixer": ATTENTION, "ffn": GATED}], vocab_size=20)
    assert borders(plan, 2) == [0, 4, 8]
    assert borders(plan, 2, [1 << 20, 3 << 20]) == [0, 2, 8]
    assert borders(plan, 3, [2 << 20, 1 << 20, 1 << 20]) == [0, 4, 6, 8]


def test_embedding_head_and_cache_count() -> None:
    plain = {"repeat": 8, "mixer": ATTENTION, "ffn": GATED}
    layer = sum(param.numel for param in make_plan().model.all_parameters().values()) // 3
    rows = 2 * layer // 18
    assert borders(make_plan(layers=[plain], vocab_size=rows), 4) == [0, 1, 4, 7, 8]
    windows = {"repeat": 6, "mixer": {**ATTENTION, "window": 4}, "ffn": GATED}
    plan = make_plan(layers=[windows, {**plain, "repeat": 2}], vocab_size=20)
    assert borders(plan, 2) == [0, 4, 8]
    assert borders(plan, 2, context=10_000) == [0, 7, 8]


def test_a_stage_has_its_indexer() -> None:
    indexer = {"kind": "lightning", "num_heads": 2, "head_dim": 6, "top_k": 4, "norm_eps": 1e-5}
    own, same = ({"mixer": {**LATENT, "indexer": node}, "ffn": GATED} for node in (indexer, {"kind": "shared"}))
    plain = {"mixer": ATTENTION, "ffn": GATED}
    plan = make_plan(layers=[own, plain, same, same, own, same, plain])
    assert borders(plan, 2) == [0, 4, 7]
    assert borders(plan, 3) == [0, 4, 6, 7]
    with pytest.raises(IndivisibleError, match=r"layers\.2\.mixer\.indexer: it needs layer 0 .* 3 stages"):
        borders(plan, 4)
    module, tokens = filled(plan), [*range(20)]
    found = share_out(plan, module, Mesh(1, 3), lambda rank: prefill(rank, tokens))
    assert relative_error(found, prefill(module, tokens)) < TOLERANCE
