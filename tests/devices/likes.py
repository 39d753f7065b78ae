"""Small models that one process and several run: every mixer and feed-forward that ranks share out."""

from __future__ import annotations

from typing import Any

import torch

from zoo.assemble import assemble
from zoo.components.decoder.model import Decoder
from zoo.loading.load import random_weights
from zoo.registry.card import Card
from zoo.registry.plan import Plan
from zoo.registry.resolve import resolve

NORM = {"kind": "rms", "eps": 1e-5}
ATTENTION = {"kind": "attention", "num_heads": 8, "num_kv_heads": 2, "head_dim": 6, "rope": {"theta": 50.0}}
GATED = {"kind": "gated", "hidden_dim": 20}
CLAMPED = {"kind": "clamped", "hidden_dim": 12, "gain": 1.7, "limit": 7.0}
MAMBA1 = {"kind": "mamba1", "inner_dim": 24, "state_size": 3, "dt_rank": 5, "conv_size": 4}
MAMBA2 = {"kind": "mamba2", "num_heads": 8, "head_dim": 5, "state_size": 3, "conv_size": 4, "norm_eps": 1e-5}
LATENT = {
    "kind": "latent_attention",
    "num_heads": 4,
    "q_lora_rank": 10,
    "kv_lora_rank": 7,
    "nope_head_dim": 6,
    "rope_head_dim": 4,
    "v_head_dim": 5,
    "rope": {"theta": 50.0},
}
MIXTURE = {"kind": "moe", "num_experts": 4, "experts_per_token": 2, "expert": GATED}
VISION = {
    "kind": "pixtral",
    "token": 10,
    "dim": 12,
    "num_layers": 2,
    "num_heads": 3,
    "hidden_dim": 20,
    "patch_size": 3,
    "max_image_size": 24,
    "theta": 100.0,
    "norm": NORM,
    "projector": {"bias": True},
}
AUDIO = {
    "kind": "whisper",
    "token": 11,
    "dim": 12,
    "num_layers": 2,
    "num_heads": 3,
    "hidden_dim": 20,
    "num_mel_bins": 5,
    "positions": 4,
    "stack": 4,
    "norm": {"kind": "layer", "eps": 1e-5},
}
EVERYTHING: list[dict[str, Any]] = [
    {"mixer": ATTENTION, "ffn": GATED},
    {"mixer": MAMBA1, "ffn": MIXTURE},
    {"mixer": {**MAMBA2, "num_groups": 1}, "ffn": None},
    {"mixer": {**ATTENTION, "window": 7}, "ffn": {**GATED, "hidden_dim": 12}},
    {"mixer": {**MAMBA2, "num_groups": 4}, "ffn": None},
    {"mixer": LATENT, "ffn": {**MIXTURE, "num_experts": 8, "experts_per_token": 3, "shared": GATED}},
]
"""Layers of every kind: attention, a window, both Mambas, latent attention, mixtures."""


def make_card(name: str, layers: list[dict[str, Any]], context: int = 64, **model: Any) -> dict[str, Any]:
    """A card of these layers."""
    sizes = {"dim": 18, "vocab_size": 67, "norm": NORM, "layers": layers, **model}
    return {"name": name, "context_length": context, "model": sizes}


def make_plan(mixer: dict[str, Any] = ATTENTION, ffn: dict[str, Any] = GATED, **model: Any) -> Plan:
    """The plan of two layers of one kind."""
    layers = model.pop("layers", [{"repeat": 2, "mixer": mixer, "ffn": ffn}])
    return resolve(Card.from_dict(make_card("shared-out", layers, **model)))


def filled(plan: Plan, size: float = 0.1) -> Decoder:
    """A model with weights that are nowhere zero, of about this size."""
    module = assemble(plan, torch.float32)
    random_weights(module, plan)
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return module
