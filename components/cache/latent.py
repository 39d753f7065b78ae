"""Latents of attention layers: one row per token, of which the layer makes keys and values itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.components.cache.kv import KVStore, Storage
from zoo.components.cache.pages import Pages
from zoo.components.cache.plan import StepPlan
from zoo.components.step import Cached


class LatentStore(KVStore):
    """Rows of all sequences for a group of layers."""

    READS_SLABS = False

    @staticmethod
    def fresh(rows: Sequence[int], num_layers: int) -> Sequence[FreshLatents]:
        """The states of layers in a step of whole sequences."""
        return [FreshLatents(list(rows)) for _ in range(num_layers)]

    def view(self, layer: int, plan: StepPlan) -> LatentView:
        """One layer's state in a step."""
        return LatentView(self.storage, layer, plan)


@dataclass(frozen=True)
class LatentView:
    """One layer's rows in one step."""

    storage: Storage
    layer: int
    plan: StepPlan

    def append(self, new_Tm: Tensor) -> None:
        """Keeps this step's rows behind those of their sequences."""
        plan, first, new_T1m = self.plan, 0, new_Tm.unsqueeze(1)
        if isinstance(self.storage, Pages) and plan.single:
            first = plan.single
            self.storage.write_rows(self.layer, plan.places(self.storage, plan.waves[0]), (new_T1m[:first],))
        parts = torch.split(new_T1m[first:], plan.rows[first:])
        for seq, past, rows_T1m in zip(plan.seqs[first:], plan.past[first:], parts, strict=True):
            self.storage.write(self.layer, seq, past, (rows_T1m,), plan.memo)

    def read(self) -> Sequence[Cached]:
        """Single rows of sequences that share pages all at once, gathered to equal lengths; the others one by one."""
        plan, first = self.plan, 0
        found: list[Cached] = []
        if isinstance(self.storage, Pages) and plan.single:
            first, [wave] = plan.single, plan.waves
            places = plan.places(self.storage, wave)
            [kept_B1Sm] = self.storage.read_rows(self.layer, places)
            found.append(Cached(kept_B1Sm[:, 0], 1, plan.seen(places, wave, kept_B1Sm.shape[2], None)))
        for seq, past, rows in zip(plan.seqs[first:], plan.past[first:], plan.rows[first:], strict=True):
            [kept_1Sm] = self.storage.read(self.layer, seq, 0, past + rows, plan.memo)
            found.append(Cached(kept_1Sm, rows))
        return found


class FreshLatents:
    """One layer's rows in a step of whole sequences; gradients flow through them."""

    def __init__(self, rows: list[int]) -> None:
        self.rows = rows
        self.new_Tm: Tensor | None = None

    def append(self, new_Tm: Tensor) -> None:
        """Keeps them for this step."""
        self.new_Tm = new_Tm

    def read(self) -> Sequence[Cached]:
        """Every sequence's own rows."""
        assert self.new_Tm is not None, "rows are appended before they are read"
        parts = torch.split(self.new_Tm, self.rows)
        return [Cached(kept_Sm.unsqueeze(0), len(kept_Sm)) for kept_Sm in parts]
