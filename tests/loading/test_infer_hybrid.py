"""Cards inferred from the settings of models whose layers are of several kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from zoo.loading.infer import infer_card
from zoo.registry.card import Card, load_card
from zoo.registry.errors import CardError
from zoo.registry.resolve import resolve

GRANITE: dict[str, Any] = {  # the published file of the 3B hybrid
    "model_type": "granitemoehybrid",
    "attention_bias": False,
    "attention_multiplier": 0.015625,
    "dtype": "bfloat16",
    "embedding_multiplier": 12,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "layer_types": (["mamba"] * 5 + ["attention"] + ["mamba"] * 4) * 4,
    "logits_scaling": 8,
    "mamba_chunk_size": 256,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 64,
    "mamba_proj_bias": False,
    "max_position_embeddings": 131072,
    "normalization_function": "rmsnorm",
    "num_attention_heads": 32,
    "num_experts_per_tok": 0,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "num_local_experts": 0,
    "output_router_logits": False,
    "position_embedding_type": "nope",
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10000,
    "router_aux_loss_coef": 0.01,
    "shared_intermediate_size": 8192,
    "tie_word_embeddings": True,
    "vocab_size": 100352,
}
ZAMBA: dict[str, Any] = {  # the published file of the 2.7B model
    "model_type": "zamba2",
    "adapter_rank": 128,
    "add_bias_linear": False,
    "attention_dropout": 0.0,
    "attention_head_dim": 160,
    "attention_hidden_size": 5120,
    "chunk_size": 256,
    "ffn_hidden_size": 10240,
    "hidden_act": "gelu",
    "hidden_size": 2560,
    "hybrid_layer_ids": [6, 12, 18, 24, 30, 36, 42, 47, 51],
    "intermediate_size": 10240,
    "kv_channels": 80,
    "layers_block_type": ["mamba"]
    + (["mamba"] * 5 + ["hybrid"]) * 7
    + ["mamba"] * 4
    + ["hybrid"]
    + ["mamba"] * 3
    + ["hybrid"]
    + ["mamba"] * 2,
    "mamba_d_conv": 4,
    "mamba_d_state": 64,
    "mamba_expand": 2,
    "mamba_headdim": 64,
    "mamba_ngroups": 1,
    "max_position_embeddings": 4096,
    "n_mamba_heads": 80,
    "num_attention_heads": 32,
    "num_hidden_layers": 54,
    "num_key_value_heads": 32,
    "num_mem_blocks": 2,
    "num_query_groups": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000,
    "time_step_floor": 0.0001,
    "time_step_limit": None,
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "torch_dtype": "bfloat16",
    "use_conv_bias": True,
    "use_long_context": False,
    "use_mem_eff_path": False,
    "use_mem_rope": False,
    "use_shared_attention_adapter": False,
    "vocab_size": 32000,
}
TINY = GRANITE | {  # the 7B mixture
    "attention_multiplier": 0.0078125,
    "hidden_size": 1536,
    "intermediate_size": 512,
    "logits_scaling": 6,
    "mamba_n_heads": 48,
    "num_attention_heads": 12,
    "num_experts_per_tok": 6,
    "num_key_value_heads": 4,
    "num_local_experts": 64,
    "shared_intermediate_size": 1024,
}
JAMBA: dict[str, Any] = {  # the published file
    "model_type": "jamba",
    "attention_dropout": 0.0,
    "attn_layer_offset": 4,
    "attn_layer_period": 8,
    "expert_layer_offset": 1,
    "expert_layer_period": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_state": 16,
    "mamba_dt_rank": 256,
    "mamba_expand": 2,
    "mamba_inner_layernorms": True,
    "mamba_proj_bias": False,
    "n_ctx": 262144,
    "num_attention_heads": 32,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_logits_to_keep": 1,
    "rms_norm_eps": 1e-6,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_mamba_kernels": True,
    "vocab_size": 65536,
}
NEMOTRON: dict[str, Any] = {
    "model_type": "nemotron_h",
    "attention_bias": False,
    "chunk_size": 128,
    "conv_kernel": 4,
    "expand": 2,
    "head_dim": 128,
    "hidden_size": 2688,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "intermediate_size": 1856,
    "layer_norm_epsilon": 1e-5,
    "mamba_head_dim": 64,
    "mamba_hidden_act": "silu",
    "mamba_num_heads": 64,
    "mamba_proj_bias": False,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "n_group": 1,
    "n_groups": 8,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 52,
    "num_key_value_heads": 2,
    "routed_scaling_factor": 2.5,
    "ssm_state_size": 128,
    "time_step_limit": [0.0, float("inf")],
    "time_step_min": 0.001,
    "topk_group": 1,
    "use_bias": False,
    "use_conv_bias": True,
    "vocab_size": 131072,
}
PUBLISHED = {
    "granite-4.0-h-micro": GRANITE,
    "granite-4.0-h-tiny": TINY,
    "jamba-v0.1": JAMBA,
    "nemotron-3-nano-30b-a3b": NEMOTRON | {"max_position_embeddings": 262144},
    "zamba2-2.7b": ZAMBA,
}


def inferred(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return infer_card(folder)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_give_the_card(name: str, tmp_path: Path) -> None:
    found = inferred(tmp_path, PUBLISHED[name]) | {"context_length": load_card(name).context_length}
    assert resolve(Card.from_dict(found)).model == resolve(load_card(name)).model


def test_sizes_of_mixers_that_no_layer_has_are_passed_over(tmp_path: Path) -> None:
    dense = GRANITE | {"layer_types": ["attention"] * 40, "position_embedding_type": "rope", "mamba_n_heads": 3}
    (run,) = inferred(tmp_path, dense)["model"]["layers"]
    assert run["repeat"] == 40
    assert run["mixer"]["rope"] == {"theta": 10000.0}
    pure = GRANITE | {"layer_types": ["mamba"] * 40, "num_attention_heads": None}
    (run,) = inferred(tmp_path, pure)["model"]["layers"]
    assert run["mixer"]["kind"] == "mamba2"


def test_layers_are_named_by_letters_or_words(tmp_path: Path) -> None:
    words = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
    letters = {key: value for key, value in NEMOTRON.items() if key != "hybrid_override_pattern"}
    listed = letters | {"layers_block_type": [words[letter] for letter in NEMOTRON["hybrid_override_pattern"]]}
    assert inferred(tmp_path, listed)["model"] == inferred(tmp_path, NEMOTRON)["model"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (NEMOTRON | {"hybrid_override_pattern": "ME*X" * 13}, 'found "X"; expected one of M, mamba'),
        (NEMOTRON | {"num_hidden_layers": 51}, "for each of 51 layers"),
        (NEMOTRON | {"moe_latent_size": 1024}, "not supported yet: experts that work in a smaller space"),
        (NEMOTRON | {"mlp_hidden_act": "relu"}, "mlp_hidden_act has a value"),
        (NEMOTRON | {"n_shared_experts": 2}, "n_shared_experts has a value"),
        (JAMBA | {"mamba_inner_layernorms": False}, "mamba_inner_layernorms has a value"),
        (JAMBA | {"attn_layer_period": 0}, "attn_layer_period has a value"),
    ],
)
def test_settings_of_other_hybrids_that_do_not_fit(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CardError, match=message.replace("*", r"\*")):
        inferred(tmp_path, settings)


def test_fewer_uses_than_shared_blocks(tmp_path: Path) -> None:
    once = ZAMBA | {"layers_block_type": ["mamba"] * 53 + ["hybrid"], "use_mem_rope": True}
    model = inferred(tmp_path, once)["model"]
    assert [block["mixer"]["rope"] for block in model["shared"]] == [{"theta": 10000.0}]
    assert model["layers"][1] == {"repeat": 1, "kind": "sharing", "number": 0, "mixer": model["layers"][0]["mixer"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 33}, "a divisor of twice hidden_size, 5120"),
        ({"use_long_context": True}, "use_long_context has a value"),
        ({"layers_block_type": ["m"] * 54}, 'found "m"; expected one of mamba, linear_attention, hybrid'),
    ],
)
def test_settings_of_shared_blocks_that_do_not_fit(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CardError, match=message):
        inferred(tmp_path, ZAMBA | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["mamba"] * 39}, "layer_types has a value that zoo does not read"),
        ({"layer_types": ["mamba"] * 39 + ["rnn"]}, 'found "rnn"; expected one of mamba, linear_attention, attention'),
        ({"position_embedding_type": "learned"}, 'found "learned"; expected "rope" or "nope"'),
        ({"mamba_n_heads": 63}, "heads that make up the inner size of 4096"),
        ({"time_step_limit": [0.001, 0.1]}, "no limit"),
        ({"hidden_act": "tanh"}, "hidden_act has a value"),
        ({"mamba_d_sate": 3}, "Did you mean 'mamba_d_state'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CardError, match=message):
        inferred(tmp_path, GRANITE | change)
