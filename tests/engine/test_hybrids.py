"""Models whose layers are of several kinds: alone = in any batch, any chunks, whatever the storage and its room."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from zoo.assemble import assemble
from zoo.components.decoder.model import Decoder
from zoo.engine.engine import Engine
from zoo.engine.request import Request, SamplingParams
from zoo.registry.card import Card
from zoo.registry.plan import Plan
from zoo.registry.resolve import resolve

CONTEXT, VOCABULARY = 110, 89
MAMBA2: dict[str, Any] = {
    "kind": "mamba2",
    "num_heads": 4,
    "head_dim": 8,
    "num_groups": 2,
    "state_size": 6,
    "conv_size": 4,
    "norm_eps": 1e-5,
}
MAMBA1: dict[str, Any] = {"kind": "mamba1", "inner_dim": 32, "state_size": 6, "dt_rank": 3, "conv_size": 4}
MAMBA1 |= {"bcdt_norm": {"eps": 1e-6, "weights": True}}
ATTENTION: dict[str, Any] = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "rope": None}
TURNED = ATTENTION | {"rope": {"theta": 50.0}}
GATED: dict[str, Any] = {"kind": "gated", "hidden_dim": 20}
MOE: dict[str, Any] = {"kind": "moe", "num_experts": 4, "experts_per_token": 2, "expert": GATED}
PLAIN: dict[str, Any] = {"kind": "mlp", "hidden_dim": 20, "activation": "relu2"}
BIASED: dict[str, Any] = MOE | {"router": {"kind": "sigmoid", "scale": 1.5}, "expert": PLAIN, "shared": PLAIN}
SCALED: dict[str, Any] = {"kind": "scaled", "residual_scale": 0.5, "ffn": GATED}
SHARED: dict[str, Any] = {"kind": "transformer", "mixer": TURNED, "ffn": GATED, "adapter_rank": 3, "adapt_mixer": True}
LATENT: dict[str, Any] = {"kind": "latent_attention", "num_heads": 3, "q_lora_rank": 10, "kv_lora_rank": 14}
LATENT |= {"nope_head_dim": 6, "rope_head_dim": 4, "v_head_dim": 5, "rope": {"theta": 50.0}}
INDEXED = LATENT | {"indexer": {"kind": "lightning", "num_heads": 4, "head_dim": 6, "top_k": 20, "norm_eps": 1e-6}}
MODELS: dict[str, dict[str, Any]] = {
    "indexed": {"layers": [{"mixer": mixer, "ffn": GATED} for mixer in (MAMBA2, INDEXED)]},
    "scaled": {"layers": [SCALED | {"mixer": mixer} for mixer in (MAMBA2, ATTENTION, MAMBA2)]},
    "mixtures": {"layers": [{"mixer": MAMBA1, "ffn": GATED}, {"mixer": ATTENTION, "ffn": MOE | {"router": "softmax"}}]},
    "single parts": {
        "layers": [
            {"mixer": MAMBA2, "ffn": None},
            {"mixer": None, "ffn": BIASED},
            {"mixer": ATTENTION, "ffn": None},
            {"mixer": None, "ffn": PLAIN},
        ]
    },
    "sharing": {
        "shared": [SHARED, SHARED],
        "layers": [
            {"mixer": MAMBA2, "ffn": None},
            *({"kind": "sharing", "number": number, "mixer": MAMBA2} for number in (0, 1, 0)),
        ],
    },
}


@cache
def built(name: str) -> tuple[Decoder, Plan]:
    model = {"dim": 16, "vocab_size": VOCABULARY, "norm": {"kind": "rms", "eps": 1e-5}, **MODELS[name]}
    plan = resolve(Card.from_dict({"name": "hybrid", "context_length": CONTEXT, "model": model}))
    module = assemble(plan, torch.float32).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(5)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return module, plan


def prompt(length: int) -> list[int]:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def answers(name: str, requests: list[Request], contexts: int | None = None, **sizes: Any) -> list[list[int]]:
    """contexts: how many whole contexts fit in the cache."""
    budget = None if contexts is None else contexts * Engine(*built(name), **sizes)._memory.cost(CONTEXT)
    engine = Engine(*built(name), memory_bytes=budget, **sizes)
    found = [completion.tokens for completion in engine.generate(requests)]
    assert engine.memory["cache_used"] == 0
    return found


@pytest.mark.parametrize("storage", ["slab", "pages"])
@pytest.mark.parametrize("name", MODELS)
def test_batches_and_chunks_change_nothing(name: str, storage: Any) -> None:
    settings = [SamplingParams(max_tokens=14, temperature=t, seed=3, ignore_eos=True) for t in (0.0, 1.0)]
    requests = [Request(prompt(n), settings[n % 2]) for n in (1, 2, 19, 66, 5, 34)]
    expected = [answers(name, [request], chunk_tokens=128)[0] for request in requests]
    assert len({token for tokens in expected for token in tokens}) > 20, "the model must not be trivial"
    for sizes in ({"chunk_tokens": 11}, {"chunk_tokens": 64, "max_batch_size": 2}, {"contexts": 2, "chunk_tokens": 16}):
        assert answers(name, requests, storage=storage, **sizes) == expected
