"""Where a model's tensors go while it is loaded: into its parameters, or into matrices that are stored otherwise.

A matrix that is stored otherwise is gathered in a place of its own, made into what it is to be as soon as its last
tensor has come, and let go of. So no more than a few are in memory as they came: of a stack, an expert at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from threading import Lock
from typing import NamedTuple

import torch
from torch import nn

from zoo.components.matrix import Holder, Matrix
from zoo.registry.errors import CapacityError
from zoo.registry.spec import Tensor

Making = Callable[[torch.Tensor], Matrix]
"""A row-major matrix -> what it is stored as."""

Storing = Callable[[str, torch.Tensor], Making | None]
"""The path of a parameter, and one like it on the meta device -> how its matrices are stored; None for as they are."""


class Unit(NamedTuple):
    """What is gathered together: a parameter, or one expert's matrix of a stack."""

    param: str
    expert: int | None


class Targets:
    """The module's parameters, made when their first tensor arrives. Threads may fill several at a time."""

    def __init__(
        self,
        module: nn.Module,
        tensors: Iterable[Tensor],
        device: torch.device,
        storing: Storing | None = None,
    ) -> None:
        self.module, self.device = module, device
        self._storing = storing
        self._makings: dict[str, Making | None] = {}
        self._open: dict[Unit, torch.Tensor] = {}
        self._made: dict[Unit, list[Matrix]] = {}
        self._lock = Lock()
        self._left = Counter(self._unit(tensor) for tensor in tensors)
        self._units = Counter(unit.param for unit in self._left)

    def place(self, tensor: Tensor) -> torch.Tensor:
        """The piece of a parameter that a checkpoint's tensor fills."""
        unit = self._unit(tensor)
        with self._lock:
            if unit not in self._open:
                self._open[unit] = self._make(unit)
            return self._open[unit][tensor.index if unit.expert is None else tensor.index[1:]]

    def filled(self, tensor: Tensor) -> None:
        """Says that a tensor is in its place; the last one of a matrix has it stored."""
        unit = self._unit(tensor)
        with self._lock:
            self._left[unit] -= 1
            if self._left[unit]:
                return
            value, making = self._open.pop(unit), self._making(unit.param)
        if making is None:
            return
        matrices = [making(matrix_OI) for matrix_OI in value.view(-1, *value.shape[-2:])]
        del value
        with self._lock:
            self._keep(unit, matrices)

    def check(self) -> None:
        """All parameters are there."""
        missing = [
            f"{path}.{name}"
            for path, part in self.module.named_modules()
            for name, parameter in part.named_parameters(recurse=False)
            if parameter.is_meta and not (isinstance(part, Holder) and name in part.stored)
        ]
        assert not missing, f"parameters that no tensor of the Spec fills: {missing[:5]}"

    def _unit(self, tensor: Tensor) -> Unit:
        """Experts of a stack that is stored otherwise come one by one."""
        first = tensor.index[0] if tensor.index else None
        if isinstance(first, int) and self._making(tensor.param):
            return Unit(tensor.param, first)
        return Unit(tensor.param, None)

    def _making(self, param: str) -> Making | None:
        if param not in self._makings:
            owner, leaf = self._owner(param)
            holds = isinstance(owner, Holder) and leaf in owner.MATRICES
            self._makings[param] = self._storing(param, owner.get_parameter(leaf)) if self._storing and holds else None
        return self._makings[param]

    def _owner(self, param: str) -> tuple[nn.Module, str]:
        path, _, leaf = param.rpartition(".")
        return self.module.get_submodule(path), leaf

    def _keep(self, unit: Unit, matrices: list[Matrix]) -> None:
        """Hands the holder all matrices of a parameter when the last one is made."""
        self._made[unit] = matrices
        self._units[unit.param] -= 1
        if self._units[unit.param]:
            return
        holder, leaf = self._owner(unit.param)
        assert isinstance(holder, Holder)
        mine = sorted((other for other in self._made if other.param == unit.param), key=lambda other: other.expert or 0)
        holder.put(leaf, [matrix for other in mine for matrix in self._made.pop(other)])

    def _make(self, unit: Unit) -> torch.Tensor:
        owner, leaf = self._owner(unit.param)
        present = owner.get_parameter(leaf).detach()
        if not present.is_meta:
            return present if unit.expert is None else present[unit.expert]
        made = self._room(unit.param, present if unit.expert is None else present[unit.expert])
        if self._making(unit.param) is None:
            setattr(owner, leaf, nn.Parameter(made, requires_grad=False))
        return made

    def _room(self, name: str, like: torch.Tensor) -> torch.Tensor:
        try:
            return torch.empty(like.shape, dtype=like.dtype, device=self.device)
        except (RuntimeError, MemoryError) as error:
            raise CapacityError(
                "memory is full while loading the weights",
                where=name,
                found=str(error).splitlines()[0],
                expected=f"{like.numel() * like.element_size()} bytes more on {self.device}",
                hint="use a smaller type or model; `zoo inspect` says what each needs",
            ) from None
