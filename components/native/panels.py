"""Matrices in the layouts that panels.c and tiles.c read: with a few rows as fast as memory gives.

Sixteen lines of a panel, 32 inputs, are what Intel's tile operations take as their right side. Packed panels hold the
same numbers, bit by bit, in twelve bits each: of the upper bytes of weights, signs and most of the exponents, all but
one in thousands are among the fifteen most frequent ones of a panel. (That exponents of trained weights carry few bits
is known from Zhang et al., 2025, DFloat11; codes of one length are what a processor reads at memory's rate.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.components import native
from zoo.components.kinds import LANES, PACKED_BITS, PACKED_HEAD, PACKED_INPUTS, in_panels
from zoo.components.matrix import Index, Matrix
from zoo.components.pages import fresh
from zoo.registry.environment import switch

BLOCK_BYTES = LANES * PACKED_INPUTS * PACKED_BITS // 8
"""Of the inputs of a panel that are packed together."""

HEAD_WORDS, ESCAPE_WORDS = PACKED_HEAD // 4, 2
"""Of 32 bits, that describe a packed panel, and a weight that no code stands for."""

RARE = 512
"""Of so many weights one may have no code: with more of them packing does not pay."""


def pays(weight: Tensor) -> bool:
    """Whether a parameter's matrices are stored in panels: of shapes that fit, where the kernels are in use."""
    return (
        weight.dtype is torch.bfloat16
        and weight.device.type in ("cpu", "meta")
        and in_panels(*weight.shape[-2:])
        and native.missing() is None
    )


def packs() -> bool:
    """Whether panels are packed: unless ZOO_UNPACKED forbids it."""
    return not switch("ZOO_UNPACKED")


@dataclass(frozen=True, slots=True)
class Panels:
    """A bfloat16 matrix (O, I) whose values lie as (P, I / 2, 16, 2): two inputs of sixteen outputs together.

    words: (P, I / 2, 16) int32 of P = O / 16 panels, rounded up, each of two inputs; zeros for outputs that the last
    panel lacks.
    """

    words: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, weight_OI: Tensor) -> Panels:
        """The same values in panels, as in `words_reference`."""
        filling = PanelsFilling(weight_OI.shape, weight_OI.dtype)
        filling.put(0, weight_OI.contiguous())
        return filling.matrix()

    @property
    def nbytes(self) -> int:
        return self.words.nbytes

    @property
    def device(self) -> torch.device:
        return self.words.device

    def product(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        return native.library().panels(x_TI, self.words, self.shape[0], bias_O)

    def plain(self, index: Index = ()) -> Tensor:
        # A copy in any case: of two inputs the words are in order already, but not next to each other by their strides.
        rows = self.words.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        return rows.view(torch.bfloat16).flatten(0, 1)[: self.shape[0]][index]

    def renewed(self, weight_OI: Tensor) -> Panels:
        return Panels.of(weight_OI)


class PanelsFilling:
    """Panels that are made of rows as they come."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        assert dtype is torch.bfloat16, "panels hold pairs of sixteen bits"
        outputs, inputs = shape
        self._made = Panels(fresh((_panels(outputs), inputs // 2, LANES), torch.int32), shape)

    def put(self, first: int, rows_RI: Tensor) -> None:
        panels, words = self._made.words[first // LANES :], rows_RI.shape[1] // 2
        pack, threads = native.library().handle.zoo_pack, torch.get_num_threads()
        pack(len(rows_RI), words, rows_RI.data_ptr(), words, panels.data_ptr(), threads)

    def matrix(self) -> Panels:
        return self._made


@dataclass(frozen=True, slots=True)
class PackedPanels:
    """A bfloat16 matrix (O, I) with twelve bits for a weight.

    blocks: (O / 16, I / 8, 192) uint8, rounded up, of four pairs of inputs: the codes, then the lower bytes. heads:
    int32, six for each panel (its table of upper bytes, the number of its first escape, how many these are), then two
    for each escape (where it is, and its pair of inputs).
    """

    blocks: Tensor
    heads: Tensor
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes + self.heads.nbytes

    @property
    def device(self) -> torch.device:
        return self.blocks.device

    def product(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        return native.library().panels(x_TI, self.blocks, self.shape[0], bias_O, self.heads)

    def plain(self, index: Index = ()) -> Tensor:
        rows = range(self.shape[0])
        chosen = rows[index[0]] if index else rows
        span = range(chosen, chosen + 1) if isinstance(chosen, int) else chosen
        if not span or span.step != 1:
            return self._rows(0, self.shape[0])[index]
        first = span.start // LANES * LANES
        own = chosen - first if isinstance(chosen, int) else slice(span.start - first, span.stop - first)
        return self._rows(first, span.stop)[(own, *index[1:])]

    def renewed(self, weight_OI: Tensor) -> Matrix:
        return packed(weight_OI)

    def _rows(self, first: int, last: int) -> Tensor:
        """Rows from the first one of a panel on."""
        made = fresh((last - first, self.shape[1]), torch.bfloat16)
        places = (t.data_ptr() for t in (self.blocks, self.heads, made))
        native.library().handle.zoo_unpack_panels(first, last, *self.shape, *places, torch.get_num_threads())
        return made


class PackedFilling:
    """Packed panels that are made of rows as they come; plain ones where too many weights have no code."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        assert dtype is torch.bfloat16, "what is packed is the two bytes of bfloat16"
        outputs, inputs = shape
        self.shape = shape
        self._blocks = fresh((_panels(outputs), -(-inputs // PACKED_INPUTS), BLOCK_BYTES), torch.uint8)
        self._heads = torch.zeros(_panels(outputs), HEAD_WORDS, dtype=torch.int32)
        self._escapes: dict[int, Tensor] = {}
        self._unpacked: dict[int, Tensor] = {}

    def put(self, first: int, rows_RI: Tensor) -> None:
        panel, (rows, inputs) = first // LANES, rows_RI.shape
        most = LANES * inputs // RARE + 1
        room = torch.empty(_panels(rows) * most, ESCAPE_WORDS, dtype=torch.int32)
        places = (self._blocks[panel:].data_ptr(), self._heads[panel:].data_ptr(), room.data_ptr())
        pack = native.library().handle.zoo_pack_panels
        found = pack(rows, inputs, rows_RI.data_ptr(), inputs, *places, most, torch.get_num_threads())
        if found < 0:
            self._unpacked[first] = rows_RI.clone()
        else:
            self._escapes[first] = room[:found].clone()

    def matrix(self) -> Matrix:
        if self._unpacked:
            return self._plain()
        before = 0
        for first, rest in zip(sorted(self._escapes), [*sorted(self._escapes)[1:], self.shape[0]], strict=True):
            self._heads[first // LANES : _panels(rest), HEAD_WORDS - 2] += before
            before += len(self._escapes[first])
        escapes = [self._escapes[first].flatten() for first in sorted(self._escapes)]
        return PackedPanels(self._blocks, torch.cat((self._heads.flatten(), *escapes)), self.shape)

    def _plain(self) -> Panels:
        """In pieces, so that no more than one of them is there in a third form."""
        filling = PanelsFilling(self.shape, torch.bfloat16)
        firsts = sorted((*self._unpacked, *self._escapes))
        for first, last in zip(firsts, [*firsts[1:], self.shape[0]], strict=True):
            if first in self._unpacked:
                filling.put(first, self._unpacked.pop(first))
            else:
                own = slice(first // LANES, _panels(last))
                heads = torch.cat((self._heads[own].flatten(), self._escapes[first].flatten()))
                shape = torch.Size((last - first, self.shape[1]))
                filling.put(first, PackedPanels(self._blocks[own], heads, shape).plain())
        return filling.matrix()


def packed(weight_OI: Tensor) -> Matrix:
    """The same values in packed panels, or in plain ones where that does not pay."""
    filling = PackedFilling(weight_OI.shape, weight_OI.dtype)
    filling.put(0, weight_OI.contiguous())
    return filling.matrix()


def _panels(outputs: int) -> int:
    return -(-outputs // LANES)


def words_reference(weight_OI: Tensor) -> Tensor:
    """A matrix's words as panels have them, by PyTorch."""
    filled_OI = F.pad(weight_OI, (0, 0, 0, _panels(len(weight_OI)) * LANES - len(weight_OI)))
    words: Tensor = filled_OI.contiguous().view(torch.int32).unflatten(0, (-1, LANES))
    return words.transpose(1, 2).contiguous()
