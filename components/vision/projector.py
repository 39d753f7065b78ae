"""From an image encoder's rows to the decoder's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.components.build import make
from zoo.components.ffn.gated import ACTIVATIONS
from zoo.components.linear import Linear
from zoo.components.vision.spec import ProjectorSpec

Grid = tuple[int, int]
"""Rows and columns of an image's patches."""


class Projector(nn.Module):
    """Norm and merging of patches where the card has them, then two projections with a function between."""

    def __init__(self, spec: ProjectorSpec) -> None:
        super().__init__()
        self.spec = spec
        self.norm = None if spec.norm is None else make(spec.norm)
        side = spec.merge
        self.merge = None if side is None else Linear(spec.in_dim * side**2, spec.in_dim)
        # `in` is a word of Python's own.
        self.add_module("in", Linear(spec.in_dim, spec.out_dim, bias=spec.bias))
        self.out = Linear(spec.out_dim, spec.out_dim, bias=spec.bias)

    def forward(self, x_TI: Tensor, grids: Sequence[Grid]) -> Tensor:
        """(T, I) rows of patches, image after image, to (N, D) rows of cells."""
        if self.norm is not None:
            x_TI = self.norm(x_TI)
        if self.merge is not None and self.spec.merge is not None:
            parts = torch.split(x_TI, [rows * columns for rows, columns in grids])
            squares = [_squares(part, grid, self.spec.merge) for part, grid in zip(parts, grids, strict=True)]
            x_TI = self.merge(torch.cat(squares))
        hidden_TD = ACTIVATIONS[self.spec.activation](self.get_submodule("in")(x_TI))
        y_TD: Tensor = self.out(hidden_TD)
        return y_TD


def _squares(x_TI: Tensor, grid: Grid, side: int) -> Tensor:
    """The patches of each square side by side, (T / side^2, I side^2): for each channel its rows, then its columns."""
    rows, columns = grid[0] // side, grid[1] // side
    squares = x_TI.view(rows, side, columns, side, -1).permute(0, 2, 4, 1, 3)
    return squares.reshape(rows * columns, -1)
