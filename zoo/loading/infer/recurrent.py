"""State-space mixers, and the `model` section of a card for architectures of nothing else."""

from __future__ import annotations

from math import ceil, inf

from zoo.loading.infer.families import Node, keys_of
from zoo.loading.infer.settings import Settings

SIZES = {"mamba2": ("num_groups", "state_size", "conv_size"), "mamba1": ("state_size", "conv_size")}


class Recurrent:
    """Reads a settings file by a row of families.yaml. Every method raises CardError for values that do not fit."""

    def __init__(self, settings: Settings, row: Node) -> None:
        self.settings, self.row = settings, row

    def model(self) -> Node:
        """The card's `model`."""
        eps = self.settings.number(self.key("eps"))
        return {
            "dim": self.count("dim"),
            "vocab_size": self.vocab_size(),
            "tied_embeddings": self.settings.flag(self.key("tied_embeddings")),
            "norm": {"kind": "rms", "eps": eps},
            "layers": [{"repeat": self.count("num_layers"), "mixer": self.mixer(eps), "ffn": None}],
        }

    def mixer(self, eps: float) -> Node:
        """A layer's mixer, with `eps` for the norms inside it."""
        if self.row["recurrent"] == "mamba1":
            return self.mamba1(eps)
        heads, size = self.heads()
        self.check_unlimited()
        return {"kind": "mamba2", "num_heads": heads, "head_dim": size, **self.shared(), "norm_eps": eps}

    def heads(self) -> tuple[int, int]:
        """Number and size of the heads: both as the file says, or one of them as the inner size leaves it."""
        if not keys_of(self.row, "expand"):
            return self.count("num_heads"), self.count("head_dim")
        inner, stated = self.inner_dim(), [word for word in ("num_heads", "head_dim") if self.states(word)]
        sizes = {word: self.count(word) for word in stated}
        heads = sizes.get("num_heads") or inner // sizes["head_dim"]
        size = sizes.get("head_dim") or inner // heads
        if heads * size != inner:
            expected = f"heads that make up the inner size of {inner}"
            raise self.settings.wrong(self.key(stated[-1]), sizes[stated[-1]], expected)
        return heads, size

    def states(self, word: str) -> bool:
        """Whether the file says a size in figures."""
        return bool(keys_of(self.row, word)) and self.settings.get(self.key(word)) != "auto"

    def check_unlimited(self) -> None:
        """Refuses limits of the step; infinity is a mapping where transformers 5 wrote the file."""
        limit = self.settings.one_of(keys_of(self.row, "dt_limit"))
        if limit is not None and limit not in ([0.0, inf], [0.0, {"__float__": "Infinity"}]):
            raise self.settings.wrong(self.key("dt_limit"), limit, "no limit: [0.0, Infinity]")

    def mamba1(self, eps: float) -> Node:
        rank = self.settings.get(self.key("dt_rank"))
        mixer = {"kind": "mamba1", "inner_dim": self.inner_dim(), **self.shared()}
        mixer["dt_rank"] = ceil(self.count("dim") / 16) if rank == "auto" else self.count("dt_rank")
        if "bcdt_weights" in self.row:
            eps = self.settings.number(self.key("bcdt_eps")) if keys_of(self.row, "bcdt_eps") else eps
            mixer["bcdt_norm"] = {"eps": eps, "weights": self.row["bcdt_weights"]}
        return mixer

    def shared(self) -> Node:
        """Sizes under their own names, and biases that are not as usual."""
        sizes = {word: self.count(word) for word in SIZES[self.row["recurrent"]]}
        biases = {word: self.settings.flag(self.key(word)) for word in ("bias", "conv_bias") if keys_of(self.row, word)}
        return sizes | {word: flag for word, flag in biases.items() if flag != (word == "conv_bias")}

    def inner_dim(self) -> int:
        """As the file says; otherwise so many times the model's size, which the reference reads only then."""
        expand = self.settings.number(self.key("expand"))
        if keys_of(self.row, "inner_dim") and self.settings.get(self.key("inner_dim")) is not None:
            return self.count("inner_dim")
        if expand * self.count("dim") % 1:
            raise self.settings.wrong(self.key("expand"), expand, f"a multiple of 1 / {self.count('dim')}")
        return int(expand * self.count("dim"))

    def vocab_size(self) -> int:
        """Rounded up where the file says to what."""
        size = self.count("vocab_size")
        multiple = self.count("vocab_multiple") if keys_of(self.row, "vocab_multiple") else 1
        return -(-size // multiple) * multiple

    def key(self, word: str) -> str:
        return keys_of(self.row, word)[0]

    def count(self, word: str) -> int:
        return self.settings.count(self.key(word))
