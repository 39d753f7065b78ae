"""An adapter's tensors into memory, in the form that products add them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from zoo.components.adapter import Changes, LowRank
from zoo.components.linear import Linear
from zoo.loading.adapters.plan import AdapterPlan, Piece
from zoo.loading.load import fill_places
from zoo.loading.mapping import Placement
from zoo.registry.spec import Tensor


@dataclass(frozen=True)
class Adapter:
    """What one adapter changes. whole: the model's tensors that it replaces, on the CPU in the weights' type; replaced:
    their names, also of those that only other ranks hold. name: its own. ref: where it was read from."""

    changes: Changes
    whole: Sequence[tuple[Tensor, torch.Tensor]]
    note: str
    replaced: tuple[str, ...] = ()
    name: str = ""
    ref: str = ""

    @property
    def nbytes(self) -> int:
        return sum(change.nbytes for change in self.changes.values()) + sum(t.nbytes for _, t in self.whole)


def read_adapter(plan: AdapterPlan, module: nn.Module) -> Adapter:
    """The planned adapter for `module`, on its device and in its type.

    Pairs that belong to one stored weight become one: their A below one another, their B each in its own columns.
    Raises WeightsError for files that have changed or end early.
    """
    changes = {path: _joined(found, cast(Linear, module.get_submodule(path))) for path, found in plan.pieces.items()}
    whole = [_whole(placement, module) for placement in plan.whole]
    return Adapter(changes, whole, plan.note, plan.replaced, plan.files.name, plan.files.where)


def _joined(found: Sequence[Piece], linear: Linear) -> LowRank:
    """Scaled in float32, so that the type of the weights rounds once."""
    weight, device = linear.weight, linear.device_of("weight")
    rank = sum(piece.pair.rank for piece in found)
    a_LI, b_OL = torch.zeros(rank, weight.shape[1]), torch.zeros(weight.shape[0], rank)
    start = 0
    for piece in found:
        columns = slice(start, start + piece.pair.rank)
        fill_places((a_LI[columns][placement.tensor.index], placement) for placement in piece.a)
        fill_places((b_OL[placement.tensor.index][:, columns], placement) for placement in piece.b)
        b_OL[:, columns] *= piece.pair.scale
        start = columns.stop
    return LowRank(*(factor.to(device, weight.dtype) for factor in (a_LI, b_OL)))


def _whole(placement: Placement, module: nn.Module) -> tuple[Tensor, torch.Tensor]:
    value = torch.empty(placement.tensor.shape, dtype=module.get_parameter(placement.tensor.param).dtype)
    fill_places([(value, placement)])
    return placement.tensor, value
