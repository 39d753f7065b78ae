"""The `model` section of a card for architectures whose layers are of several kinds."""

from __future__ import annotations

from collections.abc import Sequence

from zoo.loading.infer.architecture import Architecture
from zoo.loading.infer.families import Node, keys_of
from zoo.loading.infer.recurrent import Recurrent

ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters")
ATTENTION_WORDS = ("num_heads", "num_kv_heads", "head_dim", "qkv_bias", "o_bias", "scale", "positions")
ROUTER_WORDS = ("groups", "groups_per_token", "router_scale", "normalize")
MOE_WORDS = ("num_experts", "experts_per_token", "expert_hidden_dim", "shared_hidden_dim", *ROUTER_WORDS)
SHARED = "shared"
"""In place of a feed-forward's kind: the layer uses one of the model's shared blocks."""


class Hybrid(Architecture):
    """State-space mixers beside attention, and blocks without a mixer or without a feed-forward."""

    def model(self) -> Node:
        """The card's `model`, with the blocks that layers share."""
        found = super().model()
        uses = sum(ffn == SHARED for _, ffn in self.pairs())
        if uses:
            found[SHARED] = [self.shared()] * min(self.count("shared_blocks"), uses)
        return found

    def layers(self, norm: Node) -> list[Node]:
        """Mixer and feed-forward of every layer, by the kinds that the row gives the file's words."""
        pairs = self.pairs()
        mixers, ffns = {mixer for mixer, _ in pairs}, {ffn for _, ffn in pairs} - {SHARED}
        made = {kind: self.mixer_of(kind, norm) for kind in mixers} | {kind: self.ffn_of(kind) for kind in ffns}
        self.pass_over_unused(mixers)
        found: list[Node] = []
        for mixer, ffn in pairs:
            if ffn == SHARED:
                before = sum(layer.get("kind") == "sharing" for layer in found)
                number = before % self.count("shared_blocks")
                found.append({"kind": "sharing", "number": number, "mixer": made[mixer]})
            else:
                found.append({"mixer": made[mixer], "ffn": made[ffn]})
        return found

    def shared(self) -> Node:
        """A shared block, whose attention sees the stream and the embeddings side by side."""
        heads, width = self.count("num_heads"), 2 * self.count("dim")
        if width % heads:
            raise self.settings.wrong(self.key("num_heads"), heads, f"a divisor of twice {self.key('dim')}, {width}")
        size = width // heads
        mixer = {
            "kind": "attention",
            "num_heads": heads,
            "num_kv_heads": heads if self.settings.is_null(self.key("num_kv_heads")) else self.count("num_kv_heads"),
            "head_dim": size,
            "rope": self.rope(size)[0],
            "scale": (size / 2) ** -0.5,
        }
        adapted = {"adapt_mixer": True} if self.settings.flag(self.key("adapt_mixer")) else {}
        rank = self.count("adapter_rank")
        return {"kind": "transformer", "mixer": mixer, "ffn": self.ffn_of("dense"), "adapter_rank": rank, **adapted}

    def pairs(self) -> list[tuple[str | None, str | None]]:
        """The kinds of every layer's mixer and feed-forward; a feed-forward is `dense`, `moe` or `shared`."""
        known, words = self.row["layer_kinds"], self.words()
        unknown = [word for word in words if word not in known]
        if unknown:
            raise self.settings.wrong(self.key("layer_types"), unknown[0], f"one of {', '.join(known)}")
        pairs = [known[word] for word in words]
        return [(mixer, self.ffn_kind(i) if ffn == "ffn" else ffn) for i, (mixer, ffn) in enumerate(pairs)]

    def words(self) -> Sequence[str]:
        """What the file calls each layer: in a list or a string, or every so many from one on."""
        layers, words = self.value("num_layers"), self.value("layer_types")
        if words is None and keys_of(self.row, "attention_every"):
            return ["attention" if self.recurs("attention", i) else "mamba" for i in range(self.count("num_layers"))]
        if not isinstance(words, list | str) or len(words) != (layers or len(words)):
            known = ", ".join(self.row["layer_kinds"])
            raise self.settings.wrong(self.key("layer_types"), words, f"one of {known} for each of {layers} layers")
        return words

    def ffn_kind(self, layer: int) -> str:
        """Mixtures in all layers, where there are experts, or in every so many."""
        if not self.is_mixture():
            self.settings.pass_over(keys_of(self.row, "experts_per_token"))
            return "dense"
        return "moe" if not keys_of(self.row, "experts_every") or self.recurs("experts", layer) else "dense"

    def recurs(self, what: str, layer: int) -> bool:
        """Whether a layer is one of every so many."""
        offset: int = self.settings.need(self.key(f"{what}_offset"))
        return layer % self.count(f"{what}_every") == offset

    def mixer_of(self, kind: str | None, norm: Node) -> Node | None:
        """A layer's mixer by its kind."""
        if kind is None:
            return None
        if kind != "attention":
            space = self.row["state_space"]
            return Recurrent(self.settings, space).mixer(space.get("eps", norm["eps"]))
        return self.mixer(norm)

    def rope(self, head_dim: int) -> tuple[Node | None, Node | None]:
        """None where the architecture has no positions, or the file does not ask for them."""
        if keys_of(self.row, "positions") and self.value("positions") in ("rope", True):
            return super().rope(head_dim)
        self.settings.pass_over(ROPE_KEYS)
        return None, None

    def ffn_of(self, kind: str | None) -> Node | None:
        """A layer's feed-forward by its kind."""
        if kind is None:
            return None
        return self.form(self.count("hidden_dim")) if kind == "dense" else self.ffn()

    def pass_over_unused(self, mixers: set[str | None]) -> None:
        """Takes the settings of a kind of mixer that no layer has as read."""
        space = self.row["state_space"]
        if not any(ffn == "dense" for _, ffn in self.pairs()):
            self.settings.pass_over(keys_of(self.row, "hidden_dim"))
        if not any(ffn == "moe" for _, ffn in self.pairs()):
            self.settings.pass_over(key for word in MOE_WORDS for key in keys_of(self.row, word))
        if space["recurrent"] not in mixers:
            self.settings.pass_over(key for word in space["names"] for key in keys_of(space, word))
        if "attention" not in mixers and not keys_of(self.row, "shared_blocks"):
            self.settings.pass_over([*ROPE_KEYS, *(key for word in ATTENTION_WORDS for key in keys_of(self.row, word))])
