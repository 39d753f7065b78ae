"""Causal attention of many rows by the native kernels: products of tiles, as weights in panels are multiplied.

A row's numbers do not depend on the rows beside it, so that a prompt in chunks gives what it gives whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.components import native
from zoo.components.kinds import LANES
from zoo.components.native.small import runs

FEWEST = 17
"""Rows from which bringing keys and values into panels pays, where earlier positions are cached."""

WIDEST = 256
"""The largest head."""

TOGETHER = 8
"""Rows that a thread takes at a time."""


def attends(q_THd: Tensor, k_GSd: Tensor, v_GSd: Tensor) -> bool:
    """Whether `attend` takes these: many bfloat16 rows, or a whole prompt, and keys whose positions lie together."""
    rows, _, width = q_THd.shape
    return (
        (rows >= FEWEST or rows == k_GSd.shape[1])
        and width <= WIDEST
        and width % LANES == 0
        and all(t.dtype is torch.bfloat16 and t.stride()[1:] == (width, 1) for t in (k_GSd, v_GSd))
        and runs(q_THd)
        and native.library().level == native.DOT
    )


def attend(q_THd: Tensor, k_GSd: Tensor, v_GSd: Tensor, scale: float, window: int | None) -> Tensor:
    """Attention of rows that are the last of the S positions, as `zoo.components.attention.kernels.reference`."""
    rows, heads, width = q_THd.shape
    groups, positions, _ = k_GSd.shape
    o_THd = torch.empty(rows, heads, width, dtype=q_THd.dtype)
    padded, threads = -(-positions // LANES) * LANES, torch.get_num_threads()
    keys, values = torch.empty(2, groups, padded, width, dtype=q_THd.dtype)
    scores, shares = (torch.empty(threads, TOGETHER, padded, dtype=dtype) for dtype in (torch.float32, q_THd.dtype))
    sizes = (rows, heads, groups, width, positions, window or 0, scale)
    cached = (k_GSd.data_ptr(), k_GSd.stride(0), v_GSd.data_ptr(), v_GSd.stride(0))
    places = (t.data_ptr() for t in (keys, values, scores, shares, o_THd))
    handle = native.library().handle
    handle.zoo_prompts(*sizes, q_THd.data_ptr(), *q_THd.stride()[:2], *cached, *places, threads)
    return o_THd
