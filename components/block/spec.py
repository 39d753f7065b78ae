"""Settings of the blocks that norm, scale or share otherwise than the plain one, `prenorm`."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from zoo.components.cache.spec import JointStateSpec
from zoo.components.fields import Count, Index, Positive
from zoo.registry.spec import Inherited, Param, Slot, Spec, StateSpec


class PostnormSpec(Spec):
    """x + norm(mixer(x)), then x + norm(ffn(x)) (OLMo 2, arXiv 2501.00656, section 3.1)."""

    module: ClassVar[str] = "zoo.components.block.postnorm:Postnorm"

    kind: Literal["postnorm"] = "postnorm"
    norm: Annotated[Spec, Slot("norm", absent="inherit")] = Field(
        description="Norm after the mixer and after the feed-forward; by default the model's."
    )
    mixer: Annotated[Spec, Slot("mixer")] = Field(description="What moves information between tokens.")
    ffn: Annotated[Spec, Slot("ffn")] = Field(description="What works on each token alone.")

    def children(self) -> dict[str, Spec]:
        return {"mixer": self.mixer, "mixer_post_norm": self.norm, "ffn": self.ffn, "ffn_post_norm": self.norm}

    def state(self) -> StateSpec | None:
        return self.mixer.state()


class SandwichSpec(Spec):
    """x + norm(mixer(norm(x))), then x + norm(ffn(norm(x))) (Gemma 2, arXiv 2408.00118, section 2)."""

    module: ClassVar[str] = "zoo.components.block.sandwich:Sandwich"

    kind: Literal["sandwich"] = "sandwich"
    norm: Annotated[Spec, Slot("norm", absent="inherit")] = Field(
        description="Norm before and after the mixer and the feed-forward; by default the model's."
    )
    mixer: Annotated[Spec, Slot("mixer")] = Field(description="What moves information between tokens.")
    ffn: Annotated[Spec, Slot("ffn")] = Field(description="What works on each token alone.")

    def children(self) -> dict[str, Spec]:
        mixing = {"mixer_norm": self.norm, "mixer": self.mixer, "mixer_post_norm": self.norm}
        return mixing | {"ffn_norm": self.norm, "ffn": self.ffn, "ffn_post_norm": self.norm}

    def state(self) -> StateSpec | None:
        return self.mixer.state()


class ScaledSpec(Spec):
    """x + scale mixer(norm(x)), then x + scale ffn(norm(x)) (Granite; transformers: models/granite)."""

    module: ClassVar[str] = "zoo.components.block.scaled:Scaled"

    kind: Literal["scaled"] = "scaled"
    residual_scale: Positive = Field(description="Multiplies what the mixer and the feed-forward add.")
    norm: Annotated[Spec, Slot("norm", absent="inherit")] = Field(
        description="Norm before the mixer and before the feed-forward; by default the model's."
    )
    mixer: Annotated[Spec, Slot("mixer")] = Field(description="What moves information between tokens.")
    ffn: Annotated[Spec, Slot("ffn")] = Field(description="What works on each token alone.")

    def children(self) -> dict[str, Spec]:
        return {"mixer_norm": self.norm, "mixer": self.mixer, "ffn_norm": self.norm, "ffn": self.ffn}

    def state(self) -> StateSpec | None:
        return self.mixer.state()


class SharingSpec(Spec):
    """x + mixer(norm(x + projection(shared(x)))), with a block that others use too (Zamba 2, arXiv 2411.15242)."""

    module: ClassVar[str] = "zoo.components.block.sharing:Sharing"

    kind: Literal["sharing"] = "sharing"
    dim: Annotated[Count, Inherited()] = Field(description="Size of the residual stream.")
    shared: Annotated[tuple[Spec, ...], Slot("shared", absent="inherit")] = Field(
        description="The shared blocks; by default the model's."
    )
    number: Index = Field(description="Which of them this block uses, from 0 on.")
    use: Annotated[int, Inherited()] = Field(default=0, description="How many uses of shared blocks come before.")
    uses: Annotated[tuple[int, ...] | None, Inherited()] = Field(
        default=None, description="All uses of this shared block where this is the first, which holds it."
    )
    norm: Annotated[Spec, Slot("norm", absent="inherit")] = Field(
        description="Norm before the mixer; by default the model's."
    )
    mixer: Annotated[Spec, Slot("mixer")] = Field(description="What moves information between tokens.")

    @model_validator(mode="after")
    def _check_number(self) -> Self:
        count = len(self.shared)
        if self.number >= count:
            raise ValueError(f"number must be below {count}, the count of shared blocks; found {self.number}")
        return self

    def parameters(self) -> dict[str, Param]:
        return {"projection.weight": Param((self.dim, self.dim))}

    def children(self) -> dict[str, Spec]:
        own: dict[str, Spec] = {"mixer_norm": self.norm, "mixer": self.mixer}
        if self.uses is None:
            return own
        return {"shared": self.shared[self.number].model_copy(update={"uses": self.uses})} | own

    def state(self) -> StateSpec:
        return JointStateSpec(states=(self.shared[self.number].state(), self.mixer.state()))

    def passes(self) -> Iterator[Spec]:
        yield from super().passes()
        if not self.uses:
            yield from self.shared[self.number].passes()

    def flops(self, context: int) -> float:
        lent = 0.0 if self.uses else sum(spec.flops(context) for _, spec in self.shared[self.number].walk())
        return super().flops(context) + lent


def linked(layers: tuple[Spec, ...]) -> tuple[Spec, ...]:
    """The layers of a model, with those that share told their place among all uses."""
    found, use = list(layers), 0
    for i, layer in enumerate(layers):
        if isinstance(layer, SharingSpec):
            found[i], use = layer.model_copy(update={"use": use}), use + 1
    return holding(tuple(found))


def holding(layers: tuple[Spec, ...]) -> tuple[Spec, ...]:
    """The layers that one device has, where the first that uses a shared block holds it, for all of them."""
    uses: dict[int, list[int]] = {}
    for layer in layers:
        if isinstance(layer, SharingSpec):
            uses.setdefault(layer.number, []).append(layer.use)
    return tuple(
        layer.model_copy(update={"uses": tuple(uses[layer.number]) if layer.use == uses[layer.number][0] else None})
        if isinstance(layer, SharingSpec)
        else layer
        for layer in layers
    )
