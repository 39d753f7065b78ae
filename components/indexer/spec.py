"""Settings of indexers, which choose the keys that a query sees."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from zoo.components.fields import Count, Flag, Positive
from zoo.components.rope.spec import RopeSpec
from zoo.registry.spec import Inherited, Param, Rotary, Slot, Spec


class IndexerSpec(Spec):
    """What all kinds share; a plugin's kind derives from it."""

    @property
    def key_dim(self) -> int:
        """Size of the key that is cached of each token; 0 for none."""
        raise NotImplementedError


class LightningIndexerSpec(IndexerSpec):
    """Scores every earlier token with small heads, and keeps the best (DeepSeek-V3.2, arXiv 2512.02556, section 2.1).

    A score is the weighted sum over heads of max(0, query . key); queries come from the normed input.
    """

    module: ClassVar[str] = "zoo.components.indexer.lightning:LightningIndexer"

    kind: Literal["lightning"] = "lightning"
    dim: Annotated[Count, Inherited()] = Field(description="Size of the residual stream.")
    num_heads: Count = Field(description="Query heads; the key is one for all.")
    head_dim: Count = Field(description="Size of a head.")
    top_k: Count = Field(description="How many keys a query sees at most.")
    norm_eps: Positive = Field(description="Added to the variance in the norms of the input and of the key.")
    ssmax: Flag = Field(default=False, description="Queries times s ln(position + 1) + b, learned for each head.")
    rope_head_dim: Annotated[int, Inherited()] = Field(description="Leading lanes that rope turns.")
    rope: Annotated[
        RopeSpec | None, Slot("rope", default="default", absent="inherit", bind={"head_dim": "rope_head_dim"})
    ] = Field(default=None, description="Rotary positions; by default the mixer's.")

    @model_validator(mode="after")
    def _check_lanes(self) -> Self:
        if self.rope_head_dim > self.head_dim:
            raise ValueError(f"head_dim must be at least rope_head_dim, {self.rope_head_dim}; found {self.head_dim}")
        return self

    @property
    def key_dim(self) -> int:
        return self.head_dim

    def parameters(self) -> dict[str, Param]:
        turned = None if self.rope is None else Rotary(self.head_dim, self.rope_head_dim)
        found = {
            "q_norm.weight": Param((self.dim,), init="ones", product=False),
            "q_norm.bias": Param((self.dim,), init="zeros", product=False),
            "q.weight": Param((self.num_heads * self.head_dim, self.dim), rotary=turned, exact=True),
            "k.weight": Param((self.head_dim, self.dim), rotary=turned, exact=True),
            "k_norm.weight": Param((self.head_dim,), rotary=turned, init="ones", product=False),
            "k_norm.bias": Param((self.head_dim,), rotary=turned, init="zeros", product=False),
            "weights.weight": Param((self.num_heads, self.dim), dtype="float32"),
        }
        if self.ssmax:
            found["ssmax.scale"] = Param((self.num_heads,), init="zeros", product=False)
            found["ssmax.bias"] = Param((self.num_heads,), init="ones", product=False)
        return found

    def flops(self, context: int) -> float:
        return super().flops(context) + 2.0 * self.num_heads * (self.head_dim + 1) * context


class SharedIndexerSpec(IndexerSpec):
    """What the nearest earlier indexer chose for the same tokens (arXiv 2603.12201)."""

    module: ClassVar[str] = "zoo.components.indexer.shared:SharedIndexer"

    kind: Literal["shared"] = "shared"

    @property
    def key_dim(self) -> int:
        return 0

    def needs(self, earlier: Sequence[Spec]) -> int | None:
        return next((number for number in reversed(range(len(earlier))) if _chooses(earlier[number])), None)


def _chooses(layer: Spec) -> bool:
    """Whether a layer has an indexer of its own."""
    return any(isinstance(spec, IndexerSpec) and spec.key_dim > 0 for _, spec in layer.walk())
