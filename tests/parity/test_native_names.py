"""The same weights under Mistral's own names and under transformers' give the same logits; for Mamba see test_mamba."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import zoo

SIZES: dict[str, Any] = {
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "vocab_size": 131,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "pad_token_id": None,
}
PARAMS: dict[str, Any] = {
    "dim": 40,
    "hidden_dim": 56,
    "n_layers": 3,
    "n_heads": 6,
    "n_kv_heads": 2,
    "head_dim": 10,
    "vocab_size": 131,
    "max_seq_len": 64,
    "norm_eps": 1e-5,
    "rope_theta": 1e6,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}

# transformers' class, its further settings, and what a params.json says of them.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dense": ("Mistral", {}, {}),
    "tied": ("Mistral", {"tie_word_embeddings": True}, {"tied_embeddings": True}),
    "window": ("Mistral", {"sliding_window": 5}, {"sliding_window": 5}),
    "yarn": (
        "Mistral",
        {"rope_parameters": YARN | {"beta_fast": 4.0, "beta_slow": 1.0}},
        {"yarn": {"factor": 4.0, "original_max_position_embeddings": 16, "beta": 4.0, "alpha": 1.0}},
    ),
    "mixture": (
        "Mixtral",
        {"num_local_experts": 5, "num_experts_per_tok": 3},
        {"moe": {"num_experts": 5, "num_experts_per_tok": 3}},
    ),
}

NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "model.norm": "norm",
    "model.layers": "layers",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "block_sparse_moe": "feed_forward",
}


def renamed(tensors: dict[str, torch.Tensor], head_dim: int) -> dict[str, torch.Tensor]:
    """transformers' names and order of rows as Mistral's: lanes i and i + half of a head become 2i and 2i + 1."""
    found = {}
    for name, tensor in tensors.items():
        for theirs, native in NAMES.items():
            name = re.sub(rf"(^|\.){re.escape(theirs)}\.", rf"\g<1>{native}.", name)
        if ".wq." in name or ".wk." in name:
            half = head_dim // 2
            lanes = [lane // 2 + half * (lane % 2) for lane in range(head_dim)]
            tensor = tensor[[head + lane for head in range(0, len(tensor), head_dim) for lane in lanes]]
        found[name] = tensor.contiguous()
    return found


@pytest.mark.parametrize("case", CASES)
def test_native_names_give_the_same_logits(case: str, tmp_path: Path) -> None:
    name, changes, said = CASES[case]
    settings = SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}} | changes
    torch.manual_seed(1)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**settings)).float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.15)
    model.save_pretrained(tmp_path / "theirs")
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    (tmp_path / "native").mkdir()
    save_file(renamed(tensors, 10), tmp_path / "native" / "consolidated.safetensors")
    (tmp_path / "native" / "params.json").write_text(json.dumps(PARAMS | said), encoding="utf-8")
    tokens = torch.randint(131, (23,)).tolist()
    with (
        zoo.load(tmp_path / "theirs", device="cpu", dtype="float32") as theirs,
        zoo.load(tmp_path / "native", device="cpu", dtype="float32") as native,
    ):
        assert theirs.plan.model == native.plan.model
        assert torch.equal(theirs.logits(tokens), native.logits(tokens))
