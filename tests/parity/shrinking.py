"""Cards with small sizes. The structure stays the card's own: its runs and patterns, windows or none, experts, ratio of
query to key heads, theta."""

from __future__ import annotations

from fnmatch import fnmatch
from math import ceil, lcm
from pathlib import Path
from typing import Any

import yaml

from zoo.loading.infer.families import families, keys_of
from zoo.registry.card import load_card
from zoo.registry.manager import manager

BUILT_IN = sorted(name for name, card in manager().cards().items() if card.owner == "zoo.cards")
CARDS = [name for name in BUILT_IN if load_card(name).unsupported is None]
REFERENCES: dict[str, str] = yaml.safe_load((Path(__file__).parent / "references.yaml").read_text(encoding="utf-8"))

WINDOW, ORIGINAL = 7, 16
RECURRENT: dict[str, dict[str, int]] = {
    "mamba2": {"num_heads": 16, "state_size": 6},
    "mamba1": {"state_size": 6, "dt_rank": 3},
}
"""Sizes of a shrunk mixer; the others follow from the model's."""
AUDIO = {"dim": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 64, "num_mel_bins": 5, "positions": 8}
ENCODER = {"dim": 32, "num_layers": 2, "num_heads": 2, "hidden_dim": 24, "patch_size": 4, "max_image_size": 32}


def plain(name: str) -> dict[str, Any]:
    """The card without place of weights and tokenizer, every run as a repeated pattern."""
    card = load_card(name).to_dict()
    if "inside" not in rows_of(name)[0]:
        card["model"].pop("vision", None)  # the language model is compared alone, image encoders in test_vision.py
    card["model"]["layers"] = [
        {"repeat": run.get("repeat", 1), "pattern": flat(run | {"repeat": 1})} for run in card["model"]["layers"]
    ]
    return {"name": name, "context_length": card["context_length"], "model": card["model"]}


def flat(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The layers of a run, one by one."""
    parts = [layer for part in run["pattern"] for layer in flat(part)] if "pattern" in run else [dict(run)]
    for layer in parts:
        layer.pop("repeat", None)
    repeat: int = run.get("repeat", 1)
    return parts * repeat


def shrunk(name: str) -> dict[str, Any]:
    """The card with small sizes, and each of its patterns once, or twice where it is one layer."""
    card = plain(name)
    _, row = rows_of(name)
    card["context_length"] = 64 if keys_of(row, "context_length") else families()["assumed_context"]
    for run in card["model"]["layers"]:
        run["repeat"] = 1 if len(run["pattern"]) > 1 else 2
        run["pattern"] = [_layer(node) for node in run["pattern"]]
    _reconnect(mixers_of(card))
    shared = [_layer(node) for node in card["model"].get("shared", ())]
    heads = [mixer["num_heads"] for mixer in mixers_of(card) if "num_heads" in mixer]
    whole = lcm(*heads, 4)  # what some classes of transformers ask for
    dim = whole * ceil(40 / whole)
    if card["model"].get("embedding_scale") == card["model"]["dim"] ** 0.5:
        card["model"]["embedding_scale"] = dim**0.5
    card["model"] |= {"dim": dim, "vocab_size": 131}
    for mixer in mixers_of(card):
        inner = {"mamba2": {"head_dim": 2 * dim // 16}, "mamba1": {"inner_dim": 2 * dim}}  # as transformers asks for
        mixer |= inner.get(mixer["kind"], {})
    for node, sizes in (("audio", AUDIO), ("vision", ENCODER)):
        if node in card["model"]:
            card["model"][node] |= sizes
    if shared:
        card["model"]["shared"] = [_wide(node, dim) for node in shared]
    return card


def _wide(node: dict[str, Any], dim: int) -> dict[str, Any]:
    """A shared block, whose heads together are twice the model's size."""
    size = 2 * dim // node["mixer"]["num_heads"]
    return node | {"mixer": node["mixer"] | {"head_dim": size, "scale": (size / 2) ** -0.5}, "adapter_rank": 5}


def _layer(node: dict[str, Any]) -> dict[str, Any]:
    parts = {part: shrink(node[part]) for part, shrink in (("mixer", _mixer), ("ffn", _ffn)) if node.get(part)}
    return node | parts


def _mixer(mixer: dict[str, Any]) -> dict[str, Any]:
    if mixer["kind"] in RECURRENT:
        sizes = RECURRENT[mixer["kind"]]
        return {key: sizes.get(key, value) for key, value in mixer.items()}
    if mixer["kind"] == "latent_attention":
        return _latent(mixer)
    groups = mixer["num_heads"] // mixer["num_kv_heads"]
    mixer = mixer | {"num_heads": 2 * groups, "num_kv_heads": 2, "head_dim": 6}
    if mixer.get("window"):
        mixer["window"] = WINDOW
    if mixer["rope"] and "rotary_dim" in mixer["rope"]:
        mixer |= {"head_dim": 8, "rope": mixer["rope"] | {"rotary_dim": 4}}
    if mixer["rope"] and "original_context" in mixer["rope"]:
        mixer["rope"] = mixer["rope"] | {"original_context": ORIGINAL}
    if mixer.get("query_scaling"):
        mixer["query_scaling"] = mixer["query_scaling"] | {"original_context": ORIGINAL}
    return mixer


def _latent(mixer: dict[str, Any]) -> dict[str, Any]:
    turned = mixer["rope_head_dim"] > 0
    sizes = {"num_heads": 4, "kv_lora_rank": 20, "v_head_dim": 10}
    sizes |= {"nope_head_dim": 6, "rope_head_dim": 4} if turned else {"nope_head_dim": 10}
    mixer = mixer | sizes | ({"q_lora_rank": 14} if mixer["q_lora_rank"] else {})
    if mixer.get("query_scaling"):
        mixer["query_scaling"] = mixer["query_scaling"] | {"original_context": ORIGINAL}
    if mixer.get("indexer"):
        mixer["indexer"] = mixer["indexer"] | {"num_heads": 16, "head_dim": 12, "top_k": 5}
    return mixer | ({"rope": mixer["rope"] | {"original_context": ORIGINAL}} if turned else {})


def _reconnect(mixers: list[dict[str, Any]]) -> None:
    """Lets layers that read an earlier layer's latents read those of the last one that is like it."""
    for number, mixer in enumerate(mixers):
        if "cache" in mixer:
            lenders = (i for i, m in enumerate(mixers[:number]) if "cache" not in m and not m["rope"])
            mixer["cache"] = mixer["cache"] | {"layer": max(lenders)}


def _ffn(ffn: dict[str, Any]) -> dict[str, Any]:
    if ffn["kind"] != "moe":
        return ffn | {"hidden_dim": 24}
    parts = {"expert": ffn["expert"] | {"hidden_dim": 24}}
    if ffn.get("shared"):
        size = 24 * ffn["shared"]["hidden_dim"] // ffn["expert"]["hidden_dim"]
        parts["shared"] = ffn["shared"] | {"hidden_dim": size}
    return ffn | parts


def reference(name: str) -> str:
    """The `model_type` of the transformers class that a card is compared with."""
    place = f"{load_card(name).family}/{name}"
    return next(kind for pattern, kind in REFERENCES.items() if fnmatch(place, pattern))


def rows_of(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rows of families.yaml for a card, and for its language model where that is a part of a larger one."""
    rows = families()["config.json"]
    outer, _, inner = reference(name).partition("/")
    row = rows[outer]
    return row, rows[inner or row["inside"]["model_type"]] if "inside" in row else row


def layers_of(card: dict[str, Any]) -> list[dict[str, Any]]:
    return [node for run in card["model"]["layers"] for node in run["pattern"] * run["repeat"]]


def mixers_of(card: dict[str, Any]) -> list[dict[str, Any]]:
    return [layer["mixer"] for layer in layers_of(card) if layer.get("mixer")]
