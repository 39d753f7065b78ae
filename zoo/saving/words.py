"""A card in the words of families.yaml. What has no word here, or is not the same in all layers, shows in reading back."""

from __future__ import annotations

from typing import Any

from zoo.loading.infer.families import Node, families, keys_of
from zoo.loading.infer.ropes import FULL, LOCAL
from zoo.registry.card import Card

RECURRENT = ("mamba1", "mamba2")


def words(card: Card, *, listed: bool) -> Node | None:
    """Our words and their values; None for kinds of layers that have none.

    listed: windows that differ are a list for all layers, as a params.json has them, and else the largest alone.
    """
    layers = layers_of(card)
    kinds = {layer["mixer"]["kind"] if layer.get("mixer") else None for layer in layers}
    model = {name: value for name, value in card.model.items() if name not in ("layers", "norm")}
    common = {
        "tied_embeddings": False,
        **model,
        "eps": card.model["norm"]["eps"],
        "context_length": card.context_length,
        "num_layers": len(layers),
    }
    if len(kinds) == 1 and kinds <= set(RECURRENT):
        return common | _recurrent(layers[0]["mixer"], card.model["dim"])
    if kinds == {"attention"} and all(layer.get("ffn") for layer in layers):
        return common | _attention(layers, listed)
    return None


def layers_of(card: Card) -> list[Node]:
    """Every layer's node, runs and patterns laid out."""
    return _expanded(card.model["layers"])


def _expanded(runs: list[Node]) -> list[Node]:
    layers: list[Node] = []
    for run in runs:
        node = {key: value for key, value in run.items() if key not in ("repeat", "pattern")}
        part = _expanded(run["pattern"]) if "pattern" in run else [node]
        layers += part * run.get("repeat", 1)
    return layers


def _recurrent(mixer: Node, dim: int) -> Node:
    inner = mixer["inner_dim"] if "inner_dim" in mixer else mixer["num_heads"] * mixer["head_dim"]
    usual = {"bias": False, "conv_bias": True}
    expand = inner // dim if inner % dim == 0 else inner / dim
    return {**usual, **mixer, "expand": expand, "bcdt_eps": (mixer.get("bcdt_norm") or {}).get("eps")}


def _attention(layers: list[Node], listed: bool) -> Node:
    first, mixer, ffn = layers[0], layers[0]["mixer"], layers[0]["ffn"]
    windows = [layer["mixer"].get("window") for layer in layers]
    known = families()["activations"]
    expert = ffn.get("expert") or ffn
    return {
        "qkv_bias": False,
        "o_bias": False,
        **{name: value for name, value in first.items() if name not in ("mixer", "ffn", "kind")},
        **{name: value for name, value in mixer.items() if name not in ("kind", "rope")},
        "scale_dim": round(mixer["scale"] ** -2) if "scale" in mixer else mixer["head_dim"],
        "activation": next((key for key, value in known.items() if value == expert.get("activation", "silu")), None),
        **{word: expert.get("hidden_dim") for word in ("hidden_dim", "expert_hidden_dim")},
        "window": windows if listed and len(set(windows)) > 1 else max(window or 0 for window in windows) or None,
        "window_switch": any(windows),
        "window_from": next((i for i, window in enumerate(windows) if window), len(layers)),
        "rope_layers": [int(layer["mixer"].get("rope") is not None) for layer in layers],
        "layer_types": [LOCAL if window else FULL for window in windows],
        **{name: ffn[name] for name in ("num_experts", "experts_per_token") if name in ffn},
    }


def rope_keys(card: Card, row: Node) -> Node | None:
    """The keys of a settings file that say the card's rotary positions; None where it has none for them."""
    mixers = [layer["mixer"] for layer in layers_of(card)]
    ropes = {LOCAL if mixer.get("window") else FULL: mixer for mixer in mixers if mixer.get("rope")}
    if not ropes:
        return {}
    if row["rope"] == "params":
        return _of_params(next(iter(ropes.values())))
    said = {kind: _of_config(mixer) for kind, mixer in ropes.items()}
    by_type = bool(keys_of(row, "local_theta"))
    return {"rope_parameters": said if by_type else next(iter(said.values()))}


def _of_params(mixer: Node) -> Node | None:
    rope, scaling = mixer["rope"], mixer.get("query_scaling")
    found: Node = {"rope_theta": rope["theta"]}
    if rope.get("kind", "default") not in ("default", "yarn"):
        return None
    if rope.get("kind") == "yarn":
        found["yarn"] = {
            "factor": rope["factor"],
            "original_max_position_embeddings": rope["original_context"],
            "beta": rope.get("beta_fast", 32.0),
            "alpha": rope.get("beta_slow", 1.0),
            "apply_scale": "attention_factor" not in rope,
        }
    if scaling:
        context = scaling["original_context"]
        found["llama_4_scaling"] = {"original_max_position_embeddings": context, "beta": scaling["beta"]}
    return found


def _of_config(mixer: Node) -> Node:
    rope: dict[str, Any] = mixer["rope"]
    kind = rope.get("kind", "default")
    names = families()["rope_types"].get(kind, {})
    found: Node = {"rope_type": kind, "rope_theta": rope["theta"]}
    found |= {key.removesuffix("?"): rope[field] for field, key in names.items() if field in rope}
    if "attention_factor" in rope:
        found["attention_factor"] = rope["attention_factor"]
    if "rotary_dim" in rope:
        found["partial_rotary_factor"] = rope["rotary_dim"] / mixer["head_dim"]
    if mixer.get("query_scaling"):
        found["llama_4_scaling_beta"] = mixer["query_scaling"]["beta"]
    return found
