"""Settings files of models with latent attention, in the spellings in which they are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from zoo.loading.infer import infer_card
from zoo.registry.card import Card, load_card
from zoo.registry.errors import CardError
from zoo.registry.resolve import resolve

YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
COMMON: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "hidden_act": "silu",
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_layer_freq": 1,
    "pretraining_tp": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
}
V2_LITE: dict[str, Any] = COMMON | {
    "model_type": "deepseek_v2",
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_group": 1,
    "topk_method": "greedy",
    "vocab_size": 102400,
}
V3: dict[str, Any] = COMMON | {
    "model_type": "deepseek_v3",
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}
LARGE_3: dict[str, Any] = {
    "dim": 7168,
    "n_layers": 61,
    "head_dim": 192,
    "hidden_dim": 16384,
    "n_heads": 128,
    "n_kv_heads": 128,
    "norm_eps": 1e-6,
    "vocab_size": 131072,
    "rope_theta": 10000.0,
    "max_position_embeddings": 294912,
    "max_seq_len": 262144,
    "tied_embeddings": False,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe": {
        "num_experts": 128,
        "num_experts_per_tok": 4,
        "num_shared_experts": 1,
        "expert_hidden_dim": 4096,
        "first_k_dense_replace": 3,
        "route_every_n": 1,
        "routed_scale": 1.0,
        "num_expert_groups": 1,
        "num_expert_groups_per_tok": 1,
    },
    "llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 8192},
    "yarn": {"alpha": 1, "apply_scale": False, "beta": 32, "factor": 36, "original_max_position_embeddings": 8192},
    "vision_encoder": {
        "hidden_size": 1664,
        "num_channels": 3,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "intermediate_size": 8192,
        "rope_theta": 10000.0,
        "image_token_id": 10,
        "image_break_token_id": 12,
        "image_end_token_id": 13,
        "patch_size": 14,
        "image_size": 1540,
        "max_image_size": 1540,
        "adapter_bias": False,
        "spatial_merge_size": 2,
        "add_pre_mm_projector_layer_norm": True,
        "mm_projector_id": "patch_merge",
    },
}
FILES = {
    "deepseek-v2-lite": ("config.json", V2_LITE),
    "deepseek-v3": ("config.json", V3),
    "mistral-large-3-2512": ("params.json", LARGE_3),
}


def inferred(folder: Path, name: str, settings: dict[str, Any]) -> Card:
    (folder / name).write_text(json.dumps(settings), encoding="utf-8")
    return Card.from_dict(infer_card(folder))


@pytest.mark.parametrize("name", FILES)
def test_published_settings_give_the_card(name: str, tmp_path: Path) -> None:
    card = load_card(name)
    if FILES[name][0] == "params.json":
        # Mistral's code has this one, transformers, and with it the card, the language model's: see docs/formats.md.
        card = card.with_overrides({"model.vision.projector.norm.eps": 1e-5})
    found = inferred(tmp_path, *FILES[name])
    assert resolve(found).model == resolve(card).model
    assert found.context_length == card.context_length


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("deepseek-v3", {"rope_interleave": False}, "rope_interleave has a value that zoo does not read"),
        ("deepseek-v3", {"num_key_value_heads": 8}, "found 8; expected 128, one for each head"),
        ("deepseek-v3", {"scoring_func": "softmax"}, "scoring_func has a value that zoo does not read"),
        ("deepseek-v2-lite", {"topk_method": "group_limited_greedy"}, "topk_method has a value that zoo does not read"),
        ("deepseek-v2-lite", {"first_k_dense_replace": 28}, "found 28; expected what fits 27 layers"),
        ("mistral-large-3-2512", {"qk_rope_head_dim": None}, "the key 'qk_rope_head_dim' is missing"),
        ("mistral-large-3-2512", {"n_kv_heads": 8}, "found 8; expected 128, one for each head"),
    ],
)
def test_what_is_refused(name: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    file, settings = FILES[name]
    with pytest.raises(CardError, match=message):
        inferred(tmp_path, file, settings | change)
