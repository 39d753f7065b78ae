"""Specs: what they announce is what modules hold, what they refuse, what they cost."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from zoo.components.attention.spec import AttentionSpec
from zoo.components.build import build
from zoo.components.cache.spec import FullCacheSpec, WindowCacheSpec
from zoo.components.decoder.spec import DecoderSpec
from zoo.components.ffn.spec import GatedSpec, MLPSpec, MoESpec, SigmoidSpec, SoftmaxSpec, SoftmaxTopkSpec
from zoo.components.norm.spec import RMSSpec
from zoo.components.rope.spec import DefaultRopeSpec, LinearRopeSpec, Llama3RopeSpec, YarnRopeSpec
from zoo.registry.errors import PluginError
from zoo.registry.spec import Param, Rotary, Spec

ROPE = DefaultRopeSpec(head_dim=6, theta=1e4)
FULL = FullCacheSpec(num_kv_heads=2, head_dim=6)
GATED = GatedSpec(dim=16, hidden_dim=24)
ROUTES = {"dim": 16, "num_experts": 8, "experts_per_token": 3}
ROUTER = SoftmaxTopkSpec(dim=16, num_experts=4, experts_per_token=2)
ATTENTION: dict[str, Any] = {"dim": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "rope": ROPE, "cache": FULL}
MOE: dict[str, Any] = {"dim": 16, "num_experts": 4, "experts_per_token": 2, "router": ROUTER, "expert": GATED}
LLAMA3: dict[str, Any] = {
    "head_dim": 8,
    "theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_context": 64,
}
YARN: dict[str, Any] = {"head_dim": 8, "theta": 1e4, "factor": 4.0, "original_context": 64}
QK_NORM = RMSSpec(dim=6, eps=1e-6)


@pytest.mark.parametrize(
    "spec",
    [
        RMSSpec(dim=16, eps=1e-5),
        GATED,
        ROUTER,
        MoESpec(**MOE),
        AttentionSpec(**ATTENTION),
        AttentionSpec(**ATTENTION, qkv_bias=True, o_bias=True, qk_norm=QK_NORM),
        AttentionSpec(**ATTENTION | {"rope": None}),
        LinearRopeSpec(head_dim=6, theta=1e4, factor=2.0),
        Llama3RopeSpec(**LLAMA3),
        YarnRopeSpec(**YARN),
    ],
    ids=lambda spec: spec.kind,
)
def test_modules_hold_what_specs_announce(spec: Spec) -> None:
    module = build(spec, dtype=torch.bfloat16)
    announced = {name: param.shape for name, param in spec.all_parameters().items()}
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == announced
    assert all(p.is_meta and p.dtype is torch.bfloat16 for p in module.parameters())


def test_decoder_announces_its_parameters(small: Callable[..., DecoderSpec]) -> None:
    spec = small(
        ffn={"kind": "moe", "num_experts": 4, "experts_per_token": 2, "expert": {"kind": "gated", "hidden_dim": 8}}
    )
    module = build(spec)
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == {
        n: p.shape for n, p in spec.all_parameters().items()
    }
    names = [tensor.name for tensor in spec.tensors()]
    assert len(names) == len(set(names))
    for name in (
        "embed.weight",
        "head.weight",
        "norm.weight",
        "layers.0.mixer_norm.weight",
        "layers.0.mixer.q.weight",
        "layers.1.mixer.k.weight",
        "layers.1.mixer.v.weight",
        "layers.1.mixer.o.weight",
        "layers.1.ffn_norm.weight",
        "layers.1.ffn.router.weight",
        "layers.1.ffn.experts.3.gate.weight",
        "layers.1.ffn.experts.3.up.weight",
        "layers.1.ffn.experts.3.down.weight",
    ):
        assert name in names
    assert "head.weight" not in {t.name for t in small(tied_embeddings=True).tensors()}


def test_rotary_rows_are_marked() -> None:
    parts = AttentionSpec(**ATTENTION, qkv_bias=True).parameters()
    assert parts["qkv.weight"].parts["k.weight"].rotary == Rotary(6, 6)
    assert parts["qkv.bias"].parts["q.bias"].rotary == Rotary(6, 6)
    assert parts["qkv.weight"].parts["v.weight"].rotary is None
    some = DefaultRopeSpec(head_dim=6, theta=1e4, rotary_dim=4)
    assert AttentionSpec(**ATTENTION | {"rope": some}).parameters()["qkv.weight"].parts["q.weight"].rotary == Rotary(
        6, 4
    )
    assert AttentionSpec(**ATTENTION | {"rope": None}).parameters()["qkv.weight"].parts["q.weight"].rotary is None


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (
            AttentionSpec,
            ATTENTION | {"num_kv_heads": 3},
            "num_heads must be a multiple of num_kv_heads; found num_heads 4",
        ),
        (AttentionSpec, ATTENTION | {"window": 0}, "greater than or equal to 1"),
        (AttentionSpec, ATTENTION | {"head_dim": "6"}, "valid integer"),
        (AttentionSpec, ATTENTION | {"head_dim": True}, "valid integer"),
        (AttentionSpec, ATTENTION | {"qkv_bias": "yes"}, "valid boolean"),
        (AttentionSpec, ATTENTION | {"sliding_window": 4}, "Extra inputs are not permitted"),
        (AttentionSpec, ATTENTION | {"query_scaling": {"beta": 0.1}}, "original_context"),
        (AttentionSpec, {k: v for k, v in ATTENTION.items() if k != "rope"}, "Field required"),
        (MoESpec, MOE | {"experts_per_token": 5}, "experts_per_token must not exceed num_experts; found"),
        (MoESpec, MOE | {"expert": MoESpec(**MOE)}, "be of kind 'gated' or 'mlp' or 'clamped'; found kind 'moe'"),
        (SoftmaxSpec, ROUTES | {"groups": 3}, "groups must divide num_experts; found groups 3 and num_experts 8"),
        (SoftmaxSpec, ROUTES | {"groups": 2, "groups_per_token": 3}, "groups_per_token must not exceed groups; found"),
        (SigmoidSpec, ROUTES | {"groups": 4}, "the groups of a token must hold experts_per_token experts; found 1 gro"),
        (SigmoidSpec, ROUTES | {"groups": 8, "groups_per_token": 4}, "a group must hold two experts or more"),
        (SigmoidSpec, ROUTES | {"scale": 0.0}, "greater than 0"),
        (MLPSpec, {"dim": 16, "hidden_dim": 8}, "Field required"),
        (GatedSpec, {"dim": 16, "hidden_dim": 8, "activation": "relu"}, "'silu', 'gelu', 'gelu_tanh' or"),
        (RMSSpec, {"dim": 16, "eps": 0.0}, "greater than 0"),
        (RMSSpec, {"dim": 16, "eps": float("nan")}, "finite number"),
        (DefaultRopeSpec, {"head_dim": 7, "theta": 1e4}, "head_dim must be even; found 7"),
        (DefaultRopeSpec, {"head_dim": 8, "theta": 1e4, "rotary_dim": 3}, "rotary_dim must be even; found 3"),
        (DefaultRopeSpec, {"head_dim": 8, "theta": 1e4, "rotary_dim": 10}, "must not exceed head_dim; found 10 and 8"),
        (DefaultRopeSpec, {"head_dim": 8, "theta": 1.0}, "theta must be above 1; found 1"),
        (LinearRopeSpec, {"head_dim": 8, "theta": 1e4, "factor": -1.0}, "greater than 0"),
        (Llama3RopeSpec, LLAMA3 | {"high_freq_factor": 1.0}, "high_freq_factor must be above low_freq_factor"),
        (YarnRopeSpec, YARN | {"factor": 0.5}, "factor must be at least 1; found 0.5"),
        (YarnRopeSpec, YARN | {"beta_fast": 1.0}, "beta_fast must be above beta_slow; found 1.0 and 1.0"),
        (
            YarnRopeSpec,
            YARN | {"original_context": 6},
            "original_context must be above 2 pi beta_slow = 6.283; found 6",
        ),
        (
            WindowCacheSpec,
            {"num_kv_heads": 2, "head_dim": 6, "window": None},
            "needs a window on its mixer; found none",
        ),
        (
            DecoderSpec,
            {"context_length": 8, "vocab_size": 9, "dim": 16, "norm": RMSSpec(dim=16, eps=1e-5), "layers": ()},
            "layers must hold at least one block; found none",
        ),
    ],
)
def test_refusals(kind: type[Spec], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        kind(**fields)
    assert message in str(caught.value)


def test_cached_elements() -> None:
    assert [FULL.elements(tokens) for tokens in (0, 1, 100)] == [0, 24, 2400]
    ring = WindowCacheSpec(num_kv_heads=2, head_dim=6, window=8)
    assert [ring.elements(tokens) for tokens in (1, 8, 9, 1000)] == [24, 192, 192, 192]


def test_cache_follows_the_window(small: Callable[..., DecoderSpec]) -> None:
    assert {state.kind for state in small().states() if state} == {"full"}
    assert {state.kind for state in small(mixer={"window": 4}).states() if state} == {"window"}


def test_counts_of_a_known_model(small: Callable[..., DecoderSpec]) -> None:
    """Mixtral 8x7B: 46.7 billion parameters, 12.9 active with the embedding, 12.75 without."""
    spec = small(
        dim=4096,
        vocab_size=32000,
        layers=[
            {
                "repeat": 32,
                "mixer": {
                    "kind": "attention",
                    "num_heads": 32,
                    "num_kv_heads": 8,
                    "head_dim": 128,
                    "rope": {"theta": 1e6},
                },
                "ffn": {
                    "kind": "moe",
                    "num_experts": 8,
                    "experts_per_token": 2,
                    "expert": {"kind": "gated", "hidden_dim": 14336},
                },
            }
        ],
    )
    parameters = spec.all_parameters().values()
    assert sum(p.numel for p in parameters) == 46_702_792_704
    active = sum(p.numel * p.active for p in parameters)
    assert round(active) == 12_879_925_248 - 31_999 * 4096
    assert sum(state.elements(1) for state in spec.states() if state) == 2 * 8 * 128 * 32


def test_flops_count_products_and_seen_keys() -> None:
    spec = AttentionSpec(**ATTENTION)
    products = 2 * (48 * 16 + 16 * 24)
    assert spec.flops(0) == products
    assert spec.flops(10) == products + 4 * 4 * 6 * 10
    ring = WindowCacheSpec(num_kv_heads=2, head_dim=6, window=3)
    assert AttentionSpec(**ATTENTION | {"window": 3, "cache": ring}).flops(10) == products + 4 * 4 * 6 * 3
    assert MoESpec(**MOE).flops(10) == 2 * (3 * 24 * 16) * 2
    assert RMSSpec(dim=16, eps=1e-5).flops(10) == 0


def test_flops_of_the_head(small: Callable[..., DecoderSpec]) -> None:
    assert small().flops(5) == small(tied_embeddings=True).flops(5) == 2 * 37 * 16


def test_modules_that_break_their_word_are_named() -> None:
    class Boastful(RMSSpec):
        def parameters(self) -> dict[str, Param]:
            return super().parameters() | {"bias": Param((self.dim,))}

    with pytest.raises(PluginError, match="'bias'; found none; expected \\(16,\\)"):
        build(Boastful(dim=16, eps=1e-5))


def test_float32_parameters_keep_their_type() -> None:
    class Exact(RMSSpec):
        def parameters(self) -> dict[str, Param]:
            return {"weight": Param((self.dim,), dtype="float32")}

    assert build(Exact(dim=4, eps=1e-5), dtype=torch.bfloat16).weight.dtype is torch.float32


def test_specs_import_no_torch() -> None:
    modules = ["attention", "cache", "decoder", "ffn", "norm", "rope"]
    code = "import sys\n" + "".join(f"import zoo.components.{name}.spec\n" for name in modules)
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True)
