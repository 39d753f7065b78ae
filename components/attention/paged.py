"""Attention of single rows straight from the pages of a cache, as a Triton kernel: nothing is gathered.

Caches of codes are read as codes. Each sequence's keys are cut into splits of fixed length, so that a result depends on
neither the batch nor the longest sequence in it. A program reads one split of one key head for all query heads that
share it; a second kernel adds the splits up (Dao et al., "Flash-Decoding", 2023). `attention_rows` over gathered pages
is the reference.
"""

from __future__ import annotations

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
    q_BHd, tables_BP = q_BHd.contiguous(), tables_BP.contiguous()
    parts = torch.empty(batch, groups, splits, shared, width, dtype=torch.float32, device=q_BHd.device)
    sums = torch.empty(2, batch, groups, splits, shared, dtype=torch.float32, device=q_BHd.device)
    o_BHd = torch.empty_like(q_BHd)
    wide = 1 << (width - 1).bit_length()
    kernels.split[(batch, groups, splits)](
        q_BHd,
        pool,
        pool if coded is None else pool.view(torch.bfloat16),
        tables_BP,
        filled_B,
        parts,
        sums[0],
        sums[1],
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
        sums[0],
        sums[1],
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


def can_attend(q_BHd: Tensor, pool: Tensor) -> bool:
    """Whether the kernel runs here, on such heads."""
    return q_BHd.shape[-1] <= WIDEST and fused.runs(q_BHd, "attention")


@cache
def _kernels() -> ModuleType:
    from zoo.components.attention import paged_kernels

    return paged_kernels
