"""Attention of single rows straight from the pages of a cache, as a Triton kernel: nothing is gathered.

Caches of codes are read as codes. Each sequence's keys are cut into splits of fixed length, so that a result depends on
neither the batch nor the longest sequence in it. A program reads one split of one key head for all query heads that
share it; a second kernel adds the splits up (Dao et al., "Flash-Decoding", 2023). `attention_rows` over gathered pages
is the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from zoo.components import fused
from zoo.components.cache.spec import CacheDtype

SPLIT = 256
"""Slots of a split."""

BLOCK = 64
"""Slots that a program reads at once."""

TOGETHER = 16
"""Splits that are added up at once."""

KINDS: dict[CacheDtype | None, int] = {None: 0, "int8": 1, "fp8": 2}
"""What the kernel calls the codes of a cache."""

WIDEST = 256
"""The largest head that fits a program's registers."""


def attention_pages(
    q_BHd: Tensor,
    pool: Tensor,
    tables_BP: Tensor,
    filled_B: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks_H: Tensor | None = None,
    coded: CacheDtype | None = None,
) -> Tensor:
    """(B, H, d): one row of each of B sequences over its own first `filled_B` slots.

    pool: (pages, 2, page, G, d), keys and values, contiguous. tables_BP: the pages of each sequence in order.
    coded: what codes the rows of the pool are, as zoo.components.cache.code makes them with one scale for each.
    """
    kernels = _kernels()
    batch, heads, width = q_BHd.shape
    _, _, page, groups, stored = pool.shape
    shared, splits = heads // groups, -(-tables_BP.shape[1] * page // SPLIT)
    tables_BP = tables_BP.contiguous()
    parts = torch.empty(batch, groups, splits, shared, width, dtype=torch.float32, device=q_BHd.device)
    sums = torch.empty(2, batch, groups, splits, shared, dtype=torch.float32, device=q_BHd.device)
    o_BHd = torch.empty(q_BHd.shape, dtype=q_BHd.dtype, device=q_BHd.device)
    wide = 1 << (width - 1).bit_length()
    kernels.split[(batch, groups, splits)](
        q_BHd,
        pool,
        _halves(pool, coded),
        tables_BP,
        filled_B,
        parts,
        *sums,
        *q_BHd.stride()[:2],
        scale,
        softcap or 0.0,
        window or tables_BP.shape[1] * page,
        tables_BP.shape[1],
        shared,
        width,
        stored,
        ROWS=max(16, 1 << (shared - 1).bit_length()),
        WIDE=wide,
        KIND=KINDS[coded],
        PAGE=page,
        BLOCK=BLOCK,
        SPLIT=SPLIT,
        CAPPED=softcap is not None,
    )
    kernels.add[(batch, heads)](
        parts,
        *sums,
        sums if sinks_H is None else sinks_H,
        o_BHd,
        groups,
        splits,
        shared,
        width,
        WIDE=wide,
        SPLITS=min(TOGETHER, 1 << (splits - 1).bit_length()),
        SUNK=sinks_H is not None,
    )
    return o_BHd


def keep_rows(planes_BGd: Sequence[Tensor], pool: Tensor, numbers_N: Tensor, coded: CacheDtype | None = None) -> None:
    """Writes one row of each of B sequences to the pool, (pages, planes, page, G, d), of one or two planes.

    numbers_N: int64, B pages and then B offsets in them. coded: as of `attention_pages`.
    """
    first, last = planes_BGd[0], planes_BGd[-1]
    batch, groups, width = first.shape
    _kernels().keep[(batch, groups)](
        first,
        last,
        pool,
        _halves(pool, coded),
        numbers_N,
        *first.stride()[:2],
        *last.stride()[:2],
        width,
        pool.shape[4],
        WIDE=1 << (width - 1).bit_length(),
        KIND=KINDS[coded],
        PAGE=pool.shape[2],
        PLANES=len(planes_BGd),
        num_warps=1,
    )


def can_keep(planes_BGd: Sequence[Tensor], lanes: tuple[int, ...], coded: CacheDtype | None) -> bool:
    """Whether `keep_rows` writes such rows here: those of codes, where all lanes share a scale."""
    fits = len(planes_BGd) <= 2 and (coded is None or len(lanes) == 1)
    return fits and all(fused.runs(new_BGd, "cache") for new_BGd in planes_BGd)


def _halves(pool: Tensor, coded: CacheDtype | None) -> Tensor:
    """A pool of codes as pairs of bytes, of which some are scales."""
    return pool if coded is None else pool.view(torch.int16)


def can_attend(q_BHd: Tensor, pool: Tensor) -> bool:
    """Whether the kernel runs here, on such heads."""
    return q_BHd.shape[-1] <= WIDEST and fused.runs(q_BHd, "attention")


@cache
def _kernels() -> ModuleType:
    from zoo.components.attention import paged_kernels

    return paged_kernels
