"""The numbers of a file's tensor from a model, piece by piece: what loading did, the other way round."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from zoo.components.matrix import values
from zoo.loading.layouts import Row
from zoo.registry.spec import Rotary, Tensor
from zoo.saving.names import FileTensor


class Weights(Protocol):
    """What a model's parameters hold, wherever it is."""

    def dtype(self, param: str) -> torch.dtype:
        """The type of a parameter."""
        ...

    def value(self, tensor: Tensor) -> torch.Tensor:
        """A tensor on the CPU, not to be written to."""
        ...


@dataclass(frozen=True)
class Own:
    """The weights of a module that has all of them."""

    module: nn.Module

    def dtype(self, param: str) -> torch.dtype:
        """The type that the module keeps a parameter in."""
        return self.module.get_parameter(param).dtype

    def value(self, tensor: Tensor) -> torch.Tensor:
        """A tensor, however the module stores it."""
        return values(self.module, tensor.param, tensor.index).cpu()


def pieces(weights: Weights, tensor: FileTensor) -> Iterator[torch.Tensor]:
    """The tensor's numbers in the order of its bytes, on the CPU: one tensor of the model after the other."""
    for group in tensor.groups:
        parts = (_turned(weights.value(part), part, tensor.row) for part in group)
        yield from [torch.cat([*parts], dim=-1)] if tensor.in_columns else parts


def dtype_of(weights: Weights, tensor: FileTensor) -> torch.dtype:
    """The type that the tensor is kept in."""
    return weights.dtype(tensor.groups[0][0].param)


def _turned(value: torch.Tensor, part: Tensor, row: Row) -> torch.Tensor:
    if "interleaved_rope" in row.transforms and part.rotary is not None:
        value = _to_interleaved(value, part.rotary)
    if "transpose" in row.transforms and value.ndim > 1:
        value = value.transpose(-2, -1)
    return value.contiguous()


def _to_interleaved(value: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Of the rows that rope turns in each head, i and i + rotary_dim / 2 become 2i and 2i + 1."""
    turned = value.clone()
    heads, source = (t.unflatten(0, (-1, rotary.head_dim)) for t in (turned, value))
    start, middle, stop = (rotary.offset + lanes for lanes in (0, rotary.rotary_dim // 2, rotary.rotary_dim))
    heads[:, start:stop:2] = source[:, start:middle]
    heads[:, start + 1 : stop : 2] = source[:, middle:stop]
    return turned
