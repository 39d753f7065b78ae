"""What one rank reads of a checkpoint: of each tensor some ranges of one axis, and nothing of the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from zoo.loading.mapping import Placement
from zoo.registry.spec import Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a checkpoint's tensor that a rank holds, as `tensor` of its own model.

    ranges: (start, stop) along `axis` of the whole tensor, one after the other; none: it is whole.
    zeros: nothing is read, for another rank has it.
    """

    tensor: Tensor
    axis: int = 0
    ranges: tuple[tuple[int, int], ...] = ()
    zeros: bool = False

    def places(self) -> Iterator[tuple[Tensor, tuple[int, int] | None]]:
        """Tensors that each take one range, and the range; None for all."""
        if not self.ranges:
            yield self.tensor, None
        elif len(self.ranges) == 1:
            yield self.tensor, self.ranges[0]
        else:
            assert not self.tensor.index, "only what stands alone in a parameter is split in several places"
            yield from self._several()

    def _several(self) -> Iterator[tuple[Tensor, tuple[int, int]]]:
        at = 0
        for start, stop in self.ranges:
            index = (*(slice(None) for _ in range(self.axis)), slice(at, at + stop - start))
            shape = list(self.tensor.shape)
            shape[self.axis] = stop - start
            yield replace(self.tensor, shape=tuple(shape), index=index), (start, stop)
            at += stop - start


def narrowed(placements: Sequence[Placement], pieces: Mapping[str, Piece]) -> list[Placement]:
    """Where the pieces come from, of all that a checkpoint has."""
    found: list[Placement] = []
    for placement in placements:
        piece = pieces.get(placement.tensor.name)
        if piece is not None and not piece.zeros:
            found += [_narrow(placement, tensor, piece.axis, span) for tensor, span in piece.places()]
    return found


def _narrow(placement: Placement, tensor: Tensor, axis: int, span: tuple[int, int] | None) -> Placement:
    if span is None:
        return replace(placement, tensor=tensor)
    dims = len(placement.tensor.shape)
    if placement.transpose and axis >= dims - 2:
        axis = 2 * dims - 3 - axis
    if axis == 0:
        first = placement.rows[0]
        return replace(placement, tensor=tensor, rows=(first + span[0], first + span[1]))
    assert axis == dims - 1, "rows or columns of a file's tensor are split"
    first = placement.columns[0] if placement.columns else 0
    return replace(placement, tensor=tensor, columns=(first + span[0], first + span[1]))


def taken(values: torch.Tensor, first: int, shape: Sequence[int], piece: Piece) -> torch.Tensor:
    """Of neighbouring elements of a whole tensor, flattened, from number `first` on: those of the piece, in order."""
    if not piece.ranges:
        return values
    inner = 1
    for size in shape[piece.axis + 1 :]:
        inner *= size
    places = torch.arange(first, first + len(values)) // inner % shape[piece.axis]
    inside = torch.zeros(len(values), dtype=torch.bool)
    for start, stop in piece.ranges:
        inside |= (places >= start) & (places < stop)
    return values[inside]
