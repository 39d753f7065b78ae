"""Some neighbouring layers of a decoder: a stage of several, of which each hands the residual stream to the next."""

from __future__ import annotations

from typing import ClassVar, Protocol, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo.components.build import make
from zoo.components.decoder.model import Decoder, Embedding
from zoo.components.decoder.spec import DecoderSpec
from zoo.components.fields import Flag, Index
from zoo.components.linear import Linear
from zoo.components.step import Step
from zoo.registry.spec import Param, Spec


class StageSpec(DecoderSpec):
    """The layers of one stage, under the names that they have in the whole model."""

    module: ClassVar[str] = "zoo.devices.stage:Stage"

    first: Index = Field(description="The number of its first layer.")
    begins: Flag = Field(description="Whether it is the first stage.")
    ends: Flag = Field(description="Whether it is the last stage.")

    @classmethod
    def of(cls, model: DecoderSpec, start: int, stop: int) -> Self:
        """Layers `start` to `stop` - 1 of a model. It was checked as a whole."""
        begins, ends = start == 0, stop == len(model.layers)
        fields = {name: getattr(model, name) for name in DecoderSpec.model_fields}
        fields |= {"layers": model.layers[start:stop], "first": start, "begins": begins, "ends": ends}
        return cls.model_construct(**fields if begins else fields | {"vision": None, "audio": None})

    @property
    def embeds(self) -> bool:
        """Whether it has the embedding: as such, or as the head."""
        return self.begins or (self.ends and self.tied_embeddings)

    def parameters(self) -> dict[str, Param]:
        kept = {"embed.weight": self.embeds, "head.weight": self.ends}
        return {name: param for name, param in super().parameters().items() if kept[name]}

    def children(self) -> dict[str, Spec]:
        layers: dict[str, Spec] = {f"layers.{self.first + i}": layer for i, layer in enumerate(self.layers)}
        return {**({"norm": self.norm} if self.ends else {}), **layers, **self.encoders()}


class Link(Protocol):
    """How a stage's stream reaches it, and leaves it."""

    def take(self, rows: int, device: torch.device) -> Tensor:
        """The stream (T, D) of the stage before."""
        ...

    def give(self, x_TD: Tensor) -> None:
        """The stream to the stage behind."""
        ...


class Stage(Decoder):
    """What a stage has of a decoder: `hidden` gives the last stage's output only there."""

    link: Link

    def __init__(self, spec: StageSpec) -> None:
        nn.Module.__init__(self)
        self.spec = spec
        if spec.embeds:
            self.embed = Embedding(spec.vocab_size, spec.dim)
        numbered = {str(spec.first + i): make(layer) for i, layer in enumerate(spec.layers)}
        self.add_module("layers", nn.ModuleDict(numbered))
        if spec.ends:
            self.norm = make(spec.norm)
        self.lerope = None
        for name, encoder in spec.encoders().items():
            self.add_module(name, make(encoder))
        self.head = None if spec.tied_embeddings or not spec.ends else Linear(spec.dim, spec.vocab_size)

    def hidden(self, tokens_T: Tensor, step: Step) -> Tensor:
        """The stream behind this stage's layers, (T, D); of the last stage normalised."""
        spec = self.spec
        assert isinstance(spec, StageSpec)
        x_TD = self.entered(tokens_T, step) if spec.begins else self.link.take(len(tokens_T), tokens_T.device)
        for layer, state in zip(self.get_submodule("layers").children(), step.states, strict=True):
            x_TD = layer(x_TD, step, state)
        if spec.ends:
            normed_TD: Tensor = self.norm(x_TD)
            return normed_TD
        self.link.give(x_TD)
        return x_TD
