"""One growable piece of memory per sequence and layer, heads outermost: what a CPU reads fastest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.components.attention.kernels import Memo
from zoo.components.cache.code import RowCode
from zoo.registry.errors import CapacityError

Planes = tuple[Tensor, ...]
"""What a layer keeps of some tokens: keys and values, or one tensor that serves as both."""

STEP = 256
"""Slots by which a slab grows."""


@dataclass(frozen=True)
class SlabRows:
    """B new rows of sequences: where slabs lie, and where in them the rows go.

    slabs_LB: int64, the address of each layer's slab. numbers_N: int64, for each row the slots of its slab, the one
    that it takes, how many are filled with it, and the first row of the same sequence.
    """

    slabs_LB: Tensor
    numbers_N: Tensor

    def fill(self, slabs: Slabs, seqs: Sequence[int], slots: Sequence[int], filled: Sequence[int]) -> None:
        """The rows are of these sequences, take these slots, and so many are filled with them."""
        leaders: dict[int, int] = {}
        first = (leaders.setdefault(seq, row) for row, seq in enumerate(seqs))
        numbers = zip((slabs.room(seq) for seq in seqs), slots, filled, first, strict=True)
        self.numbers_N.copy_(torch.tensor([number for row in numbers for number in row]))
        self.slabs_LB.copy_(torch.tensor([slabs.places(seq) for seq in seqs]).T)


class Slabs:
    """Slots of every sequence as (planes, G, slots, d) per layer: keys, then values."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        code: RowCode,
        device: torch.device,
        budget_bytes: int | None,
        limit: int | None,
    ) -> None:
        """shape: layers, planes, heads. code: how a head's row lies. limit: slots that no sequence exceeds."""
        self.layers, self.planes, self.heads = shape
        self.code, self.device = code, device
        self.budget_bytes, self.limit = budget_bytes, limit
        self.slot_bytes = self.layers * self.planes * self.heads * code.width * code.stored.itemsize
        self._slabs: dict[int, list[Tensor]] = {}
        self._slots: dict[int, int] = {}
        self._places: dict[int, list[int]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that sequences hold."""
        return self.slot_bytes * sum(self._slots.values())

    def cost(self, slots: int) -> int:
        """Bytes of a sequence with room for `slots` slots: whole steps, at most `limit`."""
        return self.slot_bytes * self._rounded(slots)

    def grow(self, seq: int, slots: int) -> None:
        """Makes room for `slots` slots in all. Raises CapacityError beyond the budget."""
        held, rounded = self._slots.get(seq, 0), self._rounded(slots)
        if rounded <= held:
            return
        extra = self.slot_bytes * (rounded - held)
        if self.budget_bytes is not None and self.nbytes + extra > self.budget_bytes:
            raise CapacityError(
                "the cache is full",
                found=f"{self.nbytes + extra} bytes for {slots} tokens of one more sequence",
                expected=f"at most {self.budget_bytes} bytes",
            )
        slabs = self._slabs[seq] = self._slabs[seq] if held else []
        for layer in range(self.layers):
            if held:
                slabs[layer] = self._resized(slabs[layer], rounded, held)
            else:
                slabs.append(self._empty(rounded))
        self._slots[seq] = rounded
        self._places.pop(seq, None)

    def free(self, seq: int) -> None:
        """Gives the room back, also after an interrupted `grow`; a sequence without room is no fault."""
        self._slabs.pop(seq, None)
        self._slots.pop(seq, None)
        self._places.pop(seq, None)

    def holds(self, seqs: Sequence[int]) -> int:
        """Bytes that these sequences hold."""
        return self.slot_bytes * sum(self._slots.get(seq, 0) for seq in seqs)

    def takes(self, source: int, slots: int, room: int, move: bool) -> int:
        """Bytes that `adopt` would take, fewer than none where it gives some back."""
        return self.cost(room) - (self.slot_bytes * self._slots[source] if move else 0)

    def adopt(self, source: int, seq: int, slots: int, room: int, move: bool) -> None:
        """A new sequence with the first `slots` slots of another, and room for `room` in all: a copy, or, to move,
        the other's own memory, which has nothing then."""
        old, rounded = [*self._slabs[source]], self._rounded(room)
        if move:
            self.free(source)
        slabs = self._slabs[seq] = []
        self._slots[seq] = rounded
        while old:
            slab = old.pop(0)
            same = move and slab.shape[2] == rounded
            slabs.append(slab if same else self._resized(slab, rounded, slots))

    def trim(self, seq: int, slots: int) -> bool:
        """A piece of memory has one size."""
        return False

    def write(self, layer: int, seq: int, start: int, planes_TGd: Planes, memo: Memo) -> None:
        """Fills the slots from `start` on."""
        slots = self._slabs[seq][layer].narrow(2, start, planes_TGd[0].shape[0])
        for slots_GSd, new_TGd in zip(slots.unbind(), planes_TGd, strict=True):
            slots_GSd.copy_(self.code.encode(new_TGd).transpose(0, 1))

    def read(self, layer: int, seq: int, start: int, stop: int, memo: Memo) -> Planes:
        """The planes of a range of slots, (G, S, d) each, without a copy unless they are coded."""
        return self.code.decode(self._slabs[seq][layer].narrow(2, start, stop - start)).unbind()

    def places(self, seq: int) -> list[int]:
        """The addresses of a sequence's slabs, (planes, G, slots, row) each, layer by layer."""
        if seq not in self._places:
            self._places[seq] = [slab.data_ptr() for slab in self._slabs[seq]]
        return self._places[seq]

    def rows(self, count: int) -> SlabRows:
        """Places of so many rows, still to be filled."""
        return SlabRows(*(torch.zeros(size, dtype=torch.int64) for size in ((self.layers, count), (4 * count,))))

    def room(self, seq: int) -> int:
        """How many slots a sequence has."""
        return self._slabs[seq][0].shape[2]

    def take(self, seq: int, slots: list[int]) -> Tensor:
        """A copy of slots of all layers as they are stored, slots outermost."""
        index_S = torch.tensor(slots, device=self.device)
        return torch.stack([slab[:, :, index_S] for slab in self._slabs[seq]]).movedim(3, 0)

    def put(self, seq: int, slots: list[int], taken_S: Tensor) -> None:
        """Fills slots of all layers with what was taken."""
        index_S = torch.tensor(slots, device=self.device)
        for layer, slab in enumerate(self._slabs[seq]):
            slab[:, :, index_S] = taken_S[:, layer].movedim(0, 2)

    def _empty(self, slots: int) -> Tensor:
        shape = (self.planes, self.heads, slots, self.code.width)
        return torch.empty(shape, dtype=self.code.stored, device=self.device)

    def _resized(self, slab: Tensor, slots: int, filled: int) -> Tensor:
        """A piece of another size with the first `filled` slots."""
        new = self._empty(slots)
        new[:, :, :filled] = slab[:, :, :filled]
        return new

    def _rounded(self, slots: int) -> int:
        rounded = -(-slots // STEP) * STEP
        return rounded if self.limit is None else min(rounded, self.limit)
