"""Mistral's own files of models with latent attention: the same numbers under other names give the same logits.

The renaming is written here, from the names in published files, and shares nothing with the tables of the layouts.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

import zoo
from zoo.testing import relative_error

EXPERTS, HIDDEN = 6, 12
SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 40,
    "moe_intermediate_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 14,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
}
YARN: dict[str, Any] = {"factor": 8.0, "original_max_position_embeddings": 16}
PARAMS: dict[str, Any] = {
    "dim": 48,
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 4,
    "head_dim": 10,
    "hidden_dim": 40,
    "vocab_size": 131,
    "norm_eps": 1e-6,
    "rope_theta": 1e4,
    "max_position_embeddings": 128,
    "tied_embeddings": False,
    "q_lora_rank": 14,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "yarn": {**YARN, "beta": 32.0, "alpha": 1.0, "apply_scale": False},
    "llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 16},
}
MOE: dict[str, Any] = {
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "expert_hidden_dim": HIDDEN,
    "num_shared_experts": 1,
    "route_every_n": 1,
    "routed_scale": 1.0,
    "num_expert_groups": 1,
    "num_expert_groups_per_tok": 1,
}
RENAMED = {
    r"^model\.embed_tokens": "tok_embeddings",
    r"^lm_head": "output",
    r"^model\.": "",
    r"\.input_layernorm": ".attention_norm",
    r"\.post_attention_layernorm": ".ffn_norm",
    r"\.self_attn\.q_a_proj": ".attention.wq_a",
    r"\.self_attn\.q_a_layernorm": ".attention.q_a_norm",
    r"\.self_attn\.q_b_proj": ".attention.wq_b",
    r"\.self_attn\.kv_a_proj_with_mqa": ".attention.wkv_a_with_mqa",
    r"\.self_attn\.kv_a_layernorm": ".attention.kv_a_norm",
    r"\.self_attn\.kv_b_proj": ".attention.wkv_b",
    r"\.self_attn\.o_proj": ".attention.wo",
    r"\.mlp\.gate\.": ".gate.",
    r"\.mlp\.shared_experts": ".shared_experts",
    r"\.mlp\.(gate|up|down)_proj": r".feed_forward.\1_proj",
    r"\.gate_proj": ".w1",
    r"\.up_proj": ".w3",
    r"\.down_proj": ".w2",
}


def native(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stacked = re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj", name)
        for expert, matrix in enumerate(tensor if stacked else ()):
            assert stacked is not None
            names = {"gate_up": ("w1", "w3"), "down": ("w2",)}[stacked[2]]
            for word, part in zip(names, matrix.chunk(len(names)), strict=True):
                found[f"layers.{stacked[1]}.experts.{expert}.{word}.weight"] = part.clone()
        if not stacked:
            for theirs, ours in RENAMED.items():
                name = re.sub(theirs, ours, name)
            found[name] = tensor
    return found


@pytest.mark.parametrize("dense", [0, 1])
def test_native_names_give_the_same_logits(tmp_path: Path, dense: int) -> None:
    torch.manual_seed(0)
    rope = {"rope_type": "yarn", "rope_theta": 1e4, **YARN, "beta_fast": 32.0, "beta_slow": 1.0}
    rope |= {"attention_factor": 1.0, "mscale_all_dim": 0.0, "llama_4_scaling_beta": 0.1}
    config = transformers.Mistral4Config(**SIZES, first_k_dense_replace=dense, rope_parameters=rope)
    model = transformers.Mistral4ForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.15)
    save_file(native(dict(model.state_dict())), tmp_path / "consolidated.safetensors")
    (tmp_path / "params.json").write_text(json.dumps(PARAMS | {"moe": MOE | {"first_k_dense_replace": dense}}))
    tokens = torch.randint(131, (40,)).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
    with zoo.load(tmp_path, device="cpu", dtype="float32") as ours:
        assert relative_error(ours.logits(tokens), expected) < 1e-4
