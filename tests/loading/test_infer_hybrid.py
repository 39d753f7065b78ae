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


def inferred(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return infer_card(folder)


@pytest.mark.parametrize(("settings", "card"), [(GRANITE, "granite-4.0-h-micro"), (ZAMBA, "zamba2-2.7b")])
def test_published_settings_give_the_card(settings: dict[str, Any], card: str, tmp_path: Path) -> None:
    found = inferred(tmp_path, settings)
    assert resolve(Card.from_dict(found)).model == resolve(load_card(card)).model


def test_sizes_of_mixers_that_no_layer_has_are_passed_over(tmp_path: Path) -> None:
    dense = GRANITE | {"layer_types": ["attention"] * 40, "position_embedding_type": "rope", "mamba_n_heads": 3}
    (run,) = inferred(tmp_path, dense)["model"]["layers"]
    assert run["repeat"] == 40
    assert run["mixer"]["rope"] == {"theta": 10000.0}
    pure = GRANITE | {"layer_types": ["mamba"] * 40, "num_attention_heads": None}
    (run,) = inferred(tmp_path, pure)["model"]["layers"]
    assert run["mixer"]["kind"] == "mamba2"


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
