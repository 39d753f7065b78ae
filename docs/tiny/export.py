"""Writes a trained model as Mistral's own files: params.json and consolidated.safetensors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from zoo.components.attention.spec import AttentionSpec
from zoo.components.decoder.model import Decoder
from zoo.components.decoder.spec import DecoderSpec
from zoo.components.ffn.spec import GatedSpec, MoESpec
from zoo.components.norm.spec import RMSSpec
from zoo.registry.spec import Rotary

NAMES = (
    (r"^embed\.", "tok_embeddings."),
    (r"^head\.", "output."),
    (r"mixer_norm", "attention_norm"),
    (r"mixer\.(\w)\.", r"attention.w\1."),
    (r"\.gate\.", ".w1."),
    (r"\.down\.", ".w2."),
    (r"\.up\.", ".w3."),
    (r"ffn\.router", "ffn.gate"),
    (r"ffn\.", "feed_forward."),
)


def save(model: Decoder, folder: Path) -> None:
    """consolidated.safetensors in bfloat16 and params.json, both as Mistral publishes them."""
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in native(model).items()}
    weights = folder / "consolidated.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # the writer leaves a file that its owner alone can read
    (folder / "params.json").write_text(json.dumps(params(model.spec), indent=4) + "\n", encoding="utf-8")


def native(model: Decoder) -> dict[str, Tensor]:
    """Every checkpoint tensor under Mistral's name, with the rows of a rope pair side by side."""
    stored = dict(model.named_parameters())
    found = {}
    for tensor in model.spec.tensors():
        value = stored[tensor.param].detach()[tensor.index]
        found[_native_name(tensor.name)] = value if tensor.rotary is None else _interleaved(value, tensor.rotary)
    return found


def _native_name(name: str) -> str:
    """layers.0.ffn.experts.3.up.weight -> layers.0.feed_forward.experts.3.w3.weight"""
    for pattern, to in NAMES:
        name = re.sub(pattern, to, name)
    return name


def _interleaved(rows: Tensor, rotary: Rotary) -> Tensor:
    """zoo turns lanes i and i + d/2 of a head together; Mistral's files have these two rows next to each other."""
    assert rotary.rotary_dim == rotary.head_dim
    halves = rows.view(-1, 2, rotary.head_dim // 2, rows.shape[-1])
    return halves.transpose(1, 2).reshape(rows.shape)


def params(spec: DecoderSpec) -> dict[str, object]:
    """params.json of a mixture of experts whose layers are all alike."""
    layer = spec.layers[0]
    mixer, ffn, norm = layer.mixer, layer.ffn, spec.norm  # type: ignore[attr-defined]
    assert isinstance(mixer, AttentionSpec) and isinstance(ffn, MoESpec) and isinstance(norm, RMSSpec)
    assert mixer.rope is not None and isinstance(ffn.expert, GatedSpec)
    return {
        "dim": spec.dim,
        "n_layers": len(spec.layers),
        "head_dim": mixer.head_dim,
        "hidden_dim": ffn.expert.hidden_dim,
        "n_heads": mixer.num_heads,
        "n_kv_heads": mixer.num_kv_heads,
        "norm_eps": norm.eps,
        "vocab_size": spec.vocab_size,
        "rope_theta": mixer.rope.theta,
        "sliding_window": mixer.window,
        "max_seq_len": spec.context_length,
        "moe": {"num_experts": ffn.num_experts, "num_experts_per_tok": ffn.experts_per_token},
    }
