"""Settings of attention: grouped-query, and latent."""

from collections.abc import Mapping
from math import log
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from zoo.components.attention.room import SPLIT, room_bytes
from zoo.components.cache.spec import LatentCacheSpec, SharedCacheSpec
from zoo.components.fields import Count, Flag, Positive
from zoo.components.indexer.spec import IndexerSpec, LightningIndexerSpec
from zoo.components.norm.spec import RMSSpec
from zoo.components.rope.spec import RopeSpec, YarnRopeSpec
from zoo.registry.spec import (
    Borrowed,
    IndivisibleError,
    Inherited,
    Param,
    Part,
    Rotary,
    Share,
    Slot,
    Spec,
    Split,
    StateSpec,
)


def _cache_kind(fields: Mapping[str, Any]) -> str:
    return "full" if fields["window"] is None else "window"


class QueryScaling(BaseModel):
    """Llama 4's temperature for long contexts: queries are multiplied with 1 + beta ln(1 + floor(p / original))."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    beta: Positive = Field(description="Strength.")
    original_context: Count = Field(description="Context length in tokens below which nothing changes.")


class AttentionSpec(Spec):
    """Attention whose query heads share key and value heads in groups (Ainslie et al., arXiv 2305.13245)."""

    module: ClassVar[str] = "zoo.components.attention.gqa:Attention"

    kind: Literal["attention"] = "attention"
    dim: Annotated[Count, Inherited()] = Field(description="Size of the residual stream.")
    out_dim: Annotated[Count | None, Inherited()] = Field(
        default=None, description="Size of the output where it is another; null for the stream's."
    )
    num_heads: Annotated[Count, Split()] = Field(description="Query heads.")
    num_kv_heads: Annotated[Count, Split(copies=True)] = Field(
        description="Key and value heads; a divisor of num_heads."
    )
    head_dim: Count = Field(description="Size of a head.")
    window: Count | None = Field(
        default=None, description="How many positions a token sees, itself included; null sees all."
    )
    rope: Annotated[RopeSpec | None, Slot("rope", default="default")] = Field(
        description="Rotary positions; null for a layer without positions."
    )
    qkv_bias: Flag = Field(default=False, description="Whether the query, key and value projections add a bias.")
    o_bias: Flag = Field(default=False, description="Whether the output projection adds a bias.")
    qk_norm: Annotated[Spec | None, Slot("norm", bind={"dim": "head_dim"})] = Field(
        default=None, description="Norm of each query and key head before rope; null for none."
    )
    qk_norm_span: Literal["head", "projection"] = Field(
        default="head", description="What qk_norm takes at once: each head, or all heads of the projection together."
    )
    scale: Positive | None = Field(
        default=None, description="What scores are multiplied with; null takes head_dim^-0.5."
    )
    softcap: Positive | None = Field(
        default=None, description="Bounds scores smoothly: softcap tanh(score / softcap); null leaves them."
    )
    sinks: Flag = Field(
        default=False,
        description="Whether each query head has a learned score that takes a share of the softmax and adds nothing.",
    )
    query_scaling: QueryScaling | None = Field(
        default=None, description="Scaling of queries far into a long context; null for none."
    )
    cache: Annotated[StateSpec, Slot("cache", default=_cache_kind, absent="build")] = Field(
        description="What is kept of earlier tokens: by default `window` for layers with a window, else `full`."
    )

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                "num_heads must be a multiple of num_kv_heads; "
                f"found num_heads {self.num_heads} and num_kv_heads {self.num_kv_heads}"
            )
        if self.qk_norm is None and self.qk_norm_span != "head":
            raise ValueError("qk_norm_span has no effect without qk_norm; found qk_norm null")
        return self

    @property
    def output(self) -> int:
        """Size of the output."""
        return self.dim if self.out_dim is None else self.out_dim

    def parameters(self) -> dict[str, Param]:
        width = self.num_heads * self.head_dim
        rows = width + 2 * self.num_kv_heads * self.head_dim
        found = {"qkv.weight": Param((rows, self.dim), shard=0, parts=self._parts("weight"))}
        if self.qkv_bias:
            found["qkv.bias"] = Param((rows,), shard=0, parts=self._parts("bias"), init="zeros", product=False)
        found["o.weight"] = Param((self.output, width), shard=1)
        if self.o_bias:
            found["o.bias"] = Param((self.output,), once=True, init="zeros", product=False)
        if self.sinks:
            found["sinks"] = Param((self.num_heads,), shard=0, init="zeros", product=False)
        return found

    def _parts(self, leaf: str) -> dict[str, Part]:
        """Where the checkpoint's query, key and value projections stand in the fused one."""
        width, step = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        rotary: Rotary | None = None if self.rope is None else self.rope.rotary
        return {
            f"q.{leaf}": Part(((0, width),), rotary),
            f"k.{leaf}": Part(((width, width + step),), rotary),
            f"v.{leaf}": Part(((width + step, width + 2 * step),)),
        }

    def children(self) -> dict[str, Spec]:
        found: dict[str, Spec] = {}
        if self.qk_norm is not None:
            found |= {"q_norm": self.qk_norm, "k_norm": self.qk_norm}
        if self.qk_norm is not None and self.qk_norm_span == "projection":
            heads = {"q_norm": self.num_heads, "k_norm": self.num_kv_heads}
            found = {n: self.qk_norm.model_copy(update={"dim": h * self.head_dim}) for n, h in heads.items()}
        if self.rope is not None:
            found["rope"] = self.rope
        return found

    def working(self, rows: int, seen: int, itemsize: int) -> int:
        """Also a mask, twice and once as flags; by the formula, scores of a block of rows in float32, three times."""
        span = seen if self.window is None else min(seen, self.window + rows)
        turned = 4 * rows * (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        exact = self.softcap is not None or self.sinks
        scores = 12 * self.num_heads * min(rows, max(self.window or 0, 256)) * span if exact else 0
        return super().working(rows, seen, itemsize) + turned + rows * span * (2 * itemsize + 1) + scores

    def kept_room(self, sequences: int, seen: int, itemsize: int, threads: int) -> int:
        # A window may begin and end within a split.
        span = seen if self.window is None else min(seen, self.window + SPLIT)
        heads, words = (self.num_heads, self.num_kv_heads), self.head_dim * itemsize // 4
        return room_bytes(sequences, span, heads, (words, self.head_dim), threads)

    def pace(self) -> str:
        """Windows need masks; soft caps and sinks are computed by the formula."""
        words = [
            self.kind,
            "formula" if self.softcap is not None or self.sinks else "",
            "window" if self.window else "",
        ]
        return " ".join(word for word in words if word)

    def state(self) -> StateSpec:
        return self.cache

    def means(self, share: Share) -> tuple[str, ...]:
        if self.qk_norm is None or self.qk_norm_span == "head":
            return ()
        if not isinstance(self.qk_norm, RMSSpec):
            raise IndivisibleError("qk_norm_span", f"a norm of kind '{self.qk_norm.kind}' cannot span several ranks")
        return ("q_norm", "k_norm")

    def flops(self, context: int) -> float:
        seen = context if self.window is None else min(context, self.window)
        return super().flops(context) + 4.0 * self.num_heads * self.head_dim * seen


class LatentAttentionSpec(Spec):
    """Attention whose keys and values are products of one cached latent per token (DeepSeek-V2, arXiv 2405.04434)."""

    module: ClassVar[str] = "zoo.components.attention.latent:LatentAttention"

    kind: Literal["latent_attention"] = "latent_attention"
    dim: Annotated[Count, Inherited()] = Field(description="Size of the residual stream.")
    num_heads: Annotated[Count, Split()] = Field(description="Heads.")
    q_lora_rank: Count | None = Field(description="Size of the queries' own latent; null projects them at once.")
    kv_lora_rank: Count = Field(description="Size of the latent of keys and values.")
    nope_head_dim: Count = Field(description="Lanes of a query and key head that know no positions.")
    rope_head_dim: int = Field(
        ge=0, strict=True, description="Lanes of a query and key head that rope turns; all heads share the key's."
    )
    v_head_dim: Count = Field(description="Size of a value head.")
    norm: Annotated[Spec, Slot("norm", absent="inherit", bind={"dim": "kv_lora_rank"})] = Field(
        description="Norm of both latents; by default the model's."
    )
    rope: Annotated[RopeSpec | None, Slot("rope", default="default", bind={"head_dim": "rope_head_dim"})] = Field(
        description="Rotary positions of the turned lanes; null for none, where rope_head_dim is 0."
    )
    mscale: Positive | None = Field(
        default=None,
        description="Multiplies scores with (0.1 mscale ln(factor) + 1)^2, factor of the yarn rope; null does not.",
    )
    query_scaling: QueryScaling | None = Field(
        default=None, description="Scaling of queries far into a long context; null for none."
    )
    ssmax: Flag = Field(default=False, description="Queries times s ln(position + 1) + b, learned for each head.")
    indexer: Annotated[Spec | None, Slot("indexer")] = Field(
        default=None, description="Chooses the keys that a query sees; null shows all."
    )
    cache: Annotated[StateSpec, Slot("cache", default="latent", absent="build")] = Field(
        description="What is kept of earlier tokens: their latents; with `shared`, those of an earlier layer are read."
    )

    @model_validator(mode="after")
    def _check_rope(self) -> Self:
        if (self.rope is None) != (self.rope_head_dim == 0):
            shown = "null" if self.rope is None else f"'{self.rope.kind}'"
            raise ValueError(f"rope is null where rope_head_dim is 0; found {shown} and {self.rope_head_dim}")
        if self.mscale is not None and not isinstance(self.rope, YarnRopeSpec):
            raise ValueError(f"mscale needs a rope of kind 'yarn'; found mscale {self.mscale:g} without one")
        if self.rope is not None and self.rope.rotary_dim is not None:
            raise ValueError("rope_head_dim says which lanes rope turns; remove rotary_dim from the rope")
        if self.indexer is not None and not isinstance(self.indexer, IndexerSpec):
            raise ValueError(f"an indexer's Spec derives from IndexerSpec; found {type(self.indexer).__name__}")
        return self

    @property
    def shares(self) -> bool:
        """Whether latents are those of an earlier layer."""
        return isinstance(self.cache, SharedCacheSpec)

    @property
    def index_dim(self) -> int:
        """Size of the key that an indexer caches."""
        return self.indexer.key_dim if isinstance(self.indexer, IndexerSpec) else 0

    @property
    def qk_head_dim(self) -> int:
        """Size of a query and key head."""
        return self.nope_head_dim + self.rope_head_dim

    @property
    def score_scale(self) -> float:
        """What scores are multiplied with."""
        scale = float(self.qk_head_dim**-0.5)
        if self.mscale is None or not isinstance(self.rope, YarnRopeSpec):
            return scale
        return scale * (0.1 * self.mscale * log(self.rope.factor) + 1) ** 2

    def parameters(self) -> dict[str, Param]:
        width, kept = self.num_heads * self.qk_head_dim, self.kv_lora_rank + self.rope_head_dim
        turned = None if self.rope is None else Rotary(self.qk_head_dim, self.rope_head_dim, self.nope_head_dim)
        if self.q_lora_rank is None:
            found = {"q.weight": Param((width, self.dim), shard=0, rotary=turned)}
        else:
            found = {"q_a.weight": Param((self.q_lora_rank, self.dim))}
            found["q_b.weight"] = Param((width, self.q_lora_rank), shard=0, rotary=turned)
        if not self.shares:
            rows = None if self.rope is None else Rotary(kept, self.rope_head_dim, self.kv_lora_rank)
            found["kv_a.weight"] = Param((kept, self.dim), rotary=rows)
        if self.ssmax:
            found["ssmax.scale"] = Param((self.num_heads,), shard=0, init="zeros", product=False)
            found["ssmax.bias"] = Param((self.num_heads,), shard=0, init="ones", product=False)
        up = self.num_heads * (self.nope_head_dim + self.v_head_dim)
        found["kv_b.weight"] = Param((up, self.kv_lora_rank), shard=0, exact=True)
        found["o.weight"] = Param((self.dim, self.num_heads * self.v_head_dim), shard=1)
        return found

    def children(self) -> dict[str, Spec]:
        found: dict[str, Spec] = {} if self.shares else {"kv_a_norm": self.norm}
        found |= {name: spec for name in ("rope", "indexer") if (spec := getattr(self, name)) is not None}
        if self.q_lora_rank is not None:
            found["q_a_norm"] = self.norm.model_copy(update={"dim": self.q_lora_rank})
        return found

    def working(self, rows: int, seen: int, itemsize: int) -> int:
        """Also the keys and values of all heads, and masks or the indexer's scores of every pair."""
        heads = self.num_heads * (self.qk_head_dim + self.v_head_dim)
        pairs = 2 * itemsize + 1 + (8 if self.indexer is not None else 0)
        return super().working(rows, seen, itemsize) + seen * heads * itemsize + rows * seen * pairs

    def kept_room(self, sequences: int, seen: int, itemsize: int, threads: int) -> int:
        words = (self.kv_lora_rank + self.rope_head_dim) * itemsize // 4
        return room_bytes(sequences, seen, (self.num_heads, 1), (words, self.kv_lora_rank), threads, latents=True)

    def pace(self) -> str:
        return self.kind if self.indexer is None else f"{self.kind} indexer"

    def state(self) -> StateSpec | None:
        """The cache with a place for the indexer's keys; None for a layer that keeps nothing of its own."""
        if self.shares and not self.index_dim:
            return None
        return self.cache.model_copy(update={"index_dim": self.index_dim}) if self.index_dim else self.cache

    def borrows(self) -> Borrowed | None:
        if not isinstance(self.cache, SharedCacheSpec):
            return None
        kept = LatentCacheSpec(kv_lora_rank=self.kv_lora_rank, rope_head_dim=self.rope_head_dim)
        return Borrowed(self.cache.layer, kept)

    def flops(self, context: int) -> float:
        """With queries in the latent's space, as single tokens are decoded."""
        row = self.kv_lora_rank + self.rope_head_dim
        seen = min(context, self.indexer.top_k) if isinstance(self.indexer, LightningIndexerSpec) else context
        return super().flops(context) + 4.0 * self.num_heads * row * seen
