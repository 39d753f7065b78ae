"""Gathers the tensors of a model that is spread over ranks on the first rank, one whole tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from zoo.assemble import assemble
from zoo.components.matrix import values
from zoo.devices.group import Group
from zoo.devices.run import Run
from zoo.devices.shares import Part
from zoo.loading.pieces import Piece
from zoo.registry.spec import Tensor as Stored

GIVE = "give"
"""The task in which ranks send what they have of a tensor."""

CHUNK = 16 << 20
"""Bytes that are sent at a time, each of which is a sign that they come on."""


@dataclass(frozen=True)
class Gathered:
    """What a model's parameters hold, as `zoo.saving.values.Weights` says. run, module: the first rank's.

    Raises RankError where another one fails to give its part.
    """

    run: Run
    module: nn.Module

    def dtype(self, param: str) -> torch.dtype:
        """The type that the ranks keep a parameter of the whole model in."""
        return self._whole.get_parameter(param).dtype

    def value(self, tensor: Stored) -> Tensor:
        """A tensor of the whole model, on the CPU."""
        holders = self._holders[tensor.name]
        others = [rank for rank in holders if rank]
        if not others and not holders[0].ranges:
            return _held(self.module, holders[0]).cpu()
        whole = torch.empty(tensor.shape, dtype=self.dtype(tensor.param))
        with self.run.ranks.together(GIVE, {"name": tensor.name, "ranks": others, "bytes": CHUNK}):
            for rank, piece in holders.items():
                self._place(whole, rank, piece)
        return whole

    @cached_property
    def _whole(self) -> nn.Module:
        return assemble(self.run.part.whole, self.run.placement.dtype)

    @cached_property
    def _holders(self) -> dict[str, dict[int, Piece]]:
        """Of each tensor, ranks whose pieces are together all of it, and these."""
        found: dict[str, dict[int, Piece]] = {}
        for rank in range(self.run.part.mesh.size):
            for name, piece in Part.of(self.run.part.whole, self.run.part.mesh, rank).pieces.items():
                there = found.setdefault(name, {})
                known = {span for other in there.values() for span in other.ranges}
                if not piece.zeros and (not there or not known.issuperset(piece.ranges)):
                    there[rank] = piece
        return found

    def _place(self, whole: Tensor, rank: int, piece: Piece) -> None:
        """Brings a rank's piece to its places in the tensor, without another copy of it where these are one stretch."""
        places = [whole.narrow(piece.axis, start, stop - start) for start, stop in piece.ranges] or [whole]
        if rank and len(places) == 1 and places[0].is_contiguous():
            self._receive(places[0], rank)
            return
        held = self._receive(whole.new_empty(piece.tensor.shape), rank) if rank else _held(self.module, piece)
        sizes = [place.shape[piece.axis] for place in places]
        for place, part in zip(places, held.split(sizes, piece.axis), strict=True):
            place.copy_(part)

    def _receive(self, place: Tensor, rank: int) -> Tensor:
        assert self.run.ranks.groups is not None
        world, _ = self.run.ranks.groups
        for chunk in _chunks(place, CHUNK):
            chunk.copy_(world.receive(torch.empty_like(chunk, device=self.run.placement.device), rank))
        return place


def give(message: dict[str, Any], part: Part, module: nn.Module, world: Group) -> None:
    """Sends the first rank what this one has of a tensor, where it is asked for it."""
    if part.rank in message["ranks"]:
        held = _held(module, part.pieces[message["name"]])
        for chunk in _chunks(held.contiguous(), message["bytes"]):
            world.send(chunk, 0)()


def _chunks(x: Tensor, size: int) -> Iterator[Tensor]:
    """The bytes of a tensor that lies in one piece, so many at a time."""
    yield from x.view(-1).view(torch.uint8).split(size)


def _held(module: nn.Module, piece: Piece) -> Tensor:
    return values(module, piece.tensor.param, piece.tensor.index)
