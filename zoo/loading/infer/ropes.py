"""Rotary positions and query scaling in settings files, as Mistral and as transformers spell them."""

from __future__ import annotations

from math import log, sqrt
from typing import Any

from zoo.loading.infer.families import Node, families
from zoo.loading.infer.settings import Settings
from zoo.registry.errors import CardError

FULL, LOCAL = "full_attention", "sliding_attention"


def rope_of_params(settings: Settings, windowed: bool) -> tuple[Node, Node | None]:
    """The nodes `rope` and `query_scaling` from rope_theta, yarn and llama_4_scaling of a params.json."""
    theta = settings.get("rope_theta")
    if theta is None:
        # Files without the key are of 2023: the first model, with its window, was trained with 1e4; the mixture, and
        # what mistral-inference still assumes, is 1e6.
        theta = 1e4 if windowed else 1e6
    rope: Node = {"theta": float(theta)}
    if settings.has("yarn"):
        rope = {
            "kind": "yarn",
            **rope,
            "factor": settings.number("yarn.factor"),
            "original_context": settings.count("yarn.original_max_position_embeddings"),
            "beta_fast": settings.number("yarn.beta"),
            "beta_slow": settings.number("yarn.alpha"),
        }
        if settings.get("yarn.apply_scale") is False:
            rope["attention_factor"] = 1.0
    if not settings.has("llama_4_scaling"):
        return rope, None
    original = settings.count("llama_4_scaling.original_max_position_embeddings")
    return rope, {"beta": settings.number("llama_4_scaling.beta"), "original_context": original}


class RopeOfConfig:
    """rope_parameters, or rope_theta and rope_scaling. transformers: modeling_rope_utils.py."""

    def __init__(self, settings: Settings, head_dim: int, context: int, by_type: bool = False) -> None:
        """`by_type`: layers with and without a window may have mappings of their own."""
        self.settings, self.head_dim, self.context = settings, head_dim, context
        self.at = "rope_scaling" if settings.has("rope_scaling") else "rope_parameters"
        if by_type and settings.has(f"rope_parameters.{FULL}"):
            self.at = f"rope_parameters.{FULL}"

    def local(self, theta: str) -> Node:
        """The rope of layers with a window: as a mapping of their own says, else plain with the theta of this key."""
        if self.settings.has(f"rope_parameters.{LOCAL}"):
            self.at = f"rope_parameters.{LOCAL}"
            return self.nodes()[0]
        return {"theta": self.theta() if self.settings.get(theta) is None else self.settings.number(theta)}

    def get(self, key: str) -> Any:
        """A key of the mapping; the family's defaults hold only where the file has no such mapping."""
        self.settings.read.add(f"{self.at}.{key}")
        if self.settings.has(self.at):
            return self.settings.values.get(f"{self.at}.{key}")
        return self.settings.get(f"{self.at}.{key}")

    def nodes(self) -> tuple[Node, Node | None]:
        kind = self.get("rope_type") or self.get("type") or "default"
        kind = families()["rope_aliases"].get(kind, kind)
        self.get("type")
        self.get("max_position_embeddings")
        kinds = families()["rope_types"]
        if kind not in kinds:
            raise self.settings.wrong(f"{self.at}.rope_type", kind, f"one of {', '.join(kinds)}")
        rope: Node = {} if kind == "default" else {"kind": kind}
        rope["theta"] = self.theta()
        rotary = self.get("partial_rotary_factor") or self.settings.get("partial_rotary_factor")
        if rotary is not None and rotary != 1:
            rope["rotary_dim"] = int(self.head_dim * rotary)
        for field, key in kinds[kind].items():
            value = self.get(key.removesuffix("?"))
            if key == "original_max_position_embeddings" and value is None:
                value = self.settings.get(key) or self.context
            if value is not None:
                rope[field] = value if isinstance(value, bool) or field == "original_context" else _floats(value)
            elif not key.endswith("?"):
                raise CardError(f"the key {self.at + '.' + key!r} is missing", where=self.settings.where)
        if kind == "yarn":
            rope |= self.attention_factor(rope["factor"])
        if kind == "longrope":
            rope["attention_factor"] = self.longrope_factor(rope["original_context"])
        return rope, self.query_scaling(rope)

    def theta(self) -> float:
        inside = self.get("rope_theta") if self.settings.has(self.at) else None
        outside = self.settings.get("rope_theta")
        if None not in (inside, outside) and inside != outside:
            raise self.settings.wrong("rope_theta", outside, f"{inside}, as {self.at}.rope_theta says")
        theta = outside if inside is None else inside
        return float(self.settings.number("rope_parameters.rope_theta") if theta is None else theta)

    def attention_factor(self, factor: float) -> Node:
        """What multiplies cos and sin; nothing is said where it is YaRN's own 0.1 ln(factor) + 1."""
        stated, mscale, all_dim = self.get("attention_factor"), self.get("mscale"), self.get("mscale_all_dim")
        if stated is None and mscale and all_dim:
            stated = (0.1 * mscale * log(factor) + 1) / (0.1 * all_dim * log(factor) + 1) if factor > 1 else 1.0
        return {} if stated is None else {"attention_factor": float(stated)}

    def longrope_factor(self, original: int) -> float:
        """What multiplies cos and sin: as stated, else by how much the context has grown."""
        stated, factor = self.get("attention_factor"), self.get("factor") or self.context / original
        return float(stated or (sqrt(1 + log(factor) / log(original)) if factor > 1 else 1.0))

    def query_scaling(self, rope: Node) -> Node | None:
        beta = self.get("llama_4_scaling_beta")
        return {"beta": float(beta), "original_context": rope["original_context"]} if beta else None


def _floats(value: Any) -> Any:
    return [float(item) for item in value] if isinstance(value, list) else float(value)
