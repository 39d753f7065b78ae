"""The `model` section of a card from a settings file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.loading.infer.families import Node, families, keys_of
from zoo.loading.infer.ropes import RopeOfConfig, rope_of_params
from zoo.loading.infer.settings import Settings

MODEL_NUMBERS = ("embedding_scale", "logits_divisor", "logits_softcap")
MIXER_NUMBERS = ("scale", "softcap")
BLOCK_NUMBERS = ("residual_scale",)
EXPERT_NUMBERS = ("gain", "limit")


class Architecture:
    """Reads a settings file by a row of families.yaml. Every method raises CardError for values that do not fit."""

    def __init__(self, settings: Settings, row: Node) -> None:
        self.settings, self.row = settings, row

    def model(self) -> Node:
        """The card's `model`."""
        norm = {"kind": self.row.get("norm", "rms"), "eps": self.settings.number(self.key("eps"))}
        block = {"kind": self.row["block"], **self.numbers(BLOCK_NUMBERS)} if "block" in self.row else {}
        return {
            "dim": self.count("dim"),
            "vocab_size": self.count("vocab_size"),
            "tied_embeddings": self.settings.flag(self.key("tied_embeddings")),
            **self.row.get("model", {}),
            **self.numbers(MODEL_NUMBERS),
            **({"embedding_scale": self.count("dim") ** 0.5} if self.row.get("embedding_scale") == "sqrt_dim" else {}),
            "norm": norm,
            "layers": runs([block | layer for layer in self.layers(norm)]),
        }

    def layers(self, norm: Node) -> list[Node]:
        """Mixer and feed-forward of every layer."""
        windows, mixer = self.windows(), self.mixer(norm)
        ffns = self.ffns(len(windows))
        ropes = self.ropes(mixer["rope"], windows)
        mixers = [mixer | {"rope": rope} | ({"window": w} if w else {}) for rope, w in zip(ropes, windows, strict=True)]
        return [{"mixer": one, "ffn": ffn} for one, ffn in zip(mixers, ffns, strict=True)]

    def numbers(self, words: Sequence[str]) -> Node:
        """Of these words, the ones that the architecture has and the file does not leave at null."""
        stated = [word for word in words if keys_of(self.row, word) and not self.settings.is_null(self.key(word))]
        return {word: self.settings.number(self.key(word)) for word in stated}

    def key(self, word: str) -> str:
        """The key of a word: of several, the one that the file has."""
        keys = keys_of(self.row, word)
        return next((key for key in keys if self.settings.has(key)), keys[0])

    def value(self, word: str) -> Any:
        """What the file says for a word, or its default; None where the architecture has no such thing."""
        return self.settings.one_of(keys_of(self.row, word))

    def count(self, word: str) -> int:
        return self.settings.count(self.key(word))

    def mixer(self, norm: Node) -> Node:
        """The attention of a layer without a window."""
        heads = self.count("num_heads")
        size = self.head_dim(heads)
        rope, scaling = self.rope(size)
        fixed = {name: norm if value == "norm" else value for name, value in self.row.get("mixer", {}).items()}
        biases = [word for word in ("qkv_bias", "o_bias") if keys_of(self.row, word)]
        return {
            "kind": "attention",
            "num_heads": heads,
            "num_kv_heads": heads if self.settings.is_null(self.key("num_kv_heads")) else self.count("num_kv_heads"),
            "head_dim": size,
            "rope": rope,
            **fixed,
            **{word: True for word in biases if self.settings.flag(self.key(word))},
            **self.scale(size),
            **self.numbers(MIXER_NUMBERS),
            **({"query_scaling": scaling} if scaling else {}),
        }

    def scale(self, head_dim: int) -> Node:
        """What the scores are multiplied with, where it is not the usual head_dim^-0.5."""
        size = self.value("scale_dim")
        return {} if size in (None, head_dim) else {"scale": float(self.count("scale_dim") ** -0.5)}

    def head_dim(self, heads: int) -> int:
        """As the file says; a config.json may leave it out where it is dim / num_heads."""
        if self.row["rope"] == "params" or self.value("head_dim") is not None:
            return self.count("head_dim")
        dim = self.count("dim")
        if dim % heads:
            raise self.settings.wrong(self.key("num_heads"), heads, f"a divisor of {self.key('dim')}, {dim}")
        return dim // heads

    def rope(self, head_dim: int) -> tuple[Node | None, Node | None]:
        if self.row["rope"] == "params":
            return rope_of_params(self.settings, windowed=self.value("window") is not None)
        return self.reader(head_dim).nodes()

    def reader(self, head_dim: int) -> RopeOfConfig:
        by_type = bool(keys_of(self.row, "local_theta"))
        return RopeOfConfig(self.settings, head_dim, self.count("context_length"), by_type)

    def ropes(self, rope: Node | None, windows: Sequence[int | None]) -> list[Node | None]:
        """The rope of every layer: of those with a window by a key of their own, or of some layers none."""
        if keys_of(self.row, "local_theta"):
            local = self.reader(self.head_dim(self.count("num_heads"))).local(self.key("local_theta"))
            return [local if window else rope for window in windows]
        return [rope if turned else None for turned in self.every("rope_layers", "no_rope_every", len(windows))]

    def every(self, listed: str, interval: str, layers: int) -> list[bool]:
        """For each layer what a list says of it, or else whether it is none of every so many."""
        flags, count = self.value(listed), self.value(interval)
        if flags is None:
            return [not count or (i + 1) % count != 0 for i in range(layers)]
        if not isinstance(flags, list) or len(flags) != layers:
            raise self.settings.wrong(self.key(listed), flags, f"a list of {layers} layers")
        return [bool(flag) for flag in flags]

    def ffns(self, layers: int) -> list[Node]:
        """The feed-forward of every layer; the first ones may be dense where the others are mixtures."""
        dense = self.value("dense_layers") or 0
        types = self.value("ffn_types") or ["dense"] * dense + ["sparse"] * (layers - dense)
        if len(types) != layers or not {*types} <= {"dense", "sparse"}:
            key = self.key("ffn_types" if self.value("ffn_types") else "dense_layers")
            raise self.settings.wrong(key, types if self.value("ffn_types") else dense, f"what fits {layers} layers")
        mixture, plain = self.ffn(), self.form(self.count("hidden_dim"))
        return [plain if kind == "dense" else mixture for kind in types]

    def form(self, hidden_dim: int) -> Node:
        """A feed-forward of the architecture's form and of a given size."""
        known = families()["activations"]
        activation = self.value("activation") or self.settings.need(self.key("activation"))
        if activation not in known:
            raise self.settings.wrong(self.key("activation"), activation, f"one of {', '.join(known)}")
        kind = self.row.get("ffn", "gated")
        plain = kind == "gated" and known[activation] == "silu"
        return {"kind": kind, "hidden_dim": hidden_dim, **({} if plain else {"activation": known[activation]})}

    def ffn(self) -> Node:
        """A mixture where the settings say one, else a plain feed-forward."""
        stated = self.value("expert_hidden_dim") is not None
        hidden = self.count("expert_hidden_dim" if stated else "hidden_dim")
        if not self.is_mixture():
            return self.form(hidden)
        shared = (self.value("shared_experts") or 0) * hidden
        if keys_of(self.row, "shared_hidden_dim"):
            shared = self.count("shared_hidden_dim")
        return {
            "kind": "moe",
            "num_experts": self.count("num_experts"),
            "experts_per_token": self.count("experts_per_token"),
            **self.router(),
            "expert": self.form(hidden) | self.row.get("expert", {}) | self.numbers(EXPERT_NUMBERS),
            **({"shared": self.form(shared)} if shared else {}),
        }

    def router(self) -> Node:
        """The router, where the row says of which kind."""
        if "router" not in self.row:
            return {}
        found = dict(self.row["router"])
        for word in ("groups", "groups_per_token"):
            found |= {word: self.count(word)} if self.value(word) is not None else {}
        if keys_of(self.row, "router_scale"):
            found["scale"] = self.settings.number(self.key("router_scale"))
        if keys_of(self.row, "normalize"):
            found["normalize"] = self.settings.flag(self.key("normalize"))
        return {"router": found}

    def is_mixture(self) -> bool:
        """Mixtures by architecture, or by the presence of the mapping that describes them."""
        keys = keys_of(self.row, "num_experts")
        group = keys[0].rpartition(".")[0] if keys else ""
        return bool(keys) and self.value("num_experts") != 0 and (not group or self.settings.has(group))

    def windows(self) -> list[int | None]:
        """The window of every layer."""
        layers, window, last = self.count("num_layers"), self.value("window"), self.value("full_every")
        first, kinds = self.value("window_from") or 0, self.value("layer_types")
        if keys_of(self.row, "window_switch") and not self.settings.flag(self.key("window_switch")):
            window = None
        if isinstance(window, list):
            if not window or layers % len(window):
                raise self.settings.wrong(self.key("window"), window, f"a list whose length divides {layers} layers")
            return [self.window(item) for item in window] * (layers // len(window))
        if kinds is None and last:
            return [self.window(window) if (i + 1) % last else None for i in range(layers)]
        if kinds is None:
            return [self.window(window) if i >= first else None for i in range(layers)]
        return self.typed(kinds, layers, self.window(window))

    def typed(self, kinds: Any, layers: int, window: int | None) -> list[int | None]:
        """The windows of layers whose types are listed."""
        known: Mapping[str, int | None] = {"full_attention": None, "sliding_attention": window}
        key = self.key("layer_types")
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise self.settings.wrong(key, kinds, f"a list of {layers} layers")
        for kind in kinds:
            if kind not in known or (kind == "sliding_attention" and window is None):
                raise self.settings.wrong(key, kind, "full_attention, or sliding_attention beside a window")
        return [known[kind] for kind in kinds]

    def window(self, value: Any) -> int | None:
        """One layer's window: tokens, also as text, or None."""
        if isinstance(value, str) and value.isdigit():
            value = int(value)
        if value is not None and (type(value) is not int or value <= 0):
            expected = "a positive number of tokens, a list of them, or null for none"
            raise self.settings.wrong(self.key("window"), value, expected)
        return value


def runs(layers: Sequence[Node]) -> list[Node]:
    """Layers as a card lists them: the shortest pattern that repeats to the whole, else runs of equal neighbours."""
    for size in range(1, len(layers) // 2 + 1):
        if len(layers) % size == 0 and all(layers[i] == layers[i % size] for i in range(len(layers))):
            run: Node = dict(layers[0]) if size == 1 else {"pattern": list(layers[:size])}
            return [{"repeat": len(layers) // size, **run}]
    found: list[Node] = []
    for layer in layers:
        if found and found[-1] == {"repeat": found[-1]["repeat"], **layer}:
            found[-1]["repeat"] += 1
        else:
            found.append({"repeat": 1, **layer})
    return found
