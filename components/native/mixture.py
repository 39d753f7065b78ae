"""Mixtures of experts by the kernels in mixture.c, which find out by themselves which experts were chosen.

Nothing of a step but its sizes depends on the choice, so that a recorded step follows whatever a router chooses. Each
chosen expert's matrix is read once for all of its rows, and a row's numbers do not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from zoo.components import native
from zoo.components.kinds import PACKED_BITS
from zoo.components.matrix import Matrix
from zoo.components.native import calls, quantised, small
from zoo.components.native.panels import PackedPanels, Panels
from zoo.components.quantised import Quantised, is_native

BITS = 16
"""Of the numbers in panels."""


@dataclass(frozen=True, slots=True)
class Experts:
    """The matrices (O, I) of a mixture's experts, all stored alike, found by the expert's number.

    bits: of each weight. places_E2: int64 addresses of an expert's words, of its blocks and of its heads, or of its
    codes and of its scales.
    """

    bits: int
    shape: torch.Size
    matrices: tuple[Matrix, ...]
    places_E2: Tensor

    @classmethod
    def of(cls, matrices: Sequence[Matrix]) -> Self | None:
        """None where the kernels do not know how these are stored, or not all are stored alike."""
        parts = [_parts(matrix) for matrix in matrices]
        alike = {(found[0], matrix.shape) for found, matrix in zip(parts, matrices, strict=True) if found is not None}
        if len(alike) != 1 or None in parts:
            return None
        [(bits, shape)] = alike
        places = [[t.data_ptr() for t in found[1]] for found in parts if found is not None]
        return cls(bits, shape, tuple(matrices), torch.tensor(places, dtype=torch.int64))

    def __deepcopy__(self, memo: dict[int, Any]) -> Experts | None:
        return Experts.of(deepcopy(self.matrices, memo))


@dataclass(frozen=True, slots=True)
class Order:
    """Pairs of a row and one of its experts, sorted by expert.

    places_TK: where each pair stands. rows_N: the row of each. ends_E: behind the last of each expert; the number after
    these is that of all pairs, those of experts that are not here included.
    """

    places_TK: Tensor
    rows_N: Tensor
    ends_E: Tensor


def runs(x_TD: Tensor) -> bool:
    """Whether the kernels take such rows."""
    return x_TD.ndim == 2 and small.runs(x_TD)


def logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """x W^T in float32, (T, E), of rows that the kernels take."""
    y_TE = torch.empty(len(x_TD), len(weight_ED), dtype=torch.float32)
    sizes = (*x_TD.shape, len(weight_ED))
    places = (x_TD.data_ptr(), x_TD.stride(0), weight_ED.data_ptr(), y_TE.data_ptr())
    native.library().handle.zoo_logits(*sizes, *places, torch.get_num_threads())
    return y_TE


def order(experts_TK: Tensor, count: int) -> Order:
    """Of `count` experts; others are those of another device."""
    places_TK, rows_N, ends_E = (
        torch.empty(*size, dtype=torch.int32) for size in (experts_TK.shape, (experts_TK.numel(),), (count + 1,))
    )
    experts_TK = experts_TK.contiguous()
    places = (experts_TK.data_ptr(), places_TK.data_ptr(), rows_N.data_ptr(), ends_E.data_ptr())
    native.library().handle.zoo_order(*experts_TK.shape, count, *places)
    return Order(places_TK, rows_N, ends_E)


def products(experts: Experts, x: Tensor, by: Order, bias_EO: Tensor | None, *, ordered: bool) -> Tensor:
    """(N, O): each pair's row times the matrix of its expert. x: rows (T, I), or ordered: one (N, I) for each pair.

    What comes of pairs of experts that are not here is not defined.
    """
    calls.keep(experts)
    (outputs, inputs), kernels = experts.shape, native.library()
    pairs, most = len(by.rows_N), len(by.places_TK)
    level, single = kernels.level, kernels.single
    if experts.bits < PACKED_BITS:
        level, single = native.TILES if quantised.by_tiles() else native.NONE, quantised.UNTILED
    bias_EO = None if bias_EO is None else bias_EO.to(x.dtype).contiguous()
    y_NO = torch.empty(pairs, outputs, dtype=x.dtype)
    beside, room = torch.empty(most, inputs, dtype=x.dtype), _room(experts, most)
    kernels.handle.zoo_experts(
        level,
        single,
        experts.bits,
        len(experts.matrices),
        inputs,
        outputs,
        x.data_ptr(),
        x.stride(0),
        None if ordered else by.rows_N.data_ptr(),
        by.ends_E.data_ptr(),
        experts.places_E2.data_ptr(),
        None if bias_EO is None else bias_EO.data_ptr(),
        y_NO.data_ptr(),
        beside.data_ptr(),
        room.data_ptr(),
        torch.get_num_threads(),
    )
    return y_NO


def weighted(y_ND: Tensor, by: Order, weights_TK: Tensor) -> Tensor:
    """(T, D): the sums of each row's pairs times their weights, in the order of the choices, in float32."""
    rows, chosen = by.places_TK.shape
    o_TD = torch.empty(rows, y_ND.shape[1], dtype=y_ND.dtype)
    weights_TK = weights_TK.float().contiguous()
    sizes = (rows, chosen, y_ND.shape[1], len(by.ends_E) - 1)
    places = (t.data_ptr() for t in (by.places_TK, by.ends_E, weights_TK, y_ND, o_TD))
    native.library().handle.zoo_weighted(*sizes, *places, torch.get_num_threads())
    return o_TD


def _parts(matrix: Matrix) -> tuple[int, tuple[Tensor, Tensor]] | None:
    """The bits of a matrix's numbers, and where these and their scales are."""
    if isinstance(matrix, Panels):
        return BITS, (matrix.words, matrix.words)
    if isinstance(matrix, PackedPanels):
        return PACKED_BITS, (matrix.blocks, matrix.heads)
    if isinstance(matrix, Quantised) and matrix.codes.is_cpu and is_native():
        return matrix.kind.bits, (matrix.codes, matrix.scales)
    return None


def _room(experts: Experts, rows: int) -> Tensor:
    """Memory for what a product of so many rows holds in between: of panels, rows in tiles of 16 by 32 inputs."""
    filled, groups = -(-rows // 16) * 16, -(-experts.shape[1] // 32)
    each = 32 * 2 if experts.bits >= PACKED_BITS else quantised.SCRATCH
    return torch.empty(filled * groups * each, dtype=torch.uint8)
