"""Which sequences a step works on, and where in their memory its rows go: made once for all layers of a store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.components.attention.kernels import Memo
from zoo.components.cache.pages import PageRows, Pages
from zoo.components.cache.slab import SlabRows, Slabs
from zoo.components.native.attention import FEW


class Run(NamedTuple):
    """Neighbouring sequences of a step, and their rows. few: whether each has few rows."""

    few: bool
    sequences: slice
    rows: slice


@dataclass(frozen=True)
class StepPlan:
    """Which sequences a step works on, and what its layers share. One that checks guesses stands in it several times.

    ring: slots after which positions begin anew. page_rows, slab_rows: where the rows go, if the step is one of single
    rows and its places were prepared; `seqs`, `rows` and `past` are empty then.
    """

    ring: int | None
    seqs: list[int]
    rows: list[int]
    past: list[int]
    memo: Memo = field(default_factory=dict)
    page_rows: PageRows | None = None
    slab_rows: SlabRows | None = None

    @cached_property
    def single(self) -> int:
        """How many sequences, from the first one on, have one row each: a scheduler puts those that decode first."""
        if self.page_rows is not None:
            return self.page_rows.batch
        return next((i for i, count in enumerate(self.rows) if count > 1), len(self.rows))

    @cached_property
    def waves(self) -> list[slice]:
        """Those rows, in runs that can be written before any of them is read: all, but for a ring, in which the next
        row of a sequence takes a slot that the one before may still see."""
        starts, met = [0], set[int]()
        for place, seq in enumerate(self.seqs[: self.single] if self.ring is not None else ()):
            if seq in met:
                starts.append(place)
                met.clear()
            met.add(seq)
        return [slice(start, stop) for start, stop in pairwise([*starts, self.single])]

    def places(self, pages: Pages, wave: slice) -> PageRows:
        """Where the rows of a wave go, made once for all layers."""
        if self.page_rows is not None:
            return self.page_rows
        key = ("page rows", wave.start)
        if key not in self.memo:
            seqs = self.seqs[wave]
            slots, filled = row_slots(self.past[wave], self.ring)
            numbers = pages.row_numbers(seqs, slots, filled)
            self.memo[key] = PageRows(torch.tensor(numbers).to(pages.device, non_blocking=True), len(seqs))
        rows: PageRows = self.memo[key]
        return rows

    @cached_property
    def runs(self) -> list[Run]:
        """All sequences, in runs of those that have few rows and of those that have many."""
        if self.slab_rows is not None:
            count = self.slab_rows.slabs_LB.shape[1]
            return [Run(True, slice(0, count), slice(0, count))]
        found, row = [], 0
        for few, run in groupby(range(len(self.rows)), lambda number: self.rows[number] <= FEW):
            numbers = [*run]
            count = sum(self.rows[number] for number in numbers)
            found.append(Run(few, slice(numbers[0], numbers[-1] + 1), slice(row, row + count)))
            row += count
        return found

    def slots(self, slabs: Slabs, run: Run) -> SlabRows:
        """Where the rows of a run go, made once for all layers."""
        if self.slab_rows is not None:
            return self.slab_rows
        key = ("slots", run.rows.start)
        if key not in self.memo:
            pieces = zip(self.seqs[run.sequences], self.past[run.sequences], self.rows[run.sequences], strict=True)
            pairs = [(seq, past + row) for seq, past, rows in pieces for row in range(rows)]
            self.memo[key] = slabs.rows(len(pairs))
            self.memo[key].fill(slabs, [seq for seq, _ in pairs], *row_slots([past for _, past in pairs], self.ring))
        rows: SlabRows = self.memo[key]
        return rows

    def seen(self, rows: PageRows, wave: slice, slots: int, window: int | None) -> Tensor:
        """Which of the slots 0 .. `slots` - 1 each row of a wave sees, (B, S) bool, made once for all layers."""
        key = ("seen", wave.start, window)
        if key not in self.memo:
            self.memo[key] = _seen(rows.filled_B, slots, window)
        mask: Tensor = self.memo[key]
        return mask


def row_slots(past: Sequence[int], ring: int | None) -> tuple[list[int], list[int]]:
    """The slot that each sequence's next row takes, and how many are filled with it."""
    if ring is None:
        return list(past), [count + 1 for count in past]
    return [count % ring for count in past], [min(count + 1, ring) for count in past]


def _seen(filled_B: Tensor, slots: int, window: int | None) -> Tensor:
    """Which of the slots 0 .. `slots` - 1 each sequence's last token sees, (B, S) bool."""
    slots_S = torch.arange(slots, device=filled_B.device)
    filled_B1 = filled_B.unsqueeze(1)
    seen_BS = slots_S < filled_B1
    return seen_BS if window is None else seen_BS & (slots_S >= filled_B1 - window)
