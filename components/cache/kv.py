"""What attention layers keep: a policy (all tokens, or a ring of the last ones) over a storage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from zoo.components.attention.kernels import Memo, Scores, attention, attention_rows, by_pages
from zoo.components.attention.paged import attention_pages
from zoo.components.cache.code import RowCode
from zoo.components.cache.fresh import FreshKV
from zoo.components.cache.pages import PAGE, PageRows, Pages
from zoo.components.cache.slab import Planes, Slabs
from zoo.components.cache.spec import FullCacheSpec, LatentCacheSpec, SharedCacheSpec, WindowCacheSpec


class Storage(Protocol):
    """Where slots live. Slots of a sequence are numbered from 0; a policy says which position uses which."""

    code: RowCode

    @property
    def nbytes(self) -> int:
        """Bytes that sequences hold now."""
        ...

    def cost(self, slots: int) -> int:
        """Bytes of a sequence with room for `slots` slots."""
        ...

    def grow(self, seq: int, slots: int) -> None:
        """Makes room for `slots` slots in all."""
        ...

    def free(self, seq: int) -> None:
        """Gives the room back."""
        ...

    def write(self, layer: int, seq: int, start: int, planes_TGd: Planes, memo: Memo) -> None:
        """Fills the slots from `start` on."""
        ...

    def read(self, layer: int, seq: int, start: int, stop: int, memo: Memo) -> Planes:
        """The planes of a range of slots, (G, S, d) each."""
        ...


class KVStore:
    """Keys and values of all sequences for a group of attention layers."""

    def __init__(
        self,
        spec: FullCacheSpec | WindowCacheSpec | LatentCacheSpec | SharedCacheSpec,
        num_layers: int,
        dtype: torch.dtype,
        device: torch.device,
        storage: str,
        budget_bytes: int | None,
    ) -> None:
        self.num_layers = num_layers
        self.ring = spec.slots if isinstance(spec, WindowCacheSpec) else None
        if storage == "auto":
            storage = "slab" if device.type == "cpu" else "pages"
        kinds: dict[str, type[Slabs] | type[Pages]] = {"slab": Slabs, "pages": Pages}
        planes, heads, lanes = spec.kept
        code = RowCode(spec.cache_dtype, lanes, dtype)
        self.storage: Storage = kinds[storage]((num_layers, planes, heads), code, device, budget_bytes, self.ring)

    @staticmethod
    def fresh(rows: Sequence[int], num_layers: int) -> Sequence[Any]:
        """The states of layers in a step of whole sequences."""
        return [FreshKV(rows)] * num_layers

    @property
    def nbytes(self) -> int:
        """Bytes that sequences hold now."""
        return self.storage.nbytes

    def cost(self, tokens: int) -> int:
        """Bytes that a sequence of `tokens` tokens holds, over all layers, as allocated."""
        return self.storage.cost(self._slots(tokens))

    def grow(self, seq: int, tokens: int) -> None:
        """Makes room for `tokens` tokens of a sequence in all. Raises CapacityError beyond the budget."""
        self.storage.grow(seq, self._slots(tokens))

    def free(self, seq: int) -> None:
        """Gives a sequence's memory back."""
        self.storage.free(seq)

    def views(self, seqs: Sequence[int], rows: Sequence[int], past: Sequence[int]) -> list[Any]:
        """One state per layer for a step of `rows` new tokens after `past` cached ones each."""
        plan = StepPlan(self.ring, list(seqs), list(rows), list(past))
        return [self.view(layer, plan) for layer in range(self.num_layers)]

    def view(self, layer: int, plan: StepPlan) -> Any:
        """One layer's state in a step."""
        return KVView(self.storage, layer, plan)

    def hold(self, batch: int, tokens: int) -> HeldRows | None:
        """A step of single rows of sequences of up to `tokens` tokens, run many times; None without pages."""
        return HeldRows(self, self.storage, batch, tokens) if isinstance(self.storage, Pages) else None

    def _slots(self, tokens: int) -> int:
        return tokens if self.ring is None else min(tokens, self.ring)


@dataclass(frozen=True)
class StepPlan:
    """Which sequences a step works on, and what its layers share.

    ring: slots after which positions begin anew. page_rows: where the rows go, if the step is one of single rows and
    its places were prepared.
    """

    ring: int | None
    seqs: list[int]
    rows: list[int]
    past: list[int]
    memo: Memo = field(default_factory=dict)
    page_rows: PageRows | None = None

    @cached_property
    def single(self) -> int:
        """How many sequences, from the first one on, have one row each: a scheduler puts those that decode first."""
        if self.page_rows is not None:
            return self.page_rows.batch
        return next((i for i, count in enumerate(self.rows) if count > 1), len(self.rows))

    def places(self, pages: Pages) -> PageRows:
        """Where the rows of those sequences go, made once for all layers."""
        if self.page_rows is not None:
            return self.page_rows
        if "page rows" not in self.memo:
            batch = self.single
            slots, filled = _row_slots(self.past[:batch], self.ring)
            count = -(-max(filled) // PAGE)
            numbers = pages.row_numbers(self.seqs[:batch], slots, filled, batch=batch, pages=count)
            self.memo["page rows"] = PageRows(torch.tensor(numbers).to(pages.device, non_blocking=True), batch)
        rows: PageRows = self.memo["page rows"]
        return rows

    def seen(self, rows: PageRows, slots: int, window: int | None) -> Tensor:
        """Which of the slots 0 .. `slots` - 1 each sequence's one row sees, (B, S) bool, made once for all layers."""
        key = ("seen", window)
        if key not in self.memo:
            self.memo[key] = _seen(rows.filled_B, slots, window)
        mask: Tensor = self.memo[key]
        return mask


class HeldRows:
    """A step of one row for each of `batch` sequences that is run again and again: its places are written anew."""

    def __init__(self, store: KVStore, pages: Pages, batch: int, slots: int) -> None:
        self._store, self._ring, self._pages, self._batch = store, store.ring, pages, batch
        self._count = -(-(slots if self._ring is None else min(slots, self._ring)) // PAGE)
        self._numbers_N = torch.zeros(batch * (3 + self._count), dtype=torch.int64, device=pages.device)

    def views(self) -> list[Any]:
        """One state per layer for one run; what follows from the places is computed anew in each."""
        plan = StepPlan(self._ring, [], [], [], page_rows=PageRows(self._numbers_N, self._batch))
        return [self._store.view(layer, plan) for layer in range(self._store.num_layers)]

    def fill(self, seqs: Sequence[int], past: Sequence[int]) -> None:
        """The step's next run is one row of each of these sequences, at most `batch`, after `past` cached tokens."""
        slots, filled = _row_slots(past, self._ring)
        numbers = self._pages.row_numbers(seqs, slots, filled, batch=self._batch, pages=self._count)
        self._numbers_N.copy_(torch.tensor(numbers), non_blocking=True)


@dataclass(frozen=True)
class KVView:
    """One layer's keys and values in one step."""

    storage: Storage
    layer: int
    plan: StepPlan

    def attend(
        self,
        q_THd: Tensor,
        k_TGd: Tensor,
        v_TGd: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """Appends the step's keys and values, then attends causally within each sequence, (T, H, d)."""
        plan, pages = self.plan, self.storage
        how: Scores = {"scale": scale, "window": window, "softcap": softcap, "sinks_H": sinks_H}
        if not isinstance(pages, Pages):
            return self._attend_each(0, q_THd, k_TGd, v_TGd, how)
        single = plan.single
        if single == len(q_THd):
            return self._attend_rows(pages, q_THd, k_TGd, v_TGd, how)
        rows = [single, len(q_THd) - single]
        (q_BHd, q_THd), (k_BGd, k_TGd), (v_BGd, v_TGd) = (x.split(rows) for x in (q_THd, k_TGd, v_TGd))
        rest_THd = self._attend_each(single, q_THd, k_TGd, v_TGd, how)
        return torch.cat((self._attend_rows(pages, q_BHd, k_BGd, v_BGd, how), rest_THd)) if single else rest_THd

    def _attend_each(self, first: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, how: Scores) -> Tensor:
        """The sequences from number `first` on, one after the other."""
        seqs, past, rows = (values[first:] for values in (self.plan.seqs, self.plan.past, self.plan.rows))
        if len(seqs) == 1:
            return self._attend_one(seqs[0], past[0], q_THd, k_TGd, v_TGd, how)
        parts = zip(seqs, past, *(torch.split(x, rows) for x in (q_THd, k_TGd, v_TGd)), strict=True)
        return torch.cat([self._attend_one(seq, before, q, k, v, how) for seq, before, q, k, v in parts])

    def _attend_rows(self, pages: Pages, q_BHd: Tensor, k_BGd: Tensor, v_BGd: Tensor, how: Scores) -> Tensor:
        """One new row of each of the first sequences, all at once: from the pages as they lie where a kernel can,
        else over pages gathered to equal lengths."""
        plan, rows = self.plan, self.plan.places(pages)
        pages.write_rows(self.layer, rows, (k_BGd, v_BGd))
        pool, window = pages.pool(self.layer), None if plan.ring is not None else how["window"]
        if pages.code.kind is None and by_pages(q_BHd, pool, plan.memo):
            return attention_pages(q_BHd, pool, rows.tables_BP, rows.filled_B, **(how | {"window": window}))
        k_BGSd, v_BGSd = pages.read_rows(self.layer, rows)
        return attention_rows(
            q_BHd,
            k_BGSd,
            v_BGSd,
            scale=how["scale"],
            softcap=how["softcap"],
            sinks_H=how["sinks_H"],
            seen_BS=plan.seen(rows, k_BGSd.shape[2], window),
            memo=plan.memo,
        )

    def _attend_one(self, seq: int, past: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, how: Scores) -> Tensor:
        rows, memo = q_THd.shape[0], self.plan.memo
        ring = self.plan.ring
        if ring is not None and past + rows > ring:
            k_GSd, v_GSd, seen = self._turn(ring, seq, past, k_TGd, v_TGd)
        else:
            self.storage.write(self.layer, seq, past, (k_TGd, v_TGd), memo)
            k_GSd, v_GSd = self.storage.read(self.layer, seq, 0, past + rows, memo)
            seen = past
        return attention(q_THd, k_GSd, v_GSd, past=seen, memo=memo, **how)

    def _turn(self, ring: int, seq: int, past: int, k_TGd: Tensor, v_TGd: Tensor) -> tuple[Tensor, Tensor, int]:
        """Keys, values and how many come before the rows, when new tokens take the slots of old ones.

        A ring of 4 with 6 tokens cached holds positions 4 5 2 3. One new token, 6, takes the slot of 2, and sees
        the whole ring in any order. Three new ones, 6 7 8, need 3 4 5 before them: these are read in order before
        their slots are taken, and then 5 6 7 8 remain.
        """
        rows, memo = len(k_TGd), self.plan.memo
        if rows == 1:
            self.storage.write(self.layer, seq, past % ring, (k_TGd, v_TGd), memo)
            k_GSd, v_GSd = self.storage.read(self.layer, seq, 0, ring, memo)
            return k_GSd, v_GSd, ring - 1
        first = max(0, past - ring + 1)
        old = [self.storage.read(self.layer, seq, a, b, memo) for a, b in _spans(first, past, ring)]
        new = [self.storage.code.rounded(x_TGd).transpose(0, 1) for x_TGd in (k_TGd, v_TGd)]
        k_GSd, v_GSd = (torch.cat([*(planes[i] for planes in old), new[i]], dim=1) for i in (0, 1))
        kept = min(rows, ring)
        done = rows - kept
        for start, stop in _spans(past + rows - kept, past + rows, ring):
            count = stop - start
            last = (k_TGd[done : done + count], v_TGd[done : done + count])
            self.storage.write(self.layer, seq, start, last, memo)
            done += count
        return k_GSd, v_GSd, past - first


def _row_slots(past: Sequence[int], ring: int | None) -> tuple[list[int], list[int]]:
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


def _spans(start: int, stop: int, ring: int) -> list[tuple[int, int]]:
    """The ranges of slots of positions start .. stop - 1, in the order of positions; at most a ring's length."""
    if start == stop:
        return []
    first, last = start % ring, (stop - 1) % ring
    return [(first, last + 1)] if first <= last else [(first, ring), (0, last + 1)]
