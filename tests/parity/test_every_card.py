"""Every built-in card, shrunk, against the matching class of transformers.

The structure stays the card's own: its runs and patterns, windows or none, experts, ratio of query to key heads, theta.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

import zoo
from zoo.assemble import assemble
from zoo.loading.layouts import layout_named
from zoo.loading.mapping import plan_mapping
from zoo.loading.reader import TensorInfo
from zoo.registry.card import Card, load_card
from zoo.registry.manager import manager
from zoo.registry.resolve import resolve
from zoo.testing import relative_error, step_through

CARDS = sorted(name for name, card in manager().cards().items() if card.owner == "zoo.cards")
WINDOW, LENGTH = 7, 19
TOLERANCE = 1e-4


def plain(name: str) -> dict[str, Any]:
    """The card without place of weights and tokenizer, every run as a repeated pattern."""
    card = load_card(name).to_dict()
    for i, run in enumerate(card["model"]["layers"]):
        repeat = run.pop("repeat", 1)
        card["model"]["layers"][i] = {"repeat": repeat, "pattern": run.pop("pattern", None) or [run]}
    return {"name": name, "context_length": card["context_length"], "model": card["model"]}


def shrunk(name: str) -> dict[str, Any]:
    """The card with small sizes, and each of its patterns once, or twice where it is one layer."""
    card = plain(name)
    card["context_length"] = 64
    card["model"] |= {"dim": 40, "vocab_size": 131}
    for run in card["model"]["layers"]:
        run["repeat"] = 1 if len(run["pattern"]) > 1 else 2
        run["pattern"] = [_layer(node) for node in run["pattern"]]
    return card


def _layer(node: dict[str, Any]) -> dict[str, Any]:
    mixer, ffn = dict(node["mixer"]), dict(node["ffn"])
    groups = mixer["num_heads"] // mixer["num_kv_heads"]
    mixer |= {"num_heads": 2 * groups, "num_kv_heads": 2, "head_dim": 6}
    if mixer.get("window"):
        mixer["window"] = WINDOW
    if ffn["kind"] == "moe":
        return {"mixer": mixer, "ffn": ffn | {"expert": ffn["expert"] | {"hidden_dim": 24}}}
    return {"mixer": mixer, "ffn": ffn | {"hidden_dim": 24}}


def transformers_model(card: dict[str, Any]) -> Any:
    """transformers' model of the same shape."""
    layers = [node for run in card["model"]["layers"] for node in run["pattern"] * run["repeat"]]
    mixer, ffn = layers[0]["mixer"], layers[0]["ffn"]
    windows = [layer["mixer"].get("window") for layer in layers]
    settings: dict[str, Any] = {
        "hidden_size": card["model"]["dim"],
        "vocab_size": card["model"]["vocab_size"],
        "num_hidden_layers": len(layers),
        "num_attention_heads": mixer["num_heads"],
        "num_key_value_heads": mixer["num_kv_heads"],
        "head_dim": mixer["head_dim"],
        "intermediate_size": (ffn.get("expert") or ffn)["hidden_dim"],
        "rms_norm_eps": card["model"]["norm"]["eps"],
        "rope_parameters": {"rope_type": "default", "rope_theta": mixer["rope"]["theta"]},
        "sliding_window": max(window or 0 for window in windows) or None,
        "tie_word_embeddings": False,
        "max_position_embeddings": card["context_length"],
    }
    family = "Mistral" if len({*windows}) == 1 else "Ministral"
    if family == "Ministral":
        settings["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windows]
    if ffn["kind"] == "moe":
        family = "Mixtral"
        settings |= {"num_local_experts": ffn["num_experts"], "num_experts_per_tok": ffn["experts_per_token"]}
    config = getattr(transformers, f"{family}Config")(**settings)
    return getattr(transformers, f"{family}ForCausalLM")(config)


def random_model(card: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = transformers_model(card).float().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.15)
    return model


@pytest.mark.parametrize("name", CARDS)
def test_shrunk_card_equals_transformers(name: str, tmp_path: Path) -> None:
    card = shrunk(name)
    model = random_model(card)
    model.save_pretrained(tmp_path)
    tokens = torch.randint(card["model"]["vocab_size"], (LENGTH,)).tolist()
    with torch.inference_mode():
        expected_TV = model(torch.tensor([tokens])).logits[0]
    with zoo.load(card, weights=tmp_path, device="cpu", dtype="float32") as ours:
        assert relative_error(ours.logits(tokens), expected_TV) < TOLERANCE
        for chunk in (5, 1):
            assert relative_error(step_through(ours.module, [tokens], chunk)[0], expected_TV) < TOLERANCE


def native_model(mistral_inference: ModuleType, card: dict[str, Any]) -> Any:
    """mistral-inference's model of the same shape."""
    layers = [node for run in card["model"]["layers"] for node in run["pattern"] * run["repeat"]]
    mixer, ffn = layers[0]["mixer"], layers[0]["ffn"]
    params: dict[str, Any] = {
        "dim": card["model"]["dim"],
        "vocab_size": card["model"]["vocab_size"],
        "n_layers": len(layers),
        "n_heads": mixer["num_heads"],
        "n_kv_heads": mixer["num_kv_heads"],
        "head_dim": mixer["head_dim"],
        "hidden_dim": (ffn.get("expert") or ffn)["hidden_dim"],
        "norm_eps": card["model"]["norm"]["eps"],
    }
    if ffn["kind"] == "moe":
        params["moe"] = {"num_experts": ffn["num_experts"], "num_experts_per_tok": ffn["experts_per_token"]}
    return mistral_inference.Transformer(mistral_inference.TransformerArgs.from_dict(params))


@pytest.mark.parametrize("name", [name for name in CARDS if load_card(name).extends is None])
def test_both_layouts_close_at_full_size(name: str, mistral_inference: ModuleType) -> None:
    """Every tensor that the two libraries have, of the same shape, and no other; without any weights."""
    card = plain(name)
    with torch.device("meta"):
        models = {"huggingface": transformers_model(card), "mistral": native_model(mistral_inference, card)}
        assemble(resolve(Card.from_dict(card)), torch.bfloat16)
    for layout, model in models.items():
        headers = {
            key: TensorInfo(key, tuple(value.shape), "BF16", Path("model.safetensors"), 0, 2 * value.numel())
            for key, value in model.state_dict().items()
        }
        plan_mapping(resolve(load_card(name)).model, layout_named(layout), headers, "meta")


def test_shrinking_keeps_the_structure() -> None:
    ministral, mixtral = shrunk("ministral-8b-instruct"), shrunk("mixtral-8x22b")
    (run,) = ministral["model"]["layers"]
    assert [node["mixer"].get("window") for node in run["pattern"]] == [None, WINDOW, WINDOW, WINDOW]
    (node,) = mixtral["model"]["layers"][0]["pattern"]
    assert node["ffn"]["num_experts"] == 8
    assert node["mixer"]["num_heads"] == 6 * node["mixer"]["num_kv_heads"]
