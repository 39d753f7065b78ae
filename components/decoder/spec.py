"""Settings of the decoder and of its blocks."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from zoo.components.block.spec import SharingSpec, linked
from zoo.components.cache.spec import CacheDtype
from zoo.components.encoder import EncoderSpec
from zoo.components.fields import Count, Flag, Positive
from zoo.components.indexer.spec import SharedIndexerSpec
from zoo.components.rope.spec import RopeSpec
from zoo.registry.spec import Inherited, Param, Share, Slot, Spec, Split, StateSpec


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
    vocab_size: Annotated[Count, Split(uneven=True)] = Field(description="Rows of the embedding, one per token id.")
    dim: Count = Field(description="Size of the residual stream.")
    tied_embeddings: Flag = Field(default=False, description="Whether the head is the embedding.")
    embedding_scale: Positive | None = Field(default=None, description="Multiplies embeddings; null leaves them.")
    logits_divisor: Positive | None = Field(default=None, description="Divides the logits; null leaves them.")
    logits_softcap: Positive | None = Field(
        default=None, description="Bounds logits smoothly: softcap tanh(logit / softcap); null leaves them."
    )
    lerope: Flag = Field(
        default=False, description="Angles of rope times exp(alpha), learned for each lane pair, one for all layers."
    )
    cache_dtype: CacheDtype | None = Field(
        default=None,
        description="Codes of eight bits in which keys, values and latents are cached; null keeps them as computed.",
    )
    norm: Annotated[Spec, Slot("norm")] = Field(description="Norm before the head, and of blocks that name none.")
    shared: Annotated[tuple[Spec, ...], Slot("shared")] = Field(
        default=(), description="Blocks whose parameters the model has once, and that layers of kind `sharing` use."
    )
    layers: Annotated[tuple[Spec, ...], Slot("block", default="prenorm", runs=True)] = Field(
        description="Runs of blocks, first to last."
    )
    vision: Annotated[EncoderSpec | None, Slot("vision", bind={"out_dim": "dim"})] = Field(
        default=None, description="Encoder of images; null for a model that reads none."
    )
    audio: Annotated[EncoderSpec | None, Slot("audio", bind={"out_dim": "dim"})] = Field(
        default=None, description="Encoder of sounds; null for a model that hears none."
    )

    @field_validator("layers")
    @classmethod
    def _link(cls, layers: tuple[Spec, ...]) -> tuple[Spec, ...]:
        return linked(layers)

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        if not self.layers:
            raise ValueError("layers must hold at least one block; found none")
        self._check_earlier()
        self._check_codes()
        if self.lerope and len(self._rope_lanes()) != 1:
            found = self._rope_lanes() or "none"
            raise ValueError(f"lerope needs layers whose ropes turn equally many lanes; found {found}")
        unused = {*range(len(self.shared))} - {layer.number for layer in self.layers if isinstance(layer, SharingSpec)}
        if unused:
            raise ValueError(f"every shared block must be used; found no layer that uses number {min(unused)}")
        return self

    def _check_codes(self) -> None:
        """Codes are asked for only where something is kept that can be coded."""
        kept = [part for state in self.states() if state for part in state.parts() if part]
        if self.cache_dtype is not None and not any("cache_dtype" in type(part).model_fields for part in kept):
            kinds = ", ".join(sorted({part.kind for part in kept})) or "none"
            raise ValueError(f"cache_dtype needs layers that cache keys, values or latents; found states {kinds}")

    def _rope_lanes(self) -> list[int]:
        """How many lanes the ropes of all layers turn."""
        specs = (spec for layer in self.layers for _, spec in layer.walk())
        return sorted({spec.lanes for spec in specs if isinstance(spec, RopeSpec)})

    def _check_earlier(self) -> None:
        """What layers take from earlier ones is there: latents, and the choices of indexers."""
        for index, layer in enumerate(self.layers):
            for _, spec in layer.walk():
                self._check_borrowed(index, spec)
                if isinstance(spec, SharedIndexerSpec) and spec.needs(self.layers[:index]) is None:
                    raise ValueError(f"layer {index} uses the choice of an earlier indexer; found none")

    def _check_borrowed(self, index: int, spec: Spec) -> None:
        borrowed = spec.borrows()
        if borrowed is None:
            return
        lender = self.layers[borrowed.layer].state() if borrowed.layer < index else None
        if lender is None or not lender.serves(borrowed.kept):
            raise ValueError(
                f"layer {index} reads the state of layer {borrowed.layer}, which must be an earlier one of the same "
                f"sizes that keeps its own; found {'none' if lender is None else repr(lender)}"
            )

    def parameters(self) -> dict[str, Param]:
        shape, found = (self.vocab_size, self.dim), {}
        if self.lerope:
            pairs = self._rope_lanes()[0] // 2
            found["lerope.alpha"] = Param((pairs,), init="zeros", product=False, dtype="float32")
        if self.tied_embeddings:
            return {"embed.weight": Param(shape, shard=0, exact=True), **found}
        looked_up = Param(shape, shard=0, active=1 / self.vocab_size, product=False)
        return {"embed.weight": looked_up, "head.weight": Param(shape, shard=0), **found}

    def children(self) -> dict[str, Spec]:
        """Without the shared blocks, each of which stands in the first layer that uses it."""
        layers: dict[str, Spec] = {f"layers.{i}": layer for i, layer in enumerate(self.layers)}
        return {"norm": self.norm, **layers, **self.encoders()}

    def passes(self) -> Iterator[Spec]:
        """Without the encoders: tokens of text do not go through them."""
        yield self
        for name, child in self.children().items():
            if name not in self.encoders():
                yield from child.passes()

    def divided(self, share: Share, where: str = "model") -> Self:
        """Encoders are the first rank's, which hands their rows on."""
        divided = super().divided(share, where)
        return divided if share.rank == 0 else divided.model_copy(update={"vision": None, "audio": None})

    def encoders(self) -> dict[str, EncoderSpec]:
        """The encoders of media by the name of their node, which is the module's too."""
        found = {"vision": self.vision, "audio": self.audio}
        return {name: encoder for name, encoder in found.items() if encoder is not None}

    def states(self) -> tuple[StateSpec | None, ...]:
        """What each layer keeps of a sequence, first to last; None for a layer that keeps nothing."""
        return tuple(layer.state() for layer in self.layers)
