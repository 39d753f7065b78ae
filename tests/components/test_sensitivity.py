"""Every field of every built-in Spec changes parameters, state or logits: nothing is accepted and ignored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from zoo.components.cache.store import fresh_step
from zoo.components.step import Rows
from zoo.registry.errors import CardError
from zoo.registry.manager import manager
from zoo.registry.spec import Inherited, Slot, Spec

TOKENS = torch.tensor([1, 5, 32, 7, 16, 11, 3, 8, 30, 2, 27, 31, 0])
ROPE = {"theta": 1e4}
YARN = {"kind": "yarn", "theta": 50.0, "factor": 4.0, "original_context": 40, "beta_fast": 4.0}
LLAMA3 = {
    "kind": "llama3",
    "theta": 50.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_context": 16,
}
LONGROPE: dict[str, Any] = {
    "kind": "longrope",
    "theta": 50.0,
    "original_context": 64,
    "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [2.0, 4.0, 8.0],
    "attention_factor": 1.2,
}
STRETCHES: dict[str, dict[str, Any]] = {
    "theta": {"theta": 20.0},
    "rotary_dim": {"rotary_dim": 4, "short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0]},
    "original_context": {"original_context": 200},
    "long_factor": {"long_factor": [2.0, 4.0, 9.0]},
    "attention_factor": {"attention_factor": 1.5},
}
LINEAR = {"kind": "linear", "theta": 50.0, "factor": 4.0}
ATTENTION = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "rope": ROPE}
EXPERT = {"kind": "gated", "hidden_dim": 24}
SCALED: dict[str, Any] = {"kind": "scaled", "residual_scale": 0.3, "mixer": ATTENTION, "ffn": EXPERT}
MOE = {"kind": "moe", "num_experts": 4, "experts_per_token": 2, "expert": EXPERT}
MLP = {"kind": "mlp", "hidden_dim": 24, "activation": "relu2"}
CLAMPED = {"kind": "clamped", "hidden_dim": 24, "gain": 1.7, "limit": 2.0}


def routed(kind: str, **fields: Any) -> dict[str, Any]:
    """A mixture of eight experts with a router of that kind."""
    return {"ffn": MOE | {"num_experts": 8, "router": {"kind": kind} | fields}}


SCALING = {"beta": 0.5, "original_context": 4}
LATENT: dict[str, Any] = {
    "kind": "latent_attention",
    "num_heads": 3,
    "q_lora_rank": 10,
    "kv_lora_rank": 14,
    "nope_head_dim": 6,
    "rope_head_dim": 4,
    "v_head_dim": 5,
    "rope": YARN,
}
INDEXER = {"kind": "lightning", "num_heads": 16, "head_dim": 6, "top_k": 3, "norm_eps": 1e-6}
MAMBA2 = {
    "kind": "mamba2",
    "num_heads": 4,
    "head_dim": 6,
    "num_groups": 2,
    "state_size": 5,
    "conv_size": 4,
    "norm_eps": 1e-5,
}
MAMBA1 = {"kind": "mamba1", "inner_dim": 20, "state_size": 5, "dt_rank": 3, "conv_size": 4}
PROJECTOR: dict[str, Any] = {"bias": False, "merge": 2, "norm": {"kind": "rms", "eps": 1e-5}}
VISION: dict[str, Any] = {
    "kind": "pixtral",
    "token": 7,
    "dim": 12,
    "num_layers": 2,
    "num_heads": 3,
    "hidden_dim": 20,
    "patch_size": 3,
    "max_image_size": 24,
    "theta": 100.0,
    "norm": {"kind": "rms", "eps": 1e-5},
    "projector": PROJECTOR,
}
AUDIO: dict[str, Any] = {
    "kind": "whisper",
    "token": 7,
    "dim": 12,
    "num_layers": 2,
    "num_heads": 3,
    "hidden_dim": 20,
    "num_mel_bins": 5,
    "positions": 4,
    "stack": 4,
    "norm": {"kind": "layer", "eps": 1e-5},
}
BCDT_NORM = {"eps": 1e-3, "weights": False}

SHARED: dict[str, Any] = {"kind": "transformer", "mixer": ATTENTION, "ffn": EXPERT, "adapter_rank": 3}


def sharing(number: int = 0, **changes: Any) -> dict[str, Any]:
    """A model of two shared blocks, the first of them changed, and three uses of them."""
    blocks = [{"kind": "sharing", "number": n, "mixer": MAMBA2} for n in (number, 0, 1)]
    return {"shared": [SHARED | changes, SHARED], "layers": blocks}


def of(mixer: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Layers of nothing but a mixer."""
    return {"layers": [{"repeat": 2, "mixer": mixer | changes, "ffn": None}]}


def borrowing(layer: int) -> dict[str, Any]:
    """Three layers, the last with the latents of an earlier one."""
    last = {"mixer": LATENT | {"cache": {"kind": "shared", "layer": layer}}, "ffn": None}
    return {"layers": [{"repeat": 2, "mixer": LATENT, "ffn": None}, last]}


# (slot, kind) -> field -> arguments of `small` with one value, and with another.
CASES: dict[tuple[str, str], dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    ("model", "decoder"): {
        "vocab_size": ({}, {"vocab_size": 38}),
        "dim": ({}, {"dim": 20}),
        "tied_embeddings": ({}, {"tied_embeddings": True}),
        "embedding_scale": ({}, {"embedding_scale": 3.0}),
        "logits_divisor": ({}, {"logits_divisor": 3.0}),
        "logits_softcap": ({}, {"logits_softcap": 3.0}),
        "lerope": ({}, {"lerope": True}),
        "cache_dtype": ({}, {"cache_dtype": "int8"}),
        "norm": ({}, {"norm": {"kind": "rms", "eps": 0.1}}),
        "shared": (sharing(), sharing(adapter_rank=4)),
        "vision": ({}, {"vision": VISION}),
        "audio": ({}, {"audio": AUDIO}),
        "layers": (
            {},
            {
                "layers": [
                    {
                        "repeat": 3,
                        "mixer": {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "rope": ROPE},
                        "ffn": EXPERT,
                    }
                ]
            },
        ),
    },
    ("vision", "pixtral"): {
        name: ({"vision": VISION}, {"vision": VISION | {name: value}})
        for name, value in {
            "token": 16,
            "dim": 24,
            "num_layers": 1,
            "num_heads": 1,
            "hidden_dim": 16,
            "activation": "gelu",
            "patch_size": 2,
            "max_image_size": 12,
            "theta": 3.0,
            "norm": {"kind": "rms", "eps": 0.1},
            "projector": PROJECTOR | {"bias": True},
        }.items()
    },
    ("audio", "whisper"): {
        name: ({"audio": AUDIO}, {"audio": AUDIO | {name: value}})
        for name, value in {
            "token": 16,
            "dim": 24,
            "num_layers": 1,
            "num_heads": 1,
            "hidden_dim": 16,
            "num_mel_bins": 6,
            "positions": 8,
            "stack": 2,
            "norm": {"kind": "layer", "eps": 0.1},
        }.items()
    },
    ("projector", "mlp"): {
        name: ({"vision": VISION}, {"vision": VISION | {"projector": PROJECTOR | {name: value}}})
        for name, value in {"bias": True, "activation": "silu", "norm": None, "merge": None}.items()
    },
    ("mixer", "attention"): {
        "num_heads": ({}, {"mixer": {"num_heads": 6}}),
        "num_kv_heads": ({}, {"mixer": {"num_kv_heads": 4}}),
        "head_dim": ({}, {"mixer": {"head_dim": 8}}),
        "window": ({}, {"mixer": {"window": 5}}),
        "rope": ({}, {"mixer": {"rope": None}}),
        "qkv_bias": ({}, {"mixer": {"qkv_bias": True}}),
        "o_bias": ({}, {"mixer": {"o_bias": True}}),
        "qk_norm": ({}, {"mixer": {"qk_norm": {"kind": "rms", "eps": 1e-5}}}),
        "scale": ({}, {"mixer": {"scale": 0.1}}),
        "softcap": ({}, {"mixer": {"softcap": 1.0}}),
        "sinks": ({}, {"mixer": {"sinks": True}}),
        "qk_norm_span": (
            {"mixer": {"qk_norm": {"kind": "rms", "eps": 1e-5}}},
            {"mixer": {"qk_norm": {"kind": "rms", "eps": 1e-5}, "qk_norm_span": "projection"}},
        ),
        "query_scaling": ({}, {"mixer": {"query_scaling": SCALING}}),
        "query_scaling.beta": (
            {"mixer": {"query_scaling": SCALING}},
            {"mixer": {"query_scaling": SCALING | {"beta": 1.0}}},
        ),
        "query_scaling.original_context": (
            {"mixer": {"query_scaling": SCALING}},
            {"mixer": {"query_scaling": SCALING | {"original_context": 6}}},
        ),
        "cache": ({"mixer": {"window": 5}}, {"mixer": {"window": 5, "cache": {"kind": "full"}}}),
    },
    ("mixer", "latent_attention"): {
        name: (of(LATENT), of(LATENT, **{name: value}))
        for name, value in {
            "num_heads": 2,
            "q_lora_rank": None,
            "kv_lora_rank": 12,
            "nope_head_dim": 8,
            "rope_head_dim": 6,
            "v_head_dim": 6,
            "norm": {"kind": "rms", "eps": 0.1},
            "rope": {"theta": 20.0},
            "mscale": 1.0,
            "query_scaling": SCALING,
            "ssmax": True,
            "indexer": INDEXER,
        }.items()
    }
    | {
        "cache": ({"layers": [{"repeat": 3, "mixer": LATENT, "ffn": None}]}, borrowing(0)),
    },
    ("indexer", "lightning"): {
        name: (of(LATENT, indexer=INDEXER), of(LATENT, indexer=INDEXER | {name: value}))
        for name, value in {
            "num_heads": 3,
            "head_dim": 8,
            "top_k": 4,
            "norm_eps": 3.0,
            "ssmax": True,
            "rope": {"theta": 20.0},
        }.items()
    },
    ("indexer", "shared"): {},
    ("mixer", "mamba2"): {
        name: (of(MAMBA2), of(MAMBA2, **{name: value}))
        for name, value in {
            "num_heads": 2,
            "head_dim": 4,
            "num_groups": 4,
            "state_size": 6,
            "conv_size": 3,
            "norm_eps": 0.1,
            "bias": True,
            "conv_bias": False,
        }.items()
    },
    ("mixer", "mamba1"): {
        "inner_dim": (of(MAMBA1), of(MAMBA1, inner_dim=24)),
        "state_size": (of(MAMBA1), of(MAMBA1, state_size=6)),
        "dt_rank": (of(MAMBA1), of(MAMBA1, dt_rank=4)),
        "conv_size": (of(MAMBA1), of(MAMBA1, conv_size=3)),
        "bias": (of(MAMBA1), of(MAMBA1, bias=True)),
        "conv_bias": (of(MAMBA1), of(MAMBA1, conv_bias=False)),
        "bcdt_norm": (of(MAMBA1), of(MAMBA1, bcdt_norm=BCDT_NORM)),
        "bcdt_norm.eps": (of(MAMBA1, bcdt_norm=BCDT_NORM), of(MAMBA1, bcdt_norm=BCDT_NORM | {"eps": 0.1})),
        "bcdt_norm.weights": (of(MAMBA1, bcdt_norm=BCDT_NORM), of(MAMBA1, bcdt_norm=BCDT_NORM | {"weights": True})),
    },
    ("ffn", "gated"): {
        "hidden_dim": ({}, {"ffn": EXPERT | {"hidden_dim": 20}}),
        "activation": ({}, {"ffn": EXPERT | {"activation": "gelu"}}),
    },
    ("ffn", "moe"): {
        "num_experts": ({"ffn": MOE}, {"ffn": MOE | {"num_experts": 5}}),
        "experts_per_token": ({"ffn": MOE}, {"ffn": MOE | {"experts_per_token": 3}}),
        "expert": ({"ffn": MOE}, {"ffn": MOE | {"expert": EXPERT | {"activation": "gelu_tanh"}}}),
        "shared": ({"ffn": MOE}, {"ffn": MOE | {"shared": EXPERT}}),
    },
    ("ffn", "mlp"): {
        "hidden_dim": ({"ffn": MLP}, {"ffn": MLP | {"hidden_dim": 20}}),
        "activation": ({"ffn": MLP}, {"ffn": MLP | {"activation": "silu"}}),
    },
    ("ffn", "clamped"): {
        name: ({"ffn": CLAMPED}, {"ffn": CLAMPED | {name: value}})
        for name, value in {"hidden_dim": 20, "gain": 1.0, "limit": 0.1}.items()
    },
    ("router", "softmax_topk"): {"bias": (routed("softmax_topk"), routed("softmax_topk", bias=True))},
    ("router", "softmax"): {
        "normalize": (routed("softmax"), routed("softmax", normalize=True)),
        "groups": (routed("softmax"), routed("softmax", groups=2)),
        "groups_per_token": (routed("softmax", groups=2), routed("softmax", groups=2, groups_per_token=2)),
        "scale": (routed("softmax"), routed("softmax", scale=2.5)),
    },
    ("router", "sigmoid"): {
        "normalize": (routed("sigmoid"), routed("sigmoid", normalize=False)),
        "groups": (routed("sigmoid"), routed("sigmoid", groups=2)),
        "groups_per_token": (routed("sigmoid", groups=2), routed("sigmoid", groups=2, groups_per_token=2)),
        "scale": (routed("sigmoid"), routed("sigmoid", scale=2.5)),
    },
    ("norm", "rms"): {"eps": ({}, {"norm": {"kind": "rms", "eps": 0.01}})},
    ("norm", "rms_plus_one"): {
        "eps": ({"norm": {"kind": "rms_plus_one", "eps": 1e-5}}, {"norm": {"kind": "rms_plus_one", "eps": 0.01}})
    },
    ("norm", "layer"): {
        "eps": ({"norm": {"kind": "layer", "eps": 1e-5}}, {"norm": {"kind": "layer", "eps": 0.01}}),
    },
    ("rope", "default"): {
        "theta": ({}, {"mixer": {"rope": {"theta": 100.0}}}),
        "rotary_dim": ({}, {"mixer": {"rope": ROPE | {"rotary_dim": 4}}}),
    },
    ("rope", "linear"): {
        name: ({"mixer": {"rope": LINEAR}}, {"mixer": {"rope": LINEAR | {name: value}}})
        for name, value in {"theta": 20.0, "rotary_dim": 4, "factor": 2.0}.items()
    },
    ("rope", "llama3"): {
        name: ({"mixer": {"rope": LLAMA3}}, {"mixer": {"rope": LLAMA3 | {name: value}}})
        for name, value in {
            "theta": 20.0,
            "rotary_dim": 4,
            "factor": 2.0,
            "low_freq_factor": 0.1,
            "high_freq_factor": 2.0,
            "original_context": 40,
        }.items()
    },
    ("rope", "yarn"): {
        name: ({"mixer": {"rope": YARN}}, {"mixer": {"rope": YARN | {name: value}}})
        for name, value in {
            "theta": 20.0,
            "rotary_dim": 4,
            "factor": 2.0,
            "original_context": 90,
            "beta_fast": 1.2,
            "beta_slow": 0.2,
            "attention_factor": 1.5,
            "truncate": False,
        }.items()
    },
    ("rope", "longrope"): {
        name: ({"mixer": {"rope": LONGROPE}}, {"mixer": {"rope": LONGROPE | change}})
        for name, change in STRETCHES.items()
    }
    | {
        "short_factor": (
            {"mixer": {"rope": LONGROPE | {"original_context": 128}}},
            {"mixer": {"rope": LONGROPE | {"original_context": 128, "short_factor": [1.0, 2.0, 3.0]}}},
        )
    },
    ("cache", "full"): {},
    ("cache", "window"): {},
    ("cache", "latent"): {},
    ("cache", "shared"): {
        "layer": (borrowing(0), borrowing(1)),
    },
    ("cache", "recurrent"): {},
    ("block", "postnorm"): {},
    ("block", "sandwich"): {},
    ("block", "scaled"): {
        "residual_scale": ({"layers": [SCALED]}, {"layers": [SCALED | {"residual_scale": 0.5}]}),
    },
    ("block", "sharing"): {"number": (sharing(), sharing(number=1))},
    ("shared", "transformer"): {
        "norm": (sharing(), sharing(norm={"kind": "rms", "eps": 0.1})),
        "mixer": (sharing(), sharing(mixer=ATTENTION | {"rope": None})),
        "ffn": (sharing(), sharing(ffn=EXPERT | {"activation": "gelu"})),
        "adapter_rank": (sharing(), sharing(adapter_rank=4)),
        "adapt_mixer": (sharing(), sharing(adapt_mixer=True)),
    },
    ("block", "prenorm"): {},
}
ONLY_KIND = {("moe", "router")}
"""Fields of a slot that has one built-in kind, the default: there is no other value."""


FIELDS = [(key, name) for key, fields in CASES.items() for name in fields]


def _behaviour(spec: Any, filled: Callable[..., Any]) -> tuple[Any, Any, torch.Tensor]:
    shapes = {name: param.shape for name, param in spec.all_parameters().items()}
    module, step = filled(spec), fresh_step(spec, [len(TOKENS)])
    if not spec.encoders():
        return shapes, spec.states(), module(TOKENS, step)
    ((name, encoder),) = spec.encoders().items()
    size, tokens = _piece(spec)
    piece = torch.randn(size, generator=torch.Generator().manual_seed(0))
    rows_N = (encoder.token == TOKENS).nonzero()[:, 0]
    rows = Rows(rows_N, getattr(module, name)([piece])[0][: len(rows_N)])
    return (shapes, tokens), spec.states(), module(TOKENS, replace(step, media=rows))


def _piece(spec: Any) -> tuple[tuple[int, ...], int]:
    """The size of the smallest image or sound, and the tokens of a certain one."""
    if spec.vision is None:
        return (spec.audio.num_mel_bins, spec.audio.chunk_frames), spec.audio.audio_tokens(1)
    return (3, spec.vision.cell, spec.vision.cell), spec.vision.image_tokens(20, 14)


@pytest.mark.parametrize(("key", "field"), FIELDS, ids=[f"{kind}.{name}" for (_, kind), name in FIELDS])
def test_field_has_an_effect(
    key: tuple[str, str], field: str, small: Callable[..., Any], filled: Callable[..., Any]
) -> None:
    before, after = (_behaviour(small(**arguments), filled) for arguments in CASES[key][field])
    assert before[:2] != after[:2] or not torch.allclose(before[2], after[2], rtol=1e-4)


def test_every_written_field_has_a_case() -> None:
    catalog = manager().catalog
    for (slot, kind), cases in CASES.items():
        spec: type[Spec] = catalog.spec(catalog.find(slot, kind))
        written = {
            name
            for name, field in spec.model_fields.items()
            if name != "kind" and not any(isinstance(mark, Inherited) for mark in field.metadata)
        }
        if slot == "block":
            plain = {n for n in written if not any(isinstance(m, Slot) for m in spec.model_fields[n].metadata)}
            assert plain == set(cases), kind
        else:
            one_kind = {name for owner, name in ONLY_KIND if owner == kind}
            assert written == {name for name in cases if "." not in name} | one_kind, kind


def test_slots_of_one_kind_refuse_others(small: Callable[..., Any]) -> None:
    assert manager().catalog.kinds("router") == ["softmax_topk", "softmax", "sigmoid"]
    with pytest.raises(CardError, match="router"):
        small(ffn=MOE | {"router": {"kind": "hash"}})


def test_every_built_in_has_cases() -> None:
    entries = manager().components().values()
    assert {(e.slot, e.kind) for e in entries if e.spec_path.startswith("zoo.components.")} == set(CASES)
