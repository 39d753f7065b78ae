"""Encoders of images and sounds beside a language model, and a language model's settings inside of larger ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from zoo.loading.infer.families import Node, families, keys_of
from zoo.loading.infer.settings import Settings
from zoo.registry.errors import CardError, nearest

MERGED = ("names", "defaults", "only")
"""Parts of a row of families.yaml that are mappings."""


def opened(values: Node, row: Node, rows: Mapping[str, Node], where: str) -> tuple[Node, Node]:
    """The settings of a larger model as one level with its language model's, and the row that reads both.

    A key that both have is the language model's. Settings that are those of a language model stay as they are.
    """
    if "inside" not in row:
        return values, row
    key, inner_type = row["inside"]["key"], row["inside"]["model_type"]
    inner = dict(values.get(key) or {})
    inner_type = inner.pop("model_type", inner_type)
    if inner_type not in rows or "inside" in rows[inner_type]:
        raise CardError(
            f"architecture {inner_type!r} is not supported yet",
            where=f"{where}: {key}",
            expected=f"model_type {', '.join(name for name in rows if 'inside' not in rows[name])}",
            hint=nearest(str(inner_type), rows),
        )
    outer = {name: value for name, value in values.items() if name != key}
    whole = {**rows[inner_type], **row, **{part: {**rows[inner_type][part], **row[part]} for part in MERGED}}
    whole["inert"] = [*rows[inner_type].get("inert", ()), *row.get("inert", ())]
    return {**outer, **inner}, whole


def encoders(settings: Settings, row: Node) -> Node:
    """The card's nodes of the encoders that the settings describe. Raises CardError for values that do not fit."""
    found = {}
    for name, part in row.get("encoders", {}).items():
        if settings.has(part["when"]):
            settings.check_only(part["only"])
            settings.pass_over(part.get("inert", ()))
            found[name] = READERS[part["kind"]](settings, part)
    return found


def _whisper(settings: Settings, part: Node) -> Node:
    words = ("token", "dim", "num_layers", "num_heads", "hidden_dim", "num_mel_bins", "positions")
    counts: dict[str, Any] = {word: settings.count(_key(settings, part, word)) for word in words}
    dim, hidden = counts["dim"], counts["hidden_dim"]
    size = settings.one_of(keys_of(part, "head_dim"))
    if dim % counts["num_heads"] or size not in (None, dim // counts["num_heads"]):
        raise settings.wrong(_key(settings, part, "num_heads"), counts["num_heads"], f"heads that make up {dim}")
    if keys_of(part, "stack"):
        stack = settings.count(_key(settings, part, "stack"))
    elif hidden % dim:
        raise settings.wrong(_key(settings, part, "hidden_dim"), hidden, f"a multiple of {dim}, of so many positions")
    else:  # The projector reads as many lanes as the feed-forward has.
        stack = hidden // dim
    return {"kind": "whisper", **counts, "stack": stack, "norm": {"kind": "layer", "eps": 1e-5}}


def _pixtral(settings: Settings, part: Node) -> Node:
    words = ("token", "dim", "num_layers", "num_heads", "hidden_dim", "patch_size", "max_image_size")
    counts: dict[str, Any] = {word: settings.count(_key(settings, part, word)) for word in words}
    projector: Node = {"bias": settings.flag(_key(settings, part, "bias"))}
    if settings.one_of(keys_of(part, "normed")):
        eps = settings.number(_key(settings, part, "eps")) if keys_of(part, "eps") else 1e-5
        projector["norm"] = {"kind": "rms", "eps": eps}
    if settings.one_of(keys_of(part, "merges")):
        projector["merge"] = settings.count(_key(settings, part, "merge"))
    known = families()["activations"]
    activation = settings.one_of(keys_of(part, "activation")) or "silu"
    if activation not in known:
        raise settings.wrong(_key(settings, part, "activation"), activation, f"one of {', '.join(known)}")
    return {
        "kind": "pixtral",
        **counts,
        **({} if known[activation] == "silu" else {"activation": known[activation]}),
        "theta": settings.number(_key(settings, part, "theta")),
        "norm": {"kind": "rms", "eps": 1e-5},
        "projector": projector,
    }


def _key(settings: Settings, part: Node, word: str) -> str:
    keys = keys_of(part, word)
    return next((key for key in keys if settings.has(key)), keys[0])


READERS: dict[str, Callable[[Settings, Node], Node]] = {"whisper": _whisper, "pixtral": _pixtral}
"""Kind of an encoder -> what reads its settings."""
