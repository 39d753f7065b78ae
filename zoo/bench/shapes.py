"""Layers to measure, as nodes of cards: one of each kind that takes its own time, and cards made of such layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Node = dict[str, Any]

ROPE: Node = {"theta": 1e4}
ATTENTION: Node = {"kind": "attention", "num_heads": 16, "num_kv_heads": 4, "head_dim": 64, "rope": ROPE}
MAMBA2: Node = {
    "kind": "mamba2",
    "num_heads": 32,
    "head_dim": 64,
    "num_groups": 1,
    "state_size": 128,
    "conv_size": 4,
    "norm_eps": 1e-5,
}
MIXERS: dict[str, Node] = {
    "attention": ATTENTION,
    "attention window": ATTENTION | {"window": 256},
    "attention formula": ATTENTION | {"softcap": 50.0},
    "latent_attention": {
        "kind": "latent_attention",
        "num_heads": 8,
        "q_lora_rank": None,
        "kv_lora_rank": 256,
        "nope_head_dim": 64,
        "rope_head_dim": 32,
        "v_head_dim": 64,
        "rope": ROPE,
    },
    "mamba1": {"kind": "mamba1", "inner_dim": 2048, "state_size": 16, "dt_rank": 32, "conv_size": 4},
    "mamba2": MAMBA2,
}
"""By what their components say of their pace."""

NARROW: dict[str, Node] = {"mamba2": MAMBA2 | {"state_size": 64}}
"""Those that come with states of several sizes, with another one: what both take as well is the channels'."""


def gated(hidden_dim: int) -> Node:
    """A gated feed-forward."""
    return {"kind": "gated", "hidden_dim": hidden_dim}


def moe(num_experts: int, experts_per_token: int, hidden_dim: int) -> Node:
    """A mixture of gated feed-forwards."""
    sizes = {"num_experts": num_experts, "experts_per_token": experts_per_token}
    return {"kind": "moe", **sizes, "expert": gated(hidden_dim)}


FFNS: dict[str, Node] = {"gated": gated(1024), "moe": moe(16, 2, 256)}
"""By what their components say of their pace."""


def card(
    name: str, *, dim: int, layers: Sequence[Node], vocab_size: int, context_length: int, dtype: str = "bfloat16"
) -> Node:
    """A card without text, for token ids and random weights."""
    return {
        "name": name,
        "family": "shapes",
        "summary": "A shape to be measured.",
        "context_length": context_length,
        "source": {"dtype": dtype},
        "text": {"features": []},
        "model": {
            "dim": dim,
            "vocab_size": vocab_size,
            "norm": {"kind": "rms", "eps": 1e-5},
            "layers": [*layers],
        },
    }
