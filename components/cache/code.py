"""How a row of a cache lies in memory: as it is, or as codes of eight bits with a scale for each group of lanes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from zoo.components.cache.spec import CacheDtype

SCALE = torch.bfloat16
"""The type of scales: two bytes, and no size of a number that a model computes is out of its range."""

TOPS = {"int8": 127.0, "fp8": 448.0}
"""The largest code: what the largest number of a group becomes."""

LEAST = torch.finfo(SCALE).tiny


@dataclass(frozen=True)
class RowCode:
    """Rows of numbers in `dtype` as a cache keeps them.

    kind: "int8" or "fp8" (e4m3), or None for rows that are kept as they are. lanes: how many neighbouring numbers
    share a scale, one group after the other. A coded row is int8: its scales, its codes, and a byte more where their
    number is odd. A row depends on nothing but its own numbers, so that it is the same in every chunk and batch.
    """

    kind: CacheDtype | None
    lanes: tuple[int, ...]
    dtype: torch.dtype

    @cached_property
    def stored(self) -> torch.dtype:
        """The type of a row's elements in memory."""
        return self.dtype if self.kind is None else torch.int8

    @cached_property
    def width(self) -> int:
        """How many elements a row has in memory."""
        numbers = sum(self.lanes)
        return numbers if self.kind is None else self.start + numbers + numbers % 2

    @cached_property
    def start(self) -> int:
        """Where codes begin, behind the scales."""
        return SCALE.itemsize * len(self.lanes)

    def encode(self, x: Tensor) -> Tensor:
        """(..., numbers) as rows (..., width). What is not finite stays so: its group's scale is not finite either."""
        if self.kind is None:
            return x
        pieces = x.float().split(self.lanes, -1)
        top = TOPS[self.kind]
        scales = torch.cat([piece.abs().amax(-1, keepdim=True) for piece in pieces], -1).div_(top).to(SCALE)
        divisors = scales.float().clamp_(min=LEAST).split(1, -1)
        codes = torch.cat([piece / divisor for piece, divisor in zip(pieces, divisors, strict=True)], -1)
        codes = codes.clamp_(-top, top)
        coded = codes.round_().to(torch.int8) if self.kind == "int8" else codes.to(torch.float8_e4m3fn).view(torch.int8)
        pad = coded.new_zeros((*coded.shape[:-1], self.width - self.start - coded.shape[-1]))
        return torch.cat((scales.view(torch.int8), coded, pad), -1)

    def decode(self, rows: Tensor) -> Tensor:
        """Rows as numbers in `dtype`; those that are kept as they are without a copy."""
        if self.kind is None:
            return rows
        codes = rows[..., self.start : self.start + sum(self.lanes)]
        x = codes.to(self.dtype) if self.kind == "int8" else codes.view(torch.float8_e4m3fn).to(self.dtype)
        scales = rows[..., : self.start].view(SCALE).to(self.dtype)
        for piece, scale in zip(x.split(self.lanes, -1), scales.split(1, -1), strict=True):
            piece.mul_(scale)
        return x

    def rounded(self, x: Tensor) -> Tensor:
        """Numbers as they are read back."""
        return self.decode(self.encode(x))
