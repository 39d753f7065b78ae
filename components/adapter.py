"""LoRA at the linear seam: what an adapter adds to a product, on the rows of the sequences that use it.

W' x = W x + B A x (Hu et al., arXiv 2106.09685), with the scale in B. Nothing is kept in the modules: a forward hook
on each adapted `Linear` asks which adapters are in use, and `using` says so for the length of one forward pass. A
model without adapters has no hooks.

Modules such as a feed-forward see rows and no Step, so the selection cannot be handed to them; a context variable is
scoped like an argument, is set by one caller for its own call, and is seen by no other thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zoo.components.linear import Linear
from zoo.registry.errors import PluginError


@dataclass(frozen=True, slots=True)
class LowRank:
    """The change B A of one weight (O, I), in its dtype and on its device."""

    a_LI: Tensor
    b_OL: Tensor

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.a_LI, self.b_OL))

    def delta(self) -> Tensor:
        """B A in float32, (O, I)."""
        return self.b_OL.float() @ self.a_LI.float()


Changes = Mapping[str, LowRank]
"""What one adapter changes, by the path of the `Linear`."""


class Use(NamedTuple):
    """One adapter in a forward pass of `total` rows; `rows_N`: the rows that use it (int64), None for all."""

    changes: Changes
    rows_N: Tensor | None
    total: int


_IN_USE: ContextVar[tuple[Use, ...]] = ContextVar("adapters in use", default=())


@contextmanager
def using(uses: Sequence[Use]) -> Iterator[None]:
    """Within the block, forward passes add these adapters to the products of hooked modules."""
    token = _IN_USE.set(tuple(uses))
    try:
        yield
    finally:
        _IN_USE.reset(token)


def uses_of(adapters: Sequence[Changes | None], rows: Sequence[int], device: torch.device) -> list[Use]:
    """The uses in a step whose sequences have `rows` rows each and these adapters, None for the plain model."""
    starts, total = [0, *accumulate(rows)], sum(rows)
    places: dict[int, tuple[Changes, list[int]]] = {}
    for changes, start, count in zip(adapters, starts, rows, strict=False):
        if changes is not None:
            places.setdefault(id(changes), (changes, []))[1].extend(range(start, start + count))
    return [
        Use(changes, None if len(found) == total else torch.tensor(found).to(device, non_blocking=True), total)
        for changes, found in places.values()
    ]


def hook(module: nn.Module, paths: Iterable[str]) -> list[RemovableHandle]:
    """Makes the `Linear`s at these paths add what the adapters in use say. Undone by the handles' `remove()`."""
    return [module.get_submodule(path).register_forward_hook(partial(_add, path), prepend=True) for path in paths]


def adaptable(module: nn.Module, path: str) -> bool:
    """Whether the module at `path` is a product within a block, computed for every row of a step."""
    try:
        return path.startswith("layers.") and isinstance(module.get_submodule(path), Linear)
    except AttributeError:
        return False


def merge(linear: Linear, change: LowRank) -> None:
    """Adds the change to the weight for good, however it is stored."""
    plain_OI = linear.values("weight")
    linear.replace("weight", (), plain_OI.float() + change.delta())


def _add(path: str, module: nn.Module, inputs: tuple[Tensor, ...], y_TO: Tensor) -> Tensor:
    """The product with what the adapters in use add to it."""
    for use in _IN_USE.get():
        change = use.changes.get(path)
        if change is not None:
            _check_rows(path, len(inputs[0]), use.total)
            y_TO = _with_change(inputs[0], y_TO, change, use.rows_N)
    return y_TO


def _with_change(x_TI: Tensor, y_TO: Tensor, change: LowRank, rows_N: Tensor | None) -> Tensor:
    if rows_N is None:
        return torch.addmm(y_TO, x_TI @ change.a_LI.T, change.b_OL.T)
    change_NO = (x_TI[rows_N] @ change.a_LI.T) @ change.b_OL.T
    return y_TO.index_add(0, rows_N, change_NO)


def _check_rows(path: str, found: int, expected: int) -> None:
    if found != expected:
        raise PluginError(
            "this product cannot be adapted: its rows are not the step's",
            where=path,
            found=f"{found} rows",
            expected=f"{expected}, one for each token",
        )
