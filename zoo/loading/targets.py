"""Where a model's tensors go while it is loaded: into its parameters, or into matrices that are stored otherwise.

A matrix that is stored otherwise takes its rows as they come, so that it is never there twice. Where its layout or the
tensors that it is made of do not allow that, it is gathered in a place of its own, made into what it is to be as soon
as its last tensor has come, and let go of: of a stack, an expert at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from threading import Lock
from typing import NamedTuple

import torch
from torch import nn

from zoo.components.matrix import Filling, Holder, Making, Matrix
from zoo.components.pages import fresh
from zoo.registry.errors import CapacityError
from zoo.registry.spec import Tensor

Storing = Callable[[str, torch.Tensor], Making | None]
"""The path of a parameter, and one like it on the meta device -> how its matrices are stored; None for as they are."""


class Unit(NamedTuple):
    """What is filled together: a parameter, or one expert's matrix of a stack."""

    param: str
    expert: int | None


@dataclass
class _State:
    """Of a unit: tensors to come, and what there is of it. filling: of a matrix that takes rows as they come."""

    left: int = 0
    filling: Filling | None = None
    value: torch.Tensor | None = None
    lock: Lock = field(default_factory=Lock)


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
        self._states: dict[Unit, _State] = defaultdict(_State)
        self._made: dict[str, dict[Unit, list[Matrix]]] = defaultdict(dict)
        self._lock = Lock()
        parts: dict[Unit, list[Tensor]] = defaultdict(list)
        for tensor in tensors:
            parts[self._unit(tensor)].append(tensor)
        self._apart = {unit for unit, own in parts.items() if self._takes_rows(unit, own)}
        self._units = {param: 0 for param, _ in parts}
        for unit, own in parts.items():
            self._states[unit].left = len(own)
            self._units[unit.param] += 1

    def place(self, tensor: Tensor) -> torch.Tensor | None:
        """The piece of a parameter that a checkpoint's tensor fills; None where its rows are to be `put`."""
        unit = self._unit(tensor)
        return None if unit in self._apart else self._value(unit)[_index(unit, tensor)]

    def put(self, tensor: Tensor, first: int, rows: torch.Tensor) -> None:
        """Takes rows of a tensor that has no place, from number `first` on, in `lanes` of the tensor's."""
        unit = self._unit(tensor)
        state = self._states[unit]
        with state.lock:
            if state.filling is None:
                state.filling = self._begun(unit)
        state.filling.put(_start(_index(unit, tensor)) + first, rows)

    def lanes(self, tensor: Tensor) -> int:
        """How many rows of a tensor that has no place come together."""
        making = self._making(tensor.param)
        return 1 if making is None else making.lanes

    def like(self, tensor: Tensor) -> torch.Tensor:
        """One of a tensor's shape and of the type in which it is wanted, on the meta device."""
        owner, leaf = self._owner(tensor.param)
        return torch.empty(tensor.shape, dtype=owner.get_parameter(leaf).dtype, device="meta")

    def filled(self, tensor: Tensor) -> None:
        """Says that a tensor is in its place; the last one of a matrix has it stored."""
        unit = self._unit(tensor)
        state, making = self._states[unit], self._making(unit.param)
        with self._lock:
            state.left -= 1
            if state.left:
                return
            del self._states[unit]
        if making is None:
            return
        if state.filling is not None:
            matrices = [state.filling.matrix()]
        else:
            assert state.value is not None
            matrices = [making(matrix_OI) for matrix_OI in state.value.view(-1, *state.value.shape[-2:])]
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

    def _present(self, unit: Unit) -> torch.Tensor:
        """What the module has of a unit before it is loaded, on the meta device as a rule."""
        owner, leaf = self._owner(unit.param)
        present = owner.get_parameter(leaf).detach()
        return present if unit.expert is None else present[unit.expert]

    def _takes_rows(self, unit: Unit, tensors: list[Tensor]) -> bool:
        """Whether a unit is a matrix that takes its rows as they come, and its tensors are whole lanes of them."""
        making, present = self._making(unit.param), self._present(unit)
        if making is None or making.begin is None or present.ndim != 2 or not present.is_meta:
            return False
        for tensor in tensors:
            index = _index(unit, tensor)
            if index and (len(index) > 1 or not isinstance(index[0], slice) or index[0].step not in (None, 1)):
                return False
            start, rows = _start(index), tensor.shape[0]
            if start % making.lanes or (rows % making.lanes and start + rows < present.shape[0]):
                return False
        return True

    def _begun(self, unit: Unit) -> Filling:
        making, present = self._making(unit.param), self._present(unit)
        assert making is not None and making.begin is not None
        try:
            return making.begin(present.shape, present.dtype)
        except (RuntimeError, MemoryError) as error:
            raise self._full(unit.param, present, error) from None

    def _value(self, unit: Unit) -> torch.Tensor:
        """The memory of a unit that is filled in place."""
        state = self._states[unit]
        with state.lock:
            if state.value is None:
                state.value = self._make(unit)
            return state.value

    def _keep(self, unit: Unit, matrices: list[Matrix]) -> None:
        """Hands the holder all matrices of a parameter when the last one is made."""
        self._made[unit.param][unit] = matrices
        self._units[unit.param] -= 1
        if self._units[unit.param]:
            return
        holder, leaf = self._owner(unit.param)
        assert isinstance(holder, Holder)
        made = sorted(self._made.pop(unit.param).items(), key=lambda item: item[0].expert or 0)
        holder.put(leaf, [matrix for _, own in made for matrix in own])

    def _make(self, unit: Unit) -> torch.Tensor:
        present = self._present(unit)
        if not present.is_meta:
            return present
        try:
            made = fresh(present.shape, present.dtype, self.device)
        except (RuntimeError, MemoryError) as error:
            raise self._full(unit.param, present, error) from None
        if self._making(unit.param) is None:
            owner, leaf = self._owner(unit.param)
            setattr(owner, leaf, nn.Parameter(made, requires_grad=False))
        return made

    def _full(self, name: str, like: torch.Tensor, error: BaseException) -> CapacityError:
        return CapacityError(
            "memory is full while loading the weights",
            where=name,
            found=str(error).splitlines()[0],
            expected=f"{like.numel() * like.element_size()} bytes more on {self.device}",
            hint="use a smaller type or model; `zoo inspect` says what each needs",
        )


def _index(unit: Unit, tensor: Tensor) -> tuple[int | slice, ...]:
    """Where a tensor lies in its unit."""
    return tensor.index if unit.expert is None else tensor.index[1:]


def _start(index: tuple[int | slice, ...]) -> int:
    """The first row of a piece that has all columns."""
    return index[0].start or 0 if index and isinstance(index[0], slice) else 0
