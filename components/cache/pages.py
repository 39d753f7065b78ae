"""A pool of pages that sequences share: what a GPU reads, and what wastes least among many sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.components.attention.kernels import Memo
from zoo.components.attention.paged import can_keep, keep_rows
from zoo.components.cache.code import RowCode
from zoo.components.cache.slab import Planes
from zoo.registry.errors import CapacityError

PAGE = 16
"""Slots of a page."""

SPARE = 0
"""The page that no sequence holds: rows that only fill a batch up are written to it and read from it."""


@dataclass(frozen=True)
class PageRows:
    """One new row of each of B sequences: where it goes, and the P pages from which its keys and values are read.

    numbers_N: int64, B pages to write, B offsets in them, B counts of filled slots, then tables of P pages each.
    """

    numbers_N: Tensor
    batch: int

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """Page and offset of every row, (B,) each."""
        return self.numbers_N[: self.batch], self.numbers_N[self.batch : 2 * self.batch]

    @property
    def filled_B(self) -> Tensor:
        """Slots of every sequence that hold something, this row's included."""
        return self.numbers_N[2 * self.batch : 3 * self.batch]

    @property
    def tables_BP(self) -> Tensor:
        """The first P pages of every sequence."""
        return self.numbers_N[3 * self.batch :].view(self.batch, -1)


class HeldPages:
    """The `PageRows` of a step that is run again and again. Of tables only those that have changed are written anew."""

    def __init__(self, pages: Pages, batch: int, count: int) -> None:
        """batch: rows of the step. count: pages of each."""
        self._pages, self._batch, self._count = pages, batch, count
        self._numbers_N = torch.zeros(batch * (3 + count), dtype=torch.int64)
        self._tables: list[list[int]] = [[] for _ in range(batch)]
        self.rows = PageRows(torch.zeros_like(self._numbers_N, device=pages.device), batch)

    def fill(self, seqs: Sequence[int], slots: Sequence[int], filled: Sequence[int]) -> None:
        """Sequences of which each fills one slot; spare rows fill the batch up."""
        numbers, batch, spare = self._numbers_N.numpy(), self._batch, self._batch - len(seqs)
        tables = [*(self._pages.table(seq) for seq in seqs), *[_NOTHING] * spare]
        written = [table[slot // PAGE] for table, slot in zip(tables, slots, strict=False)]
        numbers[: 3 * batch] = [
            *written,
            *[SPARE] * spare,
            *(s % PAGE for s in slots),
            *[0] * spare,
            *filled,
            *[1] * spare,
        ]
        for row, table in enumerate(tables):
            if table is not self._tables[row]:
                self._tables[row] = table
                start = 3 * batch + row * self._count
                first = table[: self._count]
                numbers[start : start + self._count] = first + [SPARE] * (self._count - len(first))
        self.rows.numbers_N.copy_(to_send(self._numbers_N, self._pages.device), non_blocking=True)


def to_send(numbers: Tensor, device: torch.device) -> Tensor:
    """A copy on the host that a GPU reads when it comes to it, while the host goes on; elsewhere the numbers."""
    return numbers.pin_memory() if device.type == "cuda" else numbers


_NOTHING: list[int] = []
"""The table of a spare row."""


class Pages:
    """Slots in a pool (layers, pages, planes, page, G, d); each sequence has a table of its pages in order."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        code: RowCode,
        device: torch.device,
        budget_bytes: int | None,
        limit: int | None,
    ) -> None:
        """shape: layers, planes, heads. code: how a head's row lies. limit: slots of a ring."""
        self.layers, self.planes, self.heads = shape
        self.code, self.device = code, device
        self.page_bytes = self.layers * self.planes * PAGE * self.heads * code.width * code.stored.itemsize
        self.budget_bytes, self.limit = budget_bytes, limit
        count = 0 if budget_bytes is None else budget_bytes // self.page_bytes
        self._pool = self._empty(1 + count)
        self._unused = [page for page in range(1 + count) if page != SPARE]
        self._users = [0] * (1 + count)
        self._tables: dict[int, list[int]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the pages that sequences hold, each counted once."""
        return self.page_bytes * (self._pool.shape[1] - 1 - len(self._unused))

    def cost(self, slots: int) -> int:
        """Bytes of a sequence with room for `slots` slots: whole pages."""
        return self.page_bytes * -(-slots // PAGE)

    def grow(self, seq: int, slots: int) -> None:
        """Makes room for `slots` slots in all. Raises CapacityError when a budget leaves too few pages."""
        table = self._tables.get(seq, [])
        needed = -(-slots // PAGE) - len(table)
        if needed > 0:
            self._tables[seq] = table + self._take(needed)

    def free(self, seq: int) -> None:
        """Gives the pages that no other sequence uses back to the pool; a sequence without pages is no fault."""
        self._leave(self._tables.pop(seq, []))

    def holds(self, seqs: Sequence[int]) -> int:
        """Bytes of the pages that these sequences hold, each counted once."""
        return self.page_bytes * len({page for seq in seqs for page in self._tables.get(seq, ())})

    def trim(self, seq: int, slots: int) -> bool:
        """Gives the pages behind the first `slots` slots back."""
        table, count = self._tables[seq], -(-slots // PAGE)
        self._tables[seq] = table[:count]
        self._leave(table[count:])
        return True

    def takes(self, source: int, slots: int, room: int, move: bool) -> int:
        """Bytes that `adopt` would take, fewer than none where it gives some back."""
        shared, count = self._shared(slots)
        alone = sum(self._users[page] == 1 for page in self._tables[source][shared:]) if move else 0
        return self.page_bytes * (max(-(-room // PAGE), count) - shared - alone)

    def adopt(self, source: int, seq: int, slots: int, room: int, move: bool) -> None:
        """A new sequence with the first `slots` slots of another, and room for `room` in all. Pages that nobody will
        write to again are shared, others are copied unless they are handed over. To move: the other has nothing then.
        """
        shared, count = self._shared(slots)
        table = self._tables[source][:count]
        mine = self._tables[seq] = table[:shared]
        for page in table[:shared]:
            self._users[page] += 1
        copies = [page for page in table[shared:] if not move or self._users[page] > 1]
        for page in table[shared:]:
            if page not in copies:
                self._users[page] += 1
                mine.append(page)
        if move:
            self.free(source)
        if copies:
            taken = self._take(len(copies))
            self._pool[:, taken] = self._pool[:, copies]
            mine += taken
        self.grow(seq, room)

    def _shared(self, slots: int) -> tuple[int, int]:
        """How many of the pages of so many slots sequences may share, and how many there are: full ones, but none of
        a ring, which is written again."""
        return slots // PAGE if self.limit is None else 0, -(-slots // PAGE)

    def write(self, layer: int, seq: int, start: int, planes_TGd: Planes, memo: Memo) -> None:
        """Fills the slots from `start` on."""
        places = self._places(seq, start, start + len(planes_TGd[0]), memo)
        for plane, new_TGd in enumerate(planes_TGd):
            self._pool[layer, :, plane][places] = self.code.encode(new_TGd)

    def read(self, layer: int, seq: int, start: int, stop: int, memo: Memo) -> Planes:
        """The planes of a range of slots, (G, S, d) each, gathered."""
        places = self._places(seq, start, stop, memo)
        return tuple(self.code.decode(pool[places]).transpose(0, 1) for pool in self._pool[layer].unbind(1))

    def take(self, seq: int, slots: list[int]) -> Tensor:
        """A copy of slots of all layers as they are stored, slots outermost."""
        pages, offsets = self._index(seq, slots)
        return self._pool[:, pages, :, offsets]

    def put(self, seq: int, slots: list[int], taken_S: Tensor) -> None:
        """Fills slots of all layers with what was taken."""
        pages, offsets = self._index(seq, slots)
        self._pool[:, pages, :, offsets] = taken_S

    def _index(self, seq: int, slots: list[int]) -> Tensor:
        table = self._tables[seq]
        places = [[table[slot // PAGE] for slot in slots], [slot % PAGE for slot in slots]]
        return torch.tensor(places).to(self.device, non_blocking=True)

    def table(self, seq: int) -> list[int]:
        """The pages of a sequence, in order: another list whenever they change."""
        return self._tables[seq]

    def pool(self, layer: int) -> Tensor:
        """A layer's pages, (pages, planes, page, G, d)."""
        return self._pool[layer]

    def row_numbers(self, seqs: Sequence[int], slots: Sequence[int], filled: Sequence[int]) -> list[int]:
        """The numbers of `PageRows` for sequences of which each fills one slot, with the pages of the longest."""
        tables, pages = [self._tables[seq] for seq in seqs], -(-max(filled) // PAGE)
        numbers = [table[slot // PAGE] for table, slot in zip(tables, slots, strict=True)]
        numbers += [*(slot % PAGE for slot in slots), *filled]
        for table in tables:
            numbers += table[:pages]
            numbers += [SPARE] * (pages - len(table))
        return numbers

    def write_rows(self, layer: int, rows: PageRows, planes_BGd: Planes) -> None:
        """Fills one slot of each sequence."""
        if can_keep(planes_BGd, self.code.lanes, self.code.kind):
            keep_rows(planes_BGd, self._pool[layer], rows.numbers_N, self.code.kind)
            return
        for plane, new_BGd in enumerate(planes_BGd):
            self._pool[layer, :, plane][rows.places] = self.code.encode(new_BGd)

    def read_rows(self, layer: int, rows: PageRows) -> Planes:
        """The planes of the slots of each sequence's pages, (B, G, S, d) each; beyond its own, zeros.

        Others have left there what they had, and a mask does not silence what is not a number.
        """
        gathered = [pool[rows.tables_BP].flatten(1, 2) for pool in self._pool[layer].unbind(1)]
        slots_S = torch.arange(gathered[0].shape[1], device=self.device)
        empty_BS11 = (slots_S >= rows.filled_B.unsqueeze(1))[:, :, None, None]
        return tuple(self.code.decode(kept.masked_fill_(empty_BS11, 0)).transpose(1, 2) for kept in gathered)

    def _places(self, seq: int, start: int, stop: int, memo: Memo) -> tuple[Tensor, Tensor]:
        """Page and offset of each slot of a range, made once per step."""
        key = ("places", seq, start, stop)
        if key not in memo:
            table_P = torch.tensor(self._tables[seq], device=self.device)
            slots_S = torch.arange(start, stop, device=self.device)
            memo[key] = (table_P[slots_S // PAGE], slots_S % PAGE)
        places: tuple[Tensor, Tensor] = memo[key]
        return places

    def _take(self, count: int) -> list[int]:
        """Pages that nobody used."""
        if count > len(self._unused):
            self._enlarge(count - len(self._unused))
        taken = [self._unused.pop() for _ in range(count)]
        for page in taken:
            self._users[page] = 1
        return taken

    def _leave(self, table: list[int]) -> None:
        """One user fewer for each page."""
        for page in table:
            self._users[page] -= 1
            if not self._users[page]:
                self._unused.append(page)

    def _empty(self, pages: int) -> Tensor:
        """Zeros: unused slots of a gathered batch are masked, but a mask does not silence what is not a number."""
        shape = (self.layers, pages, self.planes, PAGE, self.heads, self.code.width)
        return torch.zeros(shape, dtype=self.code.stored, device=self.device)

    def _enlarge(self, missing: int) -> None:
        """More pages where no budget is set: half as many again, or what is missing."""
        count = self._pool.shape[1]
        if self.budget_bytes is not None:
            raise CapacityError(
                "the cache is full",
                found=f"{missing} pages of {self.page_bytes} bytes more than there are",
                expected=f"at most {self.budget_bytes} bytes",
            )
        added = max(missing, count // 2)
        self._pool = torch.cat((self._pool, self._empty(added)), dim=1)
        self._unused.extend(range(count, count + added))
        self._users += [0] * added
