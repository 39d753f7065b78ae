"""What attention layers keep: a policy (all tokens, or a ring of the last ones) over a storage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from zoo.components.attention.kernels import Memo, Scores, attention, attention_rows, by_pages, by_slabs
from zoo.components.attention.paged import attention_pages
from zoo.components.cache.code import RowCode
from zoo.components.cache.fresh import FreshKV
from zoo.components.cache.pages import PAGE, HeldPages, Pages
from zoo.components.cache.plan import Run, StepPlan, row_slots
from zoo.components.cache.slab import Planes, Slabs
from zoo.components.cache.spec import FullCacheSpec, LatentCacheSpec, SharedCacheSpec, WindowCacheSpec
from zoo.components.native.attention import attend_slabs, attends, serves


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

    def holds(self, seqs: Sequence[int]) -> int:
        """Bytes that these sequences hold, those that they share counted once."""
        ...

    def takes(self, source: int, slots: int, room: int, move: bool) -> int:
        """Bytes that `adopt` would take, fewer than none where it gives some back."""
        ...

    def adopt(self, source: int, seq: int, slots: int, room: int, move: bool) -> None:
        """A new sequence with the first `slots` slots of another, and room for `room` in all; see `Reusable`."""
        ...

    def trim(self, seq: int, slots: int) -> bool:
        """Gives back the room behind the first `slots` slots; False where that needs a copy."""
        ...

    def write(self, layer: int, seq: int, start: int, planes_TGd: Planes, memo: Memo) -> None:
        """Fills the slots from `start` on."""
        ...

    def read(self, layer: int, seq: int, start: int, stop: int, memo: Memo) -> Planes:
        """The planes of a range of slots, (G, S, d) each."""
        ...

    def take(self, seq: int, slots: list[int]) -> Tensor:
        """A copy of slots of all layers as they are stored, slots outermost."""
        ...

    def put(self, seq: int, slots: list[int], taken_S: Tensor) -> None:
        """Fills slots of all layers with what was taken."""
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
        # Of marked sequences: the position from which rows take the slots of others, and what stood there.
        self._covered: dict[int, tuple[int, Tensor]] = {}

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
        self._covered.pop(seq, None)

    @property
    def back(self) -> int | None:
        """How many rows can be taken back at most: with a ring, as many as it has slots."""
        return self.ring

    @torch.inference_mode()
    def mark(self, seq: int, past: int, rows: int) -> None:
        """Keeps what up to `rows` rows from `past` on will take the slots of. Rows in slots of their own need nothing:
        these are filled again."""
        if self.ring is None or past + rows <= self.ring:
            return
        assert rows <= self.ring, "no more rows can be taken back than the ring has slots"
        first = max(past, self.ring)
        self._covered[seq] = first, self.storage.take(seq, self._turned(first, past + rows))

    @torch.inference_mode()
    def rewind(self, seq: int, tokens: int) -> None:
        """Puts back what rows from position `tokens` on have taken the slots of."""
        if seq not in self._covered:
            return
        first, taken_S = self._covered.pop(seq)
        right = max(tokens - first, 0)
        if right < len(taken_S):
            self.storage.put(seq, self._turned(first + right, first + len(taken_S)), taken_S[right:])

    def _turned(self, start: int, stop: int) -> list[int]:
        """The ring's slots of these positions."""
        assert self.ring is not None
        return [position % self.ring for position in range(start, stop)]

    def serves(self, held: int, tokens: int) -> bool:
        """See `Reusable`. A ring that has turned lacks what stood before its last `window` tokens; its first slot to
        be taken is the one that a token more would take."""
        return self.ring is None or held <= self.ring or tokens >= held - 1

    def holds(self, seqs: Sequence[int]) -> int:
        """See `Reusable`."""
        return self.storage.holds(seqs)

    def takes(self, source: int, tokens: int, room: int, move: bool) -> int:
        """See `Reusable`."""
        return self.storage.takes(source, self._slots(tokens), self._slots(room), move)

    def adopt(self, source: int, seq: int, tokens: int, room: int, move: bool) -> None:
        """See `Reusable`."""
        self.storage.adopt(source, seq, self._slots(tokens), self._slots(room), move)

    def trim(self, seq: int, tokens: int) -> bool:
        """See `Reusable`."""
        return self.storage.trim(seq, self._slots(tokens))

    def views(self, seqs: Sequence[int], rows: Sequence[int], past: Sequence[int]) -> list[Any]:
        """One state per layer for a step of `rows` new tokens after `past` cached ones each."""
        plan = StepPlan(self.ring, list(seqs), list(rows), list(past))
        return [self.view(layer, plan) for layer in range(self.num_layers)]

    def view(self, layer: int, plan: StepPlan) -> Any:
        """One layer's state in a step."""
        return KVView(self.storage, layer, plan)

    def hold(self, batch: int, tokens: int) -> HeldRows | HeldSlabs | None:
        """A step of single rows of sequences of up to `tokens` tokens, run many times; None where their places are not
        numbers that a kernel reads."""
        if isinstance(self.storage, Slabs):
            return HeldSlabs(self, self.storage, batch) if by_slabs({}) and self._reads_slabs() else None
        return HeldRows(self, self.storage, batch, tokens) if isinstance(self.storage, Pages) else None

    def _reads_slabs(self) -> bool:
        """Whether views read slabs where they lie, by the kernel of few rows."""
        return serves(self.storage.code)

    def _slots(self, tokens: int) -> int:
        return tokens if self.ring is None else min(tokens, self.ring)


class UnpreparedError(Exception):
    """A step that was prepared to be run many times cannot be run so."""


class HeldRows:
    """A step of one row for each of `batch` sequences that is run again and again: its places are written anew."""

    def __init__(self, store: KVStore, pages: Pages, batch: int, slots: int) -> None:
        self._store, self._ring = store, store.ring
        self._held = HeldPages(pages, batch, -(-(slots if self._ring is None else min(slots, self._ring)) // PAGE))

    def views(self) -> list[Any]:
        """One state per layer for one run; what follows from the places is computed anew in each."""
        plan = StepPlan(self._ring, [], [], [], page_rows=self._held.rows)
        return [self._store.view(layer, plan) for layer in range(self._store.num_layers)]

    def fits(self, seqs: Sequence[int]) -> bool:
        """Whether rows of these sequences can be run at once: of a ring, not several of one."""
        return self._ring is None or len(set(seqs)) == len(seqs)

    def fill(self, seqs: Sequence[int], past: Sequence[int]) -> None:
        """The step's next run is one row of each of these sequences, at most `batch`, after `past` cached tokens."""
        self._held.fill(seqs, *row_slots(past, self._ring))


class HeldSlabs:
    """As `HeldRows`, of slabs and of exactly `batch` sequences."""

    def __init__(self, store: KVStore, slabs: Slabs, batch: int) -> None:
        self._store, self._slabs, self._batch, self._rows = store, slabs, batch, slabs.rows(batch)

    def views(self) -> list[Any]:
        """One state per layer for one run."""
        plan = StepPlan(self._store.ring, [], [], [], slab_rows=self._rows)
        return [self._store.view(layer, plan) for layer in range(self._store.num_layers)]

    def fits(self, seqs: Sequence[int]) -> bool:
        """Whether rows of these sequences can be run at once."""
        return len(seqs) == self._batch

    def fill(self, seqs: Sequence[int], past: Sequence[int]) -> None:
        """The step's next run is one row of each of these sequences after `past` cached tokens."""
        self._rows.fill(self._slabs, seqs, *row_slots(past, self._store.ring))


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
        plan = self.plan
        how: Scores = {"scale": scale, "window": window, "softcap": softcap, "sinks_H": sinks_H}
        new = (q_THd, k_TGd, v_TGd)
        parts: list[Tensor] = []
        if isinstance(self.storage, Pages):
            parts = [self._attend_pages(wave, how, *(x[wave] for x in new)) for wave in plan.waves if plan.single]
            rest = slice(plan.single, None)
            runs = [Run(False, rest, rest)] if plan.single < len(q_THd) else []
        elif by_slabs(plan.memo) and attends(q_THd, k_TGd, v_TGd, self.storage.code):
            runs = plan.runs
        elif plan.slab_rows is not None:
            raise UnpreparedError("these rows are not the kernel's")
        else:
            runs = [Run(False, slice(None), slice(None))]
        for run in runs:
            parts += (self._attend_few if run.few else self._attend_each)(run, how, *(x[run.rows] for x in new))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _attend_each(self, run: Run, how: Scores, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> list[Tensor]:
        """A run of sequences, one after the other."""
        seqs, past, rows = (values[run.sequences] for values in (self.plan.seqs, self.plan.past, self.plan.rows))
        parts = zip(seqs, past, *(torch.split(x, rows) for x in (q_THd, k_TGd, v_TGd)), strict=True)
        return [self._attend_one(seq, before, q, k, v, how) for seq, before, q, k, v in parts]

    def _attend_few(self, run: Run, how: Scores, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> list[Tensor]:
        """A run of sequences of few rows, all at once, from slabs as they lie."""
        slabs, ring = self.storage, self.plan.ring
        assert isinstance(slabs, Slabs)
        at, window = self.plan.slots(slabs, run), None if ring is not None else how["window"]
        slabs_B = at.slabs_LB[self.layer]
        return [attend_slabs(q_THd, k_TGd, v_TGd, slabs_B, at.numbers_N, slabs.code, {**how, "window": window})]

    def _attend_pages(self, wave: slice, how: Scores, q_BHd: Tensor, k_BGd: Tensor, v_BGd: Tensor) -> Tensor:
        """The single rows of a wave, all at once: from pages as they lie where a kernel can, else over pages that are
        gathered to equal lengths."""
        plan, pages, window = self.plan, self.storage, None if self.plan.ring is not None else how["window"]
        assert isinstance(pages, Pages)
        rows, pool = plan.places(pages, wave), pages.pool(self.layer)
        pages.write_rows(self.layer, rows, (k_BGd, v_BGd))
        if by_pages(q_BHd, pool, plan.memo):
            coded, how = pages.code.kind, how | {"window": window}
            return attention_pages(q_BHd, pool, rows.tables_BP, rows.filled_B, coded=coded, **how)
        k_BGSd, v_BGSd = pages.read_rows(self.layer, rows)
        return attention_rows(
            q_BHd,
            k_BGSd,
            v_BGSd,
            scale=how["scale"],
            softcap=how["softcap"],
            sinks_H=how["sinks_H"],
            seen_BS=plan.seen(rows, wave, k_BGSd.shape[2], window),
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


def _spans(start: int, stop: int, ring: int) -> list[tuple[int, int]]:
    """The ranges of slots of positions start .. stop - 1, in the order of positions; at most a ring's length."""
    if start == stop:
        return []
    first, last = start % ring, (stop - 1) % ring
    return [(first, last + 1)] if first <= last else [(first, ring), (0, last + 1)]
