"""Pipeline parallelism: a stage is a run of neighbouring layers, which hands the residual stream to the next one.

What later layers read of earlier ones beside the stream travels with it: the embeddings, for shared blocks, and the
rows that a step appends to a state which other layers read too; each stage with such a layer keeps a copy of the state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Protocol, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo.components.block.sharing import connect
from zoo.components.block.spec import SharingSpec, holding
from zoo.components.build import make
from zoo.components.decoder.model import Decoder, Embedding
from zoo.components.decoder.spec import DecoderSpec
from zoo.components.fields import Flag, Index
from zoo.components.linear import Linear
from zoo.components.native.latent import InSlabs
from zoo.components.rope.rotary import LeRoPE
from zoo.components.rope.spec import RopeSpec
from zoo.components.step import EMBEDDINGS, Cached, LatentState, Step
from zoo.registry.spec import Borrowed, Param, Spec, StateSpec

PIECE, OTHER_PIECE = {"cpu": 16}, 128
"""Rows of a piece of a step at least: fewer take nearly as long, since each piece reads all weights again."""

ENTERED = -1
"""Stands for what entered the first layer, among the numbers of layers of which something travels."""


class StageSpec(DecoderSpec):
    """The layers of one stage, under the names and numbers that they have in the whole model."""

    module: ClassVar[str] = "zoo.devices.stage:Stage"

    first: Index = Field(description="The number of its first layer.")
    begins: Flag = Field(description="Whether it is the first stage.")
    ends: Flag = Field(description="Whether it is the last stage.")
    taken: tuple[tuple[int, int], ...] = Field(
        description="What comes with the stream: of which earlier layer, and how many numbers of each row."
    )
    given: tuple[tuple[int, int], ...] = Field(description="What goes on with the stream, as `taken`.")
    copies: tuple[tuple[int, StateSpec], ...] = Field(description="Earlier layers' states that its own layers borrow.")
    holders: tuple[tuple[int, int], ...] = Field(
        description="Layers that hold a shared block here, and the one that holds it in the whole model."
    )

    @classmethod
    def of(cls, model: DecoderSpec, start: int, stop: int) -> Self:
        """Layers `start` to `stop` - 1 of a model. It was checked as a whole."""
        begins, ends = start == 0, stop == len(model.layers)
        layers = holding(model.layers[start:stop])
        fields = {name: getattr(model, name) for name in DecoderSpec.model_fields}
        fields |= {"layers": layers, "first": start, "begins": begins, "ends": ends}
        fields |= {"taken": travelling(model, start), "given": travelling(model, stop)}
        fields |= {"copies": tuple(copies(model, start, stop).items()), "holders": _holders(model, layers, start)}
        fields |= {"lerope": model.lerope and turns(layers)}
        return cls.model_construct(**fields if begins else fields | {"vision": None, "audio": None})

    @property
    def embeds(self) -> bool:
        """Whether it has the embedding: as such, or as the head."""
        return self.begins or (self.ends and self.tied_embeddings)

    def parameters(self) -> dict[str, Param]:
        kept = {"embed.weight": self.embeds, "head.weight": self.ends}
        return {name: param for name, param in super().parameters().items() if kept.get(name, True)}

    def children(self) -> dict[str, Spec]:
        layers: dict[str, Spec] = {f"layers.{self.first + i}": layer for i, layer in enumerate(self.layers)}
        return {**({"norm": self.norm} if self.ends else {}), **layers, **self.encoders()}

    def states(self) -> tuple[StateSpec | None, ...]:
        """By the layers' numbers in the whole model: None for those of other stages, unless it keeps a copy."""
        kept = dict(self.copies)
        return (*(kept.get(number) for number in range(self.first)), *super().states())

    def whole(self, name: str) -> str:
        """What a module, parameter or tensor of this stage is called in the whole model."""
        for here, there in self.holders:
            if name.startswith(f"layers.{here}.shared"):
                return name.replace(f"layers.{here}.", f"layers.{there}.", 1)
        return name


def turns(layers: Sequence[Spec]) -> bool:
    """Whether any of the layers has rope."""
    return any(isinstance(spec, RopeSpec) for layer in layers for _, spec in layer.walk())


def borrowers(model: DecoderSpec) -> Iterator[tuple[int, Borrowed]]:
    """Layers that read an earlier layer's state, by number."""
    for number, layer in enumerate(model.layers):
        for _, spec in layer.walk():
            if (borrowed := spec.borrows()) is not None:
                yield number, borrowed


def lent(model: DecoderSpec, lender: int) -> StateSpec | None:
    """What is kept elsewhere of a layer's state."""
    state = model.layers[lender].state()
    return None if state is None else state.lent()


def copies(model: DecoderSpec, start: int, stop: int) -> dict[int, StateSpec]:
    """What a stage of layers `start` to `stop` - 1 keeps of earlier layers, by their number."""
    lenders = {borrowed.layer for number, borrowed in borrowers(model) if start <= number < stop}
    found = {lender: lent(model, lender) for lender in sorted(lenders) if lender < start}
    return {lender: state for lender, state in found.items() if state is not None}


def travelling(model: DecoderSpec, border: int) -> tuple[tuple[int, int], ...]:
    """What goes beside the stream from the layers before a border to those behind it, and how wide it is."""
    found = [(ENTERED, model.dim)] if border and _shares(model.layers[border:]) else []
    behind = copies(model, border, len(model.layers))
    return (*found, *((lender, state.elements(1)) for lender, state in behind.items()))


def _shares(layers: Sequence[Spec]) -> bool:
    return any(isinstance(layer, SharingSpec) for layer in layers)


def _holders(model: DecoderSpec, layers: Sequence[Spec], start: int) -> tuple[tuple[int, int], ...]:
    whole = {layer.number: i for i, layer in enumerate(model.layers) if isinstance(layer, SharingSpec) and layer.uses}
    return tuple(
        (start + i, whole[layer.number])
        for i, layer in enumerate(layers)
        if isinstance(layer, SharingSpec) and layer.uses
    )


def _least(device: torch.device) -> int:
    return PIECE.get(device.type, OTHER_PIECE)


class Link(Protocol):
    """How a stage's stream reaches it, and leaves it."""

    def take(self, rows: int, widths: Sequence[int], device: torch.device) -> list[Tensor]:
        """The stream (T, D) of the stage before, and what comes with it, as wide as said."""
        ...

    def give(self, x_TD: Tensor, others: Sequence[Tensor]) -> None:
        """The stream to the stage behind, and what goes with it; nobody changes these tensors any more."""
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
        connect(numbered.values())
        if spec.ends:
            self.norm = make(spec.norm)
        self.lerope = LeRoPE(spec.parameters()["lerope.alpha"].shape[0]) if spec.lerope else None
        for name, encoder in spec.encoders().items():
            self.add_module(name, make(encoder))
        self.head = None if spec.tied_embeddings or not spec.ends else Linear(spec.dim, spec.vocab_size)

    def pieces(self, rows: int, device: torch.device) -> int:
        """So many that all stages work: a stage computes one piece while the next one computes the one before."""
        return max(1, min(2 * self.stages, rows // _least(device)))

    def turns(self, rows: int, device: torch.device) -> int:
        """So many that each stage computes one of them, unless they become smaller than is worth it."""
        return max(1, min(self.stages, rows // _least(device)))

    @property
    def given(self) -> tuple[tuple[int, int], ...]:
        """What goes on with the stream: of which layer, and how wide."""
        assert isinstance(self.spec, StageSpec)
        return self.spec.given

    def hidden(self, tokens_T: Tensor, step: Step) -> Tensor:
        """The stream behind this stage's layers, (T, D); of the last stage normalised."""
        spec = self.spec
        assert isinstance(spec, StageSpec)
        x_TD, known = self._begun(tokens_T, step, spec)
        numbers = range(spec.first, spec.first + len(spec.layers))
        lending = {number: Lending(step.states[number], width) for number, width in spec.given if number in numbers}
        for number, layer in zip(numbers, self.get_submodule("layers").children(), strict=True):
            x_TD = layer(x_TD, step, lending.get(number, step.states[number]))
        if spec.ends:
            normed_TD: Tensor = self.norm(x_TD)
            return normed_TD
        known |= {number: state.rows_Tm for number, state in lending.items()}
        self.link.give(x_TD, [known[number] for number, _ in spec.given])
        return x_TD

    def _begun(self, tokens_T: Tensor, step: Step, spec: StageSpec) -> tuple[Tensor, dict[int, Tensor]]:
        """What its first layer reads, and what else is known of earlier layers' work in this step, by their number."""
        if spec.begins:
            x_TD = self.entered(tokens_T, step)
            return x_TD, {ENTERED: x_TD}
        x_TD, *others = self.link.take(len(tokens_T), [width for _, width in spec.taken], tokens_T.device)
        known = {number: rows_Tm for (number, _), rows_Tm in zip(spec.taken, others, strict=True)}
        for number, _ in spec.copies:
            step.states[number].append(known[number])
        if self.lerope is not None:
            self.lerope(step)
        if ENTERED in known:
            step.memo[EMBEDDINGS] = known[ENTERED]
        return x_TD, known


class Lending:
    """A layer's state in a step, of which rows go to other stages."""

    def __init__(self, state: LatentState, width: int) -> None:
        self.state, self.width = state, width
        self.rows_Tm = torch.empty(0)

    def append(self, new_Tm: Tensor) -> None:
        """Keeps this step's rows, and remembers them."""
        self.rows_Tm = new_Tm[:, : self.width]
        self.state.append(new_Tm)

    def read(self, lying: torch.dtype | None = None) -> Sequence[Cached | InSlabs]:
        """As the state itself."""
        return self.state.read(lying)
