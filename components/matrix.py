"""Weights that are stored otherwise than as row-major parameters, and the modules that hold them.

What a product needs to know of a weight is how to multiply with it: `Matrix`. A module whose matrices may be stored so
is a `Holder`; the parameter that a matrix replaces keeps its name, shape and dtype on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

Index = tuple[int | slice, ...]


class Matrix(Protocol):
    """A weight (O, I) in a layout of its own, which nobody changes: new values make a new one."""

    @property
    def shape(self) -> torch.Size:
        """(O, I)."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes, with all that belongs to it."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it is."""
        ...

    def product(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """x W^T + b of (T, I) rows, in x's dtype."""
        ...

    def plain(self, index: Index = ()) -> Tensor:
        """A piece of the values, row-major in the dtype of the parameter that it stands for."""
        ...

    def renewed(self, weight_OI: Tensor) -> Matrix:
        """Other values, stored in the same way where they can be."""
        ...


class Filling(Protocol):
    """A matrix that is being made of its rows, which come in any order and from several threads at a time."""

    def put(self, first: int, rows_RI: Tensor) -> None:
        """Takes rows without gaps, from number `first` on."""
        ...

    def matrix(self) -> Matrix:
        """The matrix, once all rows are there."""
        ...


@dataclass(frozen=True)
class Making:
    """A way to store a matrix, in memory of its own.

    of: from all its values. begin: from its shape and dtype, for rows as they come, in multiples of `lanes` but for the
    last; None where it takes all at once.
    """

    of: Callable[[Tensor], Matrix]
    begin: Callable[[torch.Size, torch.dtype], Filling] | None = None
    lanes: int = 1

    def __call__(self, weight_OI: Tensor) -> Matrix:
        return self.of(weight_OI)


class Holder(nn.Module):
    """A module whose matrices may be stored in layouts of their own.

    `MATRICES` names its parameters that are (O, I), or (E, O, I) with a matrix for each expert.
    """

    MATRICES: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(self) -> None:
        super().__init__()
        self.stored: dict[str, list[Matrix]] = {}

    def store(self, name: str, kind: Callable[[Tensor], Matrix]) -> None:
        """Stores each matrix of a parameter as `kind` of it."""
        weight = self.get_parameter(name).detach()
        self.put(name, [kind(matrix_OI) for matrix_OI in weight.view(-1, *weight.shape[-2:])])

    def put(self, name: str, matrices: Sequence[Matrix]) -> None:
        """Takes ready matrices in the place of a parameter."""
        self.stored[name] = [*matrices]
        setattr(self, name, nn.Parameter(self.get_parameter(name).detach().to("meta"), requires_grad=False))

    def matrix(self, name: str, expert: int | None = None) -> Tensor | Matrix:
        """What products multiply with."""
        if name in self.stored:
            return self.stored[name][expert or 0]
        weight: Tensor = getattr(self, name)
        return weight if expert is None else weight[expert]

    def device_of(self, name: str) -> torch.device:
        """Where the values of a parameter are."""
        device: torch.device = self.stored[name][0].device if name in self.stored else self.get_parameter(name).device
        return device

    def values(self, name: str, index: Index = ()) -> Tensor:
        """A piece of one of its parameters, however it is stored; of a stored stack, of one expert."""
        value = self.get_parameter(name).detach()
        if name not in self.stored:
            return value[index]
        expert, rest = _expert(value, index)
        return self.stored[name][expert].plain(rest)

    def replace(self, name: str, index: Index, value: Tensor) -> None:
        """Changes a piece of one of its parameters, however it is stored; of a stored stack, of one expert."""
        parameter = self.get_parameter(name).detach()
        if name not in self.stored:
            parameter[index] = value.to(parameter)
            return
        expert, rest = _expert(parameter, index)
        old = self.stored[name][expert]
        plain_OI = old.plain().clone()
        plain_OI[rest] = value.to(plain_OI)
        self.stored[name][expert] = old.renewed(plain_OI)


def values(module: nn.Module, name: str, index: Index = ()) -> Tensor:
    """A piece of the parameter at a path, row-major, however the module that owns it stores it."""
    owner, leaf = _owner(module, name)
    return owner.values(leaf, index) if isinstance(owner, Holder) else owner.get_parameter(leaf).detach()[index]


def replace(module: nn.Module, name: str, index: Index, value: Tensor) -> None:
    """Changes a piece of the parameter at a path, however the module that owns it stores it."""
    owner, leaf = _owner(module, name)
    if isinstance(owner, Holder):
        owner.replace(leaf, index, value)
    else:
        parameter = owner.get_parameter(leaf).detach()
        parameter[index] = value.to(parameter)


def weight_bytes(module: nn.Module) -> int:
    """Bytes that parameters, stored matrices and buffers take."""
    plain = sum(t.nbytes for t in (*module.parameters(), *module.buffers()) if not t.is_meta)
    holders = (part for part in module.modules() if isinstance(part, Holder))
    return plain + sum(m.nbytes for holder in holders for stored in holder.stored.values() for m in stored)


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _expert(parameter: Tensor, index: Index) -> tuple[int, Index]:
    if parameter.ndim == 2:
        return 0, index
    expert, *rest = index
    assert isinstance(expert, int), "a stored stack is read and changed expert by expert"
    return expert, tuple(rest)
