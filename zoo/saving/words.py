"""A card in the words of families.yaml. What has no word, or differs where one is said, shows in reading back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zoo.loading.infer.families import Node, families, keys_of
from zoo.loading.infer.ropes import FULL, LOCAL
from zoo.registry.card import Card

RECURRENT = ("mamba1", "mamba2")
NO_MIXTURE = {"num_experts": 0, "experts_per_token": 0, "groups": 1, "groups_per_token": 1}
NO_MIXTURE |= {"router_scale": 1, "normalize": True}


def words(card: Card, row: Node, *, listed: bool) -> Node | None:
    """Our words and their values; None for layers of kinds that a row of families.yaml has no words for.

    listed: windows that differ are a list for all layers, as a params.json has them, and else the largest alone.
    """
    layers, shared = layers_of(card), card.model.get("shared", [])
    mixers = [node["mixer"] for node in (*layers, *shared) if node.get("mixer")]
    ffns = [node["ffn"] for node in (*layers, *shared) if node.get("ffn")]
    spaces = [mixer for mixer in mixers if mixer["kind"] in RECURRENT]
    attention = [mixer for mixer in mixers if mixer["kind"] in ATTENTION]
    mixed, kinds = "layer_kinds" in row, _words_of_kinds(layers, row)
    whole = len(spaces if "recurrent" in row else attention) == len(layers)
    if len(spaces) + len(attention) != len(mixers) or (None in kinds if mixed else not whole):
        return None
    model = {name: value for name, value in card.model.items() if name not in ("layers", "norm", "shared")}
    return {
        "tied_embeddings": False,
        **model,
        "eps": card.model["norm"]["eps"],
        "context_length": card.context_length,
        "num_layers": len(layers),
        **{name: value for name, value in layers[0].items() if name not in ("mixer", "ffn", "kind")},
        **(_recurrent(spaces[0], card.model["dim"]) if spaces and not attention else {}),
        **(ATTENTION[attention[0]["kind"]](attention, listed) if attention else {}),
        **(_ffn(ffns) if ffns else {}),
        **({"layer_types": kinds, **_recurring(layers)} if mixed else {}),
        **(_shared(shared) if shared else {}),
    }


def state_space_words(card: Card) -> Node:
    """Words of the state-space mixers among other layers, and sizes that fit where there are none."""
    dim = card.model["dim"]
    mixers = [layer["mixer"] for layer in layers_of(card) if layer.get("mixer")]
    unused = {"num_heads": 1, "head_dim": 2 * dim}
    return _recurrent(next((mixer for mixer in mixers if mixer["kind"] in RECURRENT), unused), dim)


def _words_of_kinds(layers: list[Node], row: Node) -> list[str | None]:
    """What the architecture calls each layer, by the kinds of its mixer and of its feed-forward."""

    def word(layer: Node) -> str | None:
        ffn = _kind(layer, "ffn")
        fits = ("ffn", ffn if ffn == "moe" else "dense") if ffn else ("shared",) if "number" in layer else (None,)
        known = row.get("layer_kinds", {}).items()
        named = [name for name, kinds in known if kinds[0] == _kind(layer, "mixer") and kinds[1] in fits]
        return named[-1] if named else None

    return [word(layer) for layer in layers]


def _kind(layer: Node, part: str) -> str | None:
    return layer[part]["kind"] if layer.get(part) else None


def _recurring(layers: list[Node]) -> Node:
    """Where kinds of layers begin, and how often they come, where they do so regularly."""
    found: Node = {}
    for what, part, kind in (("attention", "mixer", "attention"), ("experts", "ffn", "moe")):
        places = [i for i, layer in enumerate(layers) if _kind(layer, part) == kind]
        if places:
            after = [*places, places[0] + len(layers)][1]
            found |= {f"{what}_offset": places[0], f"{what}_every": after - places[0]}
    return found


def _shared(shared: list[Node]) -> Node:
    """What is said of blocks that layers share."""
    return {
        "shared_blocks": len(shared),
        "positions": shared[0]["mixer"].get("rope") is not None,
        "adapter_rank": shared[0]["adapter_rank"],
        "adapt_mixer": shared[0].get("adapt_mixer", False),
    }


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


def _attention(mixers: list[Node], listed: bool) -> Node:
    mixer, windows = mixers[0], [mixer.get("window") for mixer in mixers]
    return {
        "qkv_bias": False,
        "o_bias": False,
        **{name: value for name, value in mixer.items() if name not in ("kind", "rope")},
        "scale_dim": round(mixer["scale"] ** -2) if "scale" in mixer else mixer["head_dim"],
        "window": windows if listed and len(set(windows)) > 1 else max(window or 0 for window in windows) or None,
        "window_switch": any(windows),
        "window_from": next((i for i, window in enumerate(windows) if window), len(windows)),
        "positions": "rope" if mixer.get("rope") else "nope",
        "rope_layers": [int(mixer.get("rope") is not None) for mixer in mixers],
        "layer_types": [LOCAL if window else FULL for window in windows],
    }


def _latent(mixers: list[Node], listed: bool) -> Node:
    mixer, indexers = mixers[0], [mixer.get("indexer") or {} for mixer in mixers]
    return {
        **{name: value for name, value in mixer.items() if name not in ("kind", "rope", "indexer", "cache")},
        "num_kv_heads": mixer["num_heads"],
        "window": None,
        "rope_layers": [int(mixer.get("rope") is not None) for mixer in mixers],
        "latent_sources": [mixer.get("cache", {}).get("layer", number) for number, mixer in enumerate(mixers)],
        "indexer_types": ["shared" if indexer.get("kind") == "shared" else "full" for indexer in indexers],
        **{f"index_{name}": value for name, value in indexers[0].items()},
    }


ATTENTION: dict[str, Callable[[list[Node], bool], Node]] = {"attention": _attention, "latent_attention": _latent}


def _ffn(ffns: list[Node]) -> Node:
    known = families()["activations"]
    dense, mixtures = ([ffn for ffn in ffns if (ffn["kind"] == "moe") == mixture] for mixture in (False, True))
    expert = mixtures[0]["expert"] if mixtures else dense[0]
    hidden = (dense or [expert])[0].get("hidden_dim")
    return {
        "activation": next((key for key, value in known.items() if value == expert.get("activation", "silu")), None),
        "hidden_dim": hidden,
        "expert_hidden_dim": expert.get("hidden_dim"),
        "shared_hidden_dim": hidden,
        **(_mixture(mixtures[0], ffns) if mixtures else NO_MIXTURE),
    }


def _mixture(ffn: Node, ffns: list[Node]) -> Node:
    """What mixtures say: their experts, how these are chosen, what is shared, and which layers are none."""
    router, shared = ffn.get("router", "softmax_topk"), ffn.get("shared")
    router = {"kind": router} if isinstance(router, str) else router
    types = ["sparse" if one["kind"] == "moe" else "dense" for one in ffns]
    return {
        **{name: ffn[name] for name in ("num_experts", "experts_per_token")},
        **{name: router.get(name, 1) for name in ("groups", "groups_per_token")},
        "router_scale": router.get("scale", 1.0),
        "normalize": router.get("normalize", router.get("kind") == "sigmoid"),
        "dense_layers": types.count("dense"),
        "ffn_types": types,
        "shared_experts": shared["hidden_dim"] // ffn["expert"]["hidden_dim"] if shared else 0,
        **({"shared_hidden_dim": shared["hidden_dim"]} if shared else {}),
    }


def rope_keys(card: Card, row: Node) -> Node | None:
    """The keys of a settings file that say the card's rotary positions; None where it has none for them."""
    mixers = [node["mixer"] for node in (*layers_of(card), *card.model.get("shared", ())) if node.get("mixer")]
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
    if mixer.get("mscale"):
        found |= {"mscale": mixer["mscale"], "mscale_all_dim": mixer["mscale"]}
    if mixer.get("query_scaling"):
        found["llama_4_scaling_beta"] = mixer["query_scaling"]["beta"]
    return found
