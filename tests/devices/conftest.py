"""Models that one process and several run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="package")
def everything() -> dict[str, Any]:
    """A card with every mixer, mixtures and an encoder: attention, a window, both Mambas, latent attention."""
    attention = {"kind": "attention", "num_heads": 8, "num_kv_heads": 2, "head_dim": 6, "rope": {"theta": 50.0}}
    gated = {"kind": "gated", "hidden_dim": 20}
    mamba1 = {"kind": "mamba1", "inner_dim": 24, "state_size": 3, "dt_rank": 5, "conv_size": 4}
    mamba2 = {"kind": "mamba2", "num_heads": 8, "head_dim": 5, "state_size": 3, "conv_size": 4, "norm_eps": 1e-5}
    latent = {
        "kind": "latent_attention",
        "num_heads": 4,
        "q_lora_rank": 10,
        "kv_lora_rank": 7,
        "nope_head_dim": 6,
        "rope_head_dim": 4,
        "v_head_dim": 5,
        "rope": {"theta": 50.0},
    }
    layers = [
        {"mixer": attention, "ffn": gated},
        {"mixer": mamba1, "ffn": {"kind": "moe", "num_experts": 4, "experts_per_token": 2, "expert": gated}},
        {"mixer": {**mamba2, "num_groups": 1}, "ffn": None},
        {"mixer": {**attention, "window": 7}, "ffn": {**gated, "hidden_dim": 12}},
        {"mixer": {**mamba2, "num_groups": 4}, "ffn": None},
        {
            "mixer": latent,
            "ffn": {"kind": "moe", "num_experts": 8, "experts_per_token": 3, "expert": gated, "shared": gated},
        },
    ]
    norm = {"kind": "rms", "eps": 1e-5}
    vision = {"kind": "pixtral", "token": 10, "dim": 12, "num_layers": 2, "num_heads": 3, "hidden_dim": 20}
    vision |= {"patch_size": 3, "max_image_size": 24, "theta": 100.0, "norm": norm, "projector": {"bias": True}}
    model = {"dim": 18, "vocab_size": 67, "norm": norm, "layers": layers, "vision": vision}
    return {"name": "everything", "context_length": 64, "model": model}


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Ranks wait for each other at most so long, and the processes of these tests take one core each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_DEADLINE", "60")
        patch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
        yield
