"""Latent attention in settings files: DeepSeek's keys, and Mistral's in params.json, which are the same."""

from __future__ import annotations

from typing import Any

from zoo.loading.infer.architecture import Architecture
from zoo.loading.infer.families import Node, keys_of

SIZES = ("kv_lora_rank", "nope_head_dim", "rope_head_dim", "v_head_dim")


class Latent(Architecture):
    """Reads a settings file of a model with latent attention."""

    def layers(self, norm: Node) -> list[Node]:
        """Mixer and feed-forward of every layer, with what some layers have not: positions, latents, an indexer."""
        layers = super().layers(norm)
        indexers, sources = self.indexers(len(layers)), self.sources(len(layers))
        found = []
        for number, (layer, indexer, source) in enumerate(zip(layers, indexers, sources, strict=True)):
            mixer = layer["mixer"]
            if mixer["rope"] is None:
                mixer = mixer | {"nope_head_dim": mixer["nope_head_dim"] + mixer["rope_head_dim"], "rope_head_dim": 0}
            shared = {} if source == number else {"cache": {"kind": "shared", "layer": source}}
            found.append(layer | {"mixer": mixer | ({"indexer": indexer} if indexer else {}) | shared})
        return found

    def indexers(self, layers: int) -> list[Node | None]:
        """The indexer of every layer: one of its own, or the choice of the one before."""
        if "indexer" not in self.row:
            return [None] * layers
        own = self.row["indexer"] | {word: self.count(f"index_{word}") for word in ("num_heads", "head_dim", "top_k")}
        kinds: dict[str, Node | None] = {"full": own, "shared": {"kind": "shared"}}
        types = self.value("indexer_types") or ["full"] * layers
        return [kinds[kind] for kind in self.listed("indexer_types", types, layers, [*kinds])]

    def sources(self, layers: int) -> list[int]:
        """The layer whose latents each layer reads; its own number for one with its own."""
        known = [*range(layers)]
        return self.listed("latent_sources", self.value("latent_sources") or known, layers, known)

    def listed(self, word: str, found: Any, layers: int, known: list[Any]) -> list[Any]:
        """A list of one of the known values for every layer."""
        if not isinstance(found, list) or len(found) != layers or any(value not in known for value in found):
            raise self.settings.wrong(self.key(word), found, f"a list of {layers} layers, each one of {known[:5]}")
        return found

    def mixer(self, norm: Node) -> Node:
        """The attention of a layer with positions."""
        heads, sizes = self.count("num_heads"), {word: self.count(word) for word in SIZES}
        self.check_heads(heads)
        rope, scaling, mscale = self.turned(sizes["rope_head_dim"], sizes["nope_head_dim"])
        fixed = {name: norm if value == "norm" else value for name, value in self.row.get("mixer", {}).items()}
        return {
            "kind": "latent_attention",
            "num_heads": heads,
            "q_lora_rank": None if self.value("q_lora_rank") is None else self.count("q_lora_rank"),
            **sizes,
            "rope": rope,
            **fixed,
            **({"mscale": mscale} if mscale else {}),
            **({"query_scaling": scaling} if scaling else {}),
        }

    def check_heads(self, heads: int) -> None:
        """Key heads are as many as query heads; sizes of heads that files write beside the parts say nothing new."""
        if self.value("num_kv_heads") not in (None, heads):
            raise self.settings.wrong(
                self.key("num_kv_heads"), self.value("num_kv_heads"), f"{heads}, one for each head"
            )
        self.settings.pass_over(keys_of(self.row, "head_dim"))

    def turned(self, lanes: int, others: int) -> tuple[Node | None, Node | None, float | None]:
        """The rope of the turned lanes, the scaling of queries, and what YaRN multiplies scores by."""
        if self.row["rope"] == "params":
            return *self.rope(lanes), None
        reader = self.reader(lanes + others)
        rope, scaling = reader.nodes()
        if rope.pop("rotary_dim", lanes) != lanes:
            raise self.settings.wrong(
                f"{reader.at}.partial_rotary_factor", reader.get("partial_rotary_factor"), f"{lanes} lanes"
            )
        all_dim = reader.get("mscale_all_dim") if rope.get("kind") == "yarn" else None
        return rope, scaling, float(all_dim) if all_dim else None
