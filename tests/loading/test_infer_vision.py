"""Cards from settings files with an image encoder: Mistral's own params.json gives what the built-in cards say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from zoo.loading.infer import infer_card
from zoo.registry.card import Card, load_card
from zoo.registry.errors import CardError
from zoo.registry.resolve import resolve

TEXT = {"dim": 5120, "n_layers": 40, "head_dim": 128, "n_heads": 32, "n_kv_heads": 8, "rope_theta": 1e9}
TEXT |= {"norm_eps": 1e-5, "vocab_size": 131072, "max_position_embeddings": 131072}
ENCODER: dict[str, Any] = {
    "hidden_size": 1024,
    "num_channels": 3,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "rope_theta": 10000.0,
    "image_token_id": 10,
    "image_break_token_id": 12,
    "image_end_token_id": 13,
}
MERGED: dict[str, Any] = {"patch_size": 14, "image_size": 1540, "max_image_size": 1540, "adapter_bias": False}
MERGED |= {"spatial_merge_size": 2, "add_pre_mm_projector_layer_norm": True, "mm_projector_id": "patch_merge"}
FILES = {
    "pixtral-12b-base-2409": TEXT
    | {"hidden_dim": 14336, "vision_encoder": ENCODER | {"patch_size": 16, "image_size": 1024}},
    "mistral-small-3.1-base-2503": TEXT | {"hidden_dim": 32768, "vision_encoder": ENCODER | MERGED},
}


@pytest.mark.parametrize("name", list(FILES))
def test_params_say_what_the_card_says(name: str, tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(FILES[name]))
    assert resolve(Card.from_dict(infer_card(tmp_path))).model == resolve(load_card(name)).model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_projector_id": "pool"}, "mm_projector_id has a value that zoo does not read"),
        ({"num_channels": 4}, "num_channels has a value that zoo does not read"),
        ({"hidden_size": None}, "the key 'vision_encoder.hidden_size' is missing"),
        ({"depth": 3}, "1 key that zoo does not know; found vision_encoder.depth: 3"),
    ],
)
def test_what_zoo_would_compute_otherwise_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    values = FILES["mistral-small-3.1-base-2503"] | {"vision_encoder": ENCODER | MERGED | change}
    (tmp_path / "params.json").write_text(json.dumps(values))
    with pytest.raises(CardError, match=message):
        infer_card(tmp_path)


def test_a_model_that_sees_and_chats_says_so(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(FILES["pixtral-12b-base-2409"]))
    assert infer_card(tmp_path)["text"]["features"] == []
    (tmp_path / "tekken.json").write_text("{}")
    assert infer_card(tmp_path)["text"]["features"] == ["chat", "vision"]
