"""Settings of the decoder and of its blocks."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from zoo.components.fields import Count, Flag, Positive
from zoo.registry.spec import Inherited, Param, Slot, Spec, StateSpec


class PrenormSpec(Spec):
    """x + mixer(norm(x)), then x + ffn(norm(x)); either may be missing."""

    module: ClassVar[str] = "zoo.components.decoder.block:Prenorm"

    kind: Literal["prenorm"] = "prenorm"
    norm: Annotated[Spec, Slot("norm", absent="inherit")] = Field(
        description="Norm before the mixer and before the feed-forward; by default the model's."
    )
    mixer: Annotated[Spec | None, Slot("mixer")] = Field(
        description="What moves information between tokens; null for a block that is only a feed-forward."
    )
    ffn: Annotated[Spec | None, Slot("ffn")] = Field(
        description="What works on each token alone; null for a block that is only a mixer."
    )

    @model_validator(mode="after")
    def _check_not_empty(self) -> Self:
        if self.mixer is None and self.ffn is None:
            raise ValueError("a block needs a mixer or a feed-forward; found null for both")
        return self

    def children(self) -> dict[str, Spec]:
        found: dict[str, Spec] = {}
        if self.mixer is not None:
            found |= {"mixer_norm": self.norm, "mixer": self.mixer}
        if self.ffn is not None:
            found |= {"ffn_norm": self.norm, "ffn": self.ffn}
        return found

    def state(self) -> StateSpec | None:
        return None if self.mixer is None else self.mixer.state()


class DecoderSpec(Spec):
    """The skeleton of every language model: embedding, blocks, norm, head."""

    module: ClassVar[str] = "zoo.components.decoder.model:Decoder"

    kind: Literal["decoder"] = "decoder"
    context_length: Annotated[Count, Inherited()] = Field(description="The longest sequence in tokens.")
    vocab_size: Count = Field(description="Rows of the embedding, one per token id.")
    dim: Count = Field(description="Size of the residual stream.")
    tied_embeddings: Flag = Field(default=False, description="Whether the head is the embedding.")
    embedding_scale: Positive | None = Field(default=None, description="Multiplies embeddings; null leaves them.")
    logits_divisor: Positive | None = Field(default=None, description="Divides the logits; null leaves them.")
    logits_softcap: Positive | None = Field(
        default=None, description="Bounds logits smoothly: softcap tanh(logit / softcap); null leaves them."
    )
    norm: Annotated[Spec, Slot("norm")] = Field(description="Norm before the head, and of blocks that name none.")
    layers: Annotated[tuple[Spec, ...], Slot("block", default="prenorm", runs=True)] = Field(
        description="Runs of blocks, first to last."
    )

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        if not self.layers:
            raise ValueError("layers must hold at least one block; found none")
        return self

    def parameters(self) -> dict[str, Param]:
        shape = (self.vocab_size, self.dim)
        if self.tied_embeddings:
            return {"embed.weight": Param(shape, shard=0)}
        looked_up = Param(shape, shard=0, active=1 / self.vocab_size, product=False)
        return {"embed.weight": looked_up, "head.weight": Param(shape, shard=0)}

    def states(self) -> tuple[StateSpec | None, ...]:
        """What each layer keeps of a sequence, first to last; None for a layer that keeps nothing."""
        return tuple(layer.state() for layer in self.layers)
