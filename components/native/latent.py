"""Latent attention of a few rows over slabs of latents, by the kernels in attention.c.

The cached rows are the keys, and with their first lanes the values, of all heads: they are read where they lie, once
for all heads and all new rows of a sequence. Before that queries are brought into the latents' space, after it sums of
latents to the heads' values, by kernels that read each head's matrix once and whose numbers do not depend on the other
rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from zoo.components import native
from zoo.components.cache.code import RowCode
from zoo.components.native import attention
from zoo.components.native.attention import PLAIN, addresses, kind_of
from zoo.components.native.calls import Library

WIDEST = 1024
"""The largest row of a latent and turned lanes that the kernels have room for."""

MOST = 256
"""The largest head of keys without positions, and of values."""

_SIZE, _ADDRESS, _COUNT = ctypes.c_long, ctypes.c_void_p, ctypes.c_int
_ARGUMENTS: dict[str, list[Any]] = {
    "zoo_keep": [_COUNT, _COUNT, *[_SIZE] * 4, _ADDRESS, _SIZE, _ADDRESS, _ADDRESS],
    "zoo_lower": [_COUNT, _COUNT, *[_SIZE] * 5, _ADDRESS, _SIZE, _ADDRESS, _SIZE, _ADDRESS, _COUNT],
    "zoo_lift": [_COUNT, _COUNT, *[_SIZE] * 4, _ADDRESS, _ADDRESS, _SIZE, _ADDRESS, _COUNT],
}


@dataclass(frozen=True)
class InSlabs:
    """New rows of sequences, and where what is cached of these lies, new rows included.

    slabs_B, numbers_N: as `attend_slabs` has them. code: how a row lies, its latent first.
    """

    slabs_B: Tensor
    numbers_N: Tensor
    code: RowCode

    @property
    def count(self) -> int:
        """How many new rows there are, of all sequences."""
        return len(self.slabs_B)


@dataclass(frozen=True)
class Sizes:
    """Of heads: lanes of queries that know no positions and turned ones, of the latent, and of values."""

    plain: int
    turned: int
    latent: int
    values: int

    @property
    def fit(self) -> bool:
        """Whether the kernels take them."""
        return (
            self.latent % 32 == 0
            and self.turned % 16 == 0
            and 0 < self.latent <= WIDEST - self.turned
            and 0 < self.plain <= MOST
            and 0 < self.values <= MOST
        )


def keeps(code: RowCode) -> bool:
    """Whether `keep` writes such rows, if they come in the same type."""
    return code.dtype in PLAIN and len(code.lanes) <= 3 and missing() is None


def attends(weight_OI: Tensor, sizes: Sizes) -> bool:
    """Whether this module is the way for heads of these matrices: bfloat16 or float32 on a CPU, without gradients."""
    return (
        weight_OI.device.type == "cpu"
        and weight_OI.dtype in PLAIN
        and weight_OI.is_contiguous()
        and sizes.fit
        and not torch.is_grad_enabled()
        and missing() is None
    )


def keep(new_Tm: Tensor, slabs_B: Tensor, numbers_N: Tensor, code: RowCode) -> None:
    """Writes new rows into slabs (1, 1, slots, row), as `code` has them."""
    first, second, third = (*code.lanes, 0, 0)[:3]
    new_Tm = new_Tm if new_Tm.stride(1) == 1 else new_Tm.contiguous()
    places = (new_Tm.data_ptr(), new_Tm.stride(0), slabs_B.data_ptr(), numbers_N.data_ptr())
    _library().zoo_keep(kind_of(code), _is_wide(new_Tm), len(new_Tm), first, second, third, *places)


def lowered(q_THd: Tensor, weight_OI: Tensor, sizes: Sizes) -> Tensor:
    """Queries in the space of cached rows, (T, H, m): plain lanes times the head's matrix of keys, then turned ones."""
    q_THd = q_THd if q_THd.stride()[1:] == (q_THd.shape[-1], 1) else q_THd.contiguous()
    rows, heads, _ = q_THd.shape
    q_THm = torch.empty(rows, heads, sizes.latent + sizes.turned, dtype=q_THd.dtype)
    _library().zoo_lower(
        _is_wide(q_THd),
        _by_dots(),
        rows,
        heads,
        sizes.plain,
        sizes.turned,
        sizes.latent,
        q_THd.data_ptr(),
        q_THd.stride(0),
        weight_OI.data_ptr(),
        (sizes.plain + sizes.values) * sizes.latent,
        q_THm.data_ptr(),
        torch.get_num_threads(),
    )
    return q_THm


def attend(q_THm: Tensor, places: InSlabs, latent: int, scale: float, threads: int | None = None) -> Tensor:
    """(T, H, c): sums of the latents that each row of its sequence sees, by its heads' weights."""
    return attention.attend_latents(
        q_THm, places.slabs_B, places.numbers_N, places.code, latent=latent, scale=scale, threads=threads
    )


def lifted(o_THc: Tensor, weight_OI: Tensor, sizes: Sizes) -> Tensor:
    """Sums of latents as the heads' values, (T, H, v)."""
    rows, heads, _ = o_THc.shape
    o_THd = torch.empty(rows, heads, sizes.values, dtype=o_THc.dtype)
    _library().zoo_lift(
        _is_wide(o_THc),
        _by_dots(),
        rows,
        heads,
        sizes.latent,
        sizes.values,
        o_THc.data_ptr(),
        weight_OI.data_ptr() + sizes.plain * sizes.latent * weight_OI.itemsize,
        (sizes.plain + sizes.values) * sizes.latent,
        o_THd.data_ptr(),
        torch.get_num_threads(),
    )
    return o_THd


def _is_wide(x: Tensor) -> bool:
    return x.dtype is torch.float32


def _by_dots() -> bool:
    return native.library().level == native.DOT


@cache
def missing() -> str | None:
    """Why the kernels are not in use, None where they are: they are compared with formulas before their first use."""
    return native.refusal("latent attention", lambda: max(_errors()))


@cache
def _library() -> Library:
    handle = native.library().handle
    for name, arguments in _ARGUMENTS.items():
        getattr(handle, name).declare(arguments)
    return handle


@torch.no_grad()
def _errors() -> Iterator[float]:
    """Relative errors of small cases, of every kind of row: the last rows of a sequence, one and three."""
    draw, slots, sizes = torch.Generator().manual_seed(0), 300, Sizes(22, 16, 32, 18)
    kinds = [RowCode(kind, (32, 16), dtype) for kind in (None, "int8", "fp8") for dtype in PLAIN]
    for code, rows in product(kinds, (1, 3)):
        q_THd, kept_Sm, weight_OI = (
            torch.randn(*size, generator=draw).to(code.dtype) for size in ((rows, 10, 38), (slots, 48), (400, 32))
        )
        slab = torch.zeros(1, 1, slots, code.width, dtype=code.stored)
        slab[0, 0, :-rows] = code.encode(kept_Sm[:-rows])
        places = InSlabs(*_places(slab, range(slots - rows, slots)), code)
        keep(kept_Sm[-rows:], places.slabs_B, places.numbers_N, code)
        found_THc = attend(lowered(q_THd, weight_OI, sizes), places, sizes.latent, 0.1)
        expected = _formula(q_THd, code.rounded(kept_Sm), weight_OI, sizes, 0.1)
        found = lifted(found_THc, weight_OI, sizes).float()
        yield float((found - expected).norm() / expected.norm())


def _places(slab: Tensor, at: Sequence[int]) -> tuple[Tensor, Tensor]:
    numbers = [number for slot in at for number in (slab.shape[2], slot, slot + 1, 0)]
    return addresses([slab] * len(at)), torch.tensor(numbers)


def _formula(q_THd: Tensor, kept_Sm: Tensor, weight_OI: Tensor, sizes: Sizes, scale: float) -> Tensor:
    """Keys and values of every head, in float32: those that each of the last rows sees."""
    up_HOc, kept_Sm = weight_OI.float().view(q_THd.shape[1], -1, sizes.latent), kept_Sm.float()
    both_HSd = kept_Sm[:, : sizes.latent] @ up_HOc.transpose(1, 2)
    k_HSd = torch.cat((both_HSd[..., : sizes.plain], kept_Sm[:, sizes.latent :].expand(len(up_HOc), -1, -1)), -1)
    seen_TS = torch.ones(len(q_THd), len(kept_Sm), dtype=torch.bool).tril(len(kept_Sm) - len(q_THd))
    scores_HTS = q_THd.float().transpose(0, 1) @ k_HSd.transpose(1, 2) * scale
    weights_HTS = scores_HTS.masked_fill(~seen_TS, float("-inf")).softmax(-1)
    return (weights_HTS @ both_HSd[..., sizes.plain :]).transpose(0, 1)
