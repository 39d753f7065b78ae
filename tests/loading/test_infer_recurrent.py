"""Cards inferred from the settings of models without attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from zoo.loading.infer import infer_card
from zoo.registry.card import Card
from zoo.registry.errors import CardError
from zoo.registry.resolve import resolve

NATIVE: dict[str, Any] = {
    "model_type": "mamba",
    "dim": 4096,
    "n_layers": 64,
    "vocab_size": 32768,
    "n_groups": 8,
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 1,
    "tie_embeddings": False,
}
MAMBA: dict[str, Any] = {
    "model_type": "mamba",
    "hidden_size": 768,
    "num_hidden_layers": 24,
    "vocab_size": 50280,
    "time_step_rank": 48,
    "intermediate_size": 1536,
    "residual_in_fp32": True,
    "time_step_min": 0.001,
}
MAMBA2: dict[str, Any] = {
    "model_type": "mamba2",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "vocab_size": 97,
    "num_heads": 8,
    "head_dim": 16,
    "n_groups": 2,
}


def inferred(folder: Path, settings: dict[str, Any], name: str = "config.json") -> dict[str, Any]:
    (folder / name).write_text(json.dumps(settings), encoding="utf-8")
    return infer_card(folder)


def mixer(card: dict[str, Any]) -> dict[str, Any]:
    [run] = card["model"]["layers"]
    assert run["ffn"] is None
    return run["mixer"]  # type: ignore[no-any-return]


def test_native_settings_give_the_card_of_the_model(tmp_path: Path) -> None:
    found = inferred(tmp_path, NATIVE, "params.json")
    expected = resolve(Card.from_dict({**found, "name": "x"})).model
    assert expected.all_parameters()["layers.0.mixer.in_proj.weight"].shape == (18560, 4096)
    assert sum(p.numel for p in expected.all_parameters().values()) == 7_285_403_648
    assert "32768 is assumed" in found["summary"]


def test_vocabulary_is_padded_as_stated(tmp_path: Path) -> None:
    padded = NATIVE | {"vocab_size": 50277, "pad_vocab_size_multiple": 16}
    assert inferred(tmp_path, padded, "params.json")["model"]["vocab_size"] == 50288


def test_sizes_that_are_left_out_are_the_reference_class_s(tmp_path: Path) -> None:
    assert mixer(inferred(tmp_path, MAMBA)) == {
        "kind": "mamba1",
        "inner_dim": 1536,
        "state_size": 16,
        "dt_rank": 48,
        "conv_size": 4,
    }


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"time_step_rank": "auto", "hidden_size": 40}, "dt_rank", 3),
        ({"intermediate_size": None, "expand": 3}, "inner_dim", 2304),
        ({"intermediate_size": 100, "expand": 16}, "inner_dim", 100),
        ({"use_bias": True}, "bias", True),
        ({"use_conv_bias": False}, "conv_bias", False),
        ({"model_type": "falcon_mamba"}, "bcdt_norm", {"eps": 1e-6, "weights": False}),
    ],
)
def test_settings_of_mamba_are_read(change: dict[str, Any], field: str, value: Any, tmp_path: Path) -> None:
    assert mixer(inferred(tmp_path, MAMBA | change))[field] == value


@pytest.mark.parametrize("infinity", [float("inf"), {"__float__": "Infinity"}])
def test_a_step_without_limit_is_read(infinity: Any, tmp_path: Path) -> None:
    found = mixer(inferred(tmp_path, MAMBA2 | {"time_step_limit": [0.0, infinity]}))
    assert (found["num_heads"], found["head_dim"], found["num_groups"]) == (8, 16, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (MAMBA2 | {"time_step_limit": [0.0, 0.5]}, "time_step_limit has a value that zoo does not read"),
        (MAMBA2 | {"num_heads": 9}, "heads that make up the inner size of 128"),
        (MAMBA2 | {"hidden_act": "gelu"}, "hidden_act has a value"),
        (MAMBA2 | {"n_group": 4}, "do you mean 'n_groups'|Did you mean 'n_groups'"),
        (MAMBA | {"expand": 1.3, "intermediate_size": None, "hidden_size": 7}, "expand has a value"),
        (MAMBA | {"conv_kernel": 0}, "a positive whole number"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CardError, match=message):
        inferred(tmp_path, settings)
