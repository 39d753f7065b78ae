"""Latents of attention layers: one row per token, of which the layer makes keys and values itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.components.attention.kernels import by_slabs
from zoo.components.cache.kv import KVStore, Storage, UnpreparedError
from zoo.components.cache.pages import Pages
from zoo.components.cache.plan import Run, StepPlan
from zoo.components.cache.slab import Slabs
from zoo.components.native import latent as kernels
from zoo.components.native.latent import InSlabs
from zoo.components.step import Cached


class LatentStore(KVStore):
    """Rows of all sequences for a group of layers."""

    @staticmethod
    def fresh(rows: Sequence[int], num_layers: int) -> Sequence[FreshLatents]:
        """The states of layers in a step of whole sequences."""
        return [FreshLatents(list(rows)) for _ in range(num_layers)]

    def view(self, layer: int, plan: StepPlan) -> LatentView:
        """One layer's state in a step."""
        return LatentView(self.storage, layer, plan)

    def _reads_slabs(self) -> bool:
        return kernels.keeps(self.storage.code)


@dataclass(frozen=True)
class LatentView:
    """One layer's rows in one step."""

    storage: Storage
    layer: int
    plan: StepPlan

    def append(self, new_Tm: Tensor) -> None:
        """Keeps this step's rows behind those of their sequences."""
        plan, new_T1m = self.plan, new_Tm.unsqueeze(1)
        if self._by_kernel(new_Tm.dtype):
            for run in plan.runs:
                self._write_few(run, new_Tm[run.rows]) if run.few else self._write(run, new_T1m[run.rows])
            return
        first = 0
        if isinstance(self.storage, Pages) and plan.single:
            first = plan.single
            self.storage.write_rows(self.layer, plan.places(self.storage, plan.waves[0]), (new_T1m[:first],))
        self._write(Run(False, slice(first, None), slice(first, None)), new_T1m[first:])

    def _write_few(self, run: Run, new_Tm: Tensor) -> None:
        where = self._in_slabs(run)
        kernels.keep(new_Tm, where.slabs_B, where.numbers_N, where.code)

    def _write(self, run: Run, new_T1m: Tensor) -> None:
        """The rows of a run of sequences, one sequence after the other."""
        seqs, past, rows = (values[run.sequences] for values in (self.plan.seqs, self.plan.past, self.plan.rows))
        for seq, before, rows_T1m in zip(seqs, past, torch.split(new_T1m, rows), strict=True):
            self.storage.write(self.layer, seq, before, (rows_T1m,), self.plan.memo)

    def _in_slabs(self, run: Run) -> InSlabs:
        slabs = self.storage
        assert isinstance(slabs, Slabs)
        at = self.plan.slots(slabs, run)
        return InSlabs(at.slabs_LB[self.layer], at.numbers_N, slabs.code)

    def _by_kernel(self, dtype: torch.dtype) -> bool:
        """Whether few rows of this type are worked on in slabs as they lie."""
        code = self.storage.code
        possible = by_slabs(self.plan.memo) and isinstance(self.storage, Slabs) and self.storage.device.type == "cpu"
        if possible and not torch.is_grad_enabled() and dtype is code.dtype and kernels.keeps(code):
            return True
        if self.plan.slab_rows is not None:
            raise UnpreparedError("these rows are not the kernel's")
        return False

    def read(self, lying: torch.dtype | None = None) -> Sequence[Cached | InSlabs]:
        """Single rows of sequences that share pages all at once, gathered to equal lengths; the others one by one."""
        plan = self.plan
        if lying is not None and self._by_kernel(lying):
            return [part for run in plan.runs for part in ([self._in_slabs(run)] if run.few else self._each(run))]
        if plan.slab_rows is not None:
            raise UnpreparedError("these rows are not the kernel's")
        first = 0
        found: list[Cached] = []
        if isinstance(self.storage, Pages) and plan.single:
            first, [wave] = plan.single, plan.waves
            places = plan.places(self.storage, wave)
            [kept_B1Sm] = self.storage.read_rows(self.layer, places)
            found.append(Cached(kept_B1Sm[:, 0], 1, plan.seen(places, wave, kept_B1Sm.shape[2], None)))
        return found + self._each(Run(False, slice(first, None), slice(first, None)))

    def _each(self, run: Run) -> list[Cached]:
        """What is cached of a run of sequences, one after the other."""
        found, plan = [], self.plan
        seqs, past, rows = (values[run.sequences] for values in (plan.seqs, plan.past, plan.rows))
        for seq, before, count in zip(seqs, past, rows, strict=True):
            [kept_1Sm] = self.storage.read(self.layer, seq, 0, before + count, plan.memo)
            found.append(Cached(kept_1Sm, count))
        return found


class FreshLatents:
    """One layer's rows in a step of whole sequences; gradients flow through them."""

    def __init__(self, rows: list[int]) -> None:
        self.rows = rows
        self.new_Tm: Tensor | None = None

    def append(self, new_Tm: Tensor) -> None:
        """Keeps them for this step."""
        self.new_Tm = new_Tm

    def read(self, lying: torch.dtype | None = None) -> Sequence[Cached]:
        """Every sequence's own rows."""
        assert self.new_Tm is not None, "rows are appended before they are read"
        parts = torch.split(self.new_Tm, self.rows)
        return [Cached(kept_Sm.unsqueeze(0), len(kept_Sm)) for kept_Sm in parts]
