"""Settings of blocks whose parameters a model has once and that several of its layers use."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from zoo.components.attention.spec import AttentionSpec
from zoo.components.ffn.spec import GatedSpec
from zoo.components.fields import Count, Flag
from zoo.registry.spec import Inherited, Param, Part, Slot, Spec, StateSpec

QKV = ("q", "k", "v")


class TransformerSpec(Spec):
    """ffn(norm(attention(norm((x, embeddings))))), with low-rank terms of each use (Zamba 2, arXiv 2411.15242)."""

    module: ClassVar[str] = "zoo.components.shared.transformer:Transformer"

    kind: Literal["transformer"] = "transformer"
    dim: Annotated[Count, Inherited()] = Field(description="Size of the residual stream.")
    uses: Annotated[tuple[int, ...], Inherited()] = Field(
        default=(), description="Which of the model's uses of shared blocks are this one's."
    )
    norm: Annotated[Spec, Slot("norm", absent="inherit")] = Field(
        description="Norm before the attention and before the feed-forward; by default the model's."
    )
    mixer: Annotated[Spec, Slot("mixer")] = Field(
        description="Attention over the stream and the embeddings side by side; its output is the stream's size."
    )
    ffn: Annotated[Spec, Slot("ffn")] = Field(description="A gated feed-forward on what the attention gives.")
    adapter_rank: Count = Field(description="Rank of the terms that each use adds to the products with shared weights.")
    adapt_mixer: Flag = Field(
        default=False, description="Whether they are added to queries, keys and values as well as to gate and up."
    )

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if not isinstance(self.mixer, AttentionSpec):
            raise ValueError(f"the mixer of a shared block must be of kind 'attention'; found '{self.mixer.kind}'")
        if not isinstance(self.ffn, GatedSpec):
            raise ValueError(f"the ffn of a shared block must be of kind 'gated'; found '{self.ffn.kind}'")
        return self

    @property
    def attention(self) -> AttentionSpec:
        """The mixer, by its own type, over twice the stream's size."""
        assert isinstance(self.mixer, AttentionSpec)
        return self.mixer.model_copy(update={"dim": 2 * self.dim, "out_dim": self.dim})

    @property
    def gated(self) -> GatedSpec:
        """The feed-forward, by its own type."""
        assert isinstance(self.ffn, GatedSpec)
        return self.ffn

    def children(self) -> dict[str, Spec]:
        adapters = {f"adapters.{use}": self.adapter() for use in self.uses}
        wide = self.norm.model_copy(update={"dim": 2 * self.dim})
        return {"mixer_norm": wide, "mixer": self.attention, "ffn_norm": self.norm, "ffn": self.ffn, **adapters}

    def adapter(self) -> "AdapterSpec":
        """What one use adds."""
        mixer = self.attention
        widths = (mixer.num_heads * mixer.head_dim, mixer.num_kv_heads * mixer.head_dim)
        return AdapterSpec(
            dim=self.dim,
            rank=self.adapter_rank,
            hidden_dim=self.gated.hidden_dim,
            widths=(*widths, widths[1]) if self.adapt_mixer else (),
        )

    def state(self) -> StateSpec | None:
        return self.mixer.state()


class AdapterSpec(Spec):
    """Low-rank terms of one use of a shared block: of gate and up, and of queries, keys and values or not."""

    module: ClassVar[str] = "zoo.components.shared.transformer:Adapter"

    kind: Literal["adapter"] = "adapter"
    dim: Count = Field(description="Size of the residual stream.")
    rank: Count = Field(description="Columns between the two factors.")
    hidden_dim: Count = Field(description="Size between the feed-forward's projections.")
    widths: tuple[Count, ...] = Field(description="Rows of queries, keys and values, or nothing.")

    def parameters(self) -> dict[str, Param]:
        found = {
            "gate_up_down.weight": Param((self.rank, self.dim), exact=True),
            "gate_up_up.weight": Param(
                (2 * self.hidden_dim, self.rank), shard=0, segments=2 * (self.hidden_dim,), exact=True
            ),
        }
        if self.widths:
            parts = {f"{name}_down.weight": Part(((i * self.rank, (i + 1) * self.rank),)) for i, name in enumerate(QKV)}
            found["qkv_down.weight"] = Param((3 * self.rank, 2 * self.dim), parts=parts, exact=True)
        ups = zip(QKV, self.widths, strict=False)
        return found | {f"{name}_up.weight": Param((width, self.rank), shard=0, exact=True) for name, width in ups}
