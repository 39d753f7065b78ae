"""Attention of a few rows over slabs of keys and values, plain or coded, by the kernel in attention.c.

A slab is read as it lies, once for all new rows of its sequence and all query heads of a key head, by all threads
however few heads there are; codes become numbers on the way. New keys and values are written by the same call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from zoo.components import native
from zoo.components.attention.kernels import Scores, reference
from zoo.components.cache.code import RowCode
from zoo.components.native.calls import Library

WIDEST = 256
"""The largest head, and the most query heads of a key head, that the kernel has room for."""

FEW = 16
"""Rows of a sequence up to which the kernel is the way: for more, products of many rows are."""


_SIZE, _ADDRESS, _COUNT, _FLOAT = ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_float
_ARGUMENTS: list[Any] = [*[_COUNT] * 3, *[_SIZE] * 7, *[_ADDRESS, _SIZE] * 3, _ADDRESS, _ADDRESS, _SIZE]
_ARGUMENTS += [_FLOAT, _FLOAT, _ADDRESS, _ADDRESS, _COUNT]

PLAIN = {torch.bfloat16: 0, torch.float32: 1}
"""Types of numbers, as the kernel names them."""

_CODED = {"int8": 2, "fp8": 3}


def serves(code: RowCode) -> bool:
    """Whether `attend_slabs` reads slabs of such rows, if queries come in the same type."""
    [width] = code.lanes if len(code.lanes) == 1 else [0]
    return code.dtype in PLAIN and 0 < width <= WIDEST and width % 16 == 0 and missing() is None


def kind_of(code: RowCode) -> int:
    """How the kernels name a kind of row."""
    return PLAIN[code.dtype] if code.kind is None else _CODED[code.kind]


def addresses(slabs: Sequence[Tensor]) -> Tensor:
    """Where they lie, int64."""
    return torch.tensor([slab.data_ptr() for slab in slabs], dtype=torch.int64)


def attends(q_BHd: Tensor, k_BGd: Tensor, v_BGd: Tensor, code: RowCode) -> bool:
    """Whether `attend_slabs` is the way for such rows: in bfloat16 or float32 on a CPU, without gradients."""
    width, shared = q_BHd.shape[-1], q_BHd.shape[1] // k_BGd.shape[1]
    return (
        q_BHd.device.type == "cpu"
        and q_BHd.dtype in PLAIN
        and q_BHd.dtype == k_BGd.dtype == v_BGd.dtype == code.dtype
        and code.lanes == (width,)
        and width % 16 == 0
        and width <= WIDEST
        and shared <= WIDEST
        and all(x.stride()[1:] == (width, 1) for x in (q_BHd, k_BGd, v_BGd))
        and not torch.is_grad_enabled()
        and missing() is None
    )


def attend_slabs(
    q_BHd: Tensor,
    k_BGd: Tensor,
    v_BGd: Tensor,
    slabs_B: Tensor,
    numbers_N: Tensor,
    code: RowCode,
    how: Scores,
    threads: int | None = None,
) -> Tensor:
    """(B, H, d): new rows of slabs (2, G, slots, row) are written, and each attends to what its slab holds with it.

    slabs_B: int64, where each row's slab lies. numbers_N: int64, for each row the slots of its slab, the one that it
    takes, how many are filled with it, and the first row that has the same slab. Rows of a slab come in their order,
    and none sees a later one.
    """
    places = [field for x in (k_BGd, v_BGd) for field in (x.data_ptr(), x.stride(0))]
    return _attended(q_BHd, k_BGd.shape[1], q_BHd.shape[-1], places, (slabs_B, numbers_N), code, how, threads)


def attend_latents(
    q_BHm: Tensor,
    slabs_B: Tensor,
    numbers_N: Tensor,
    code: RowCode,
    *,
    latent: int,
    scale: float,
    threads: int | None = None,
) -> Tensor:
    """(B, H, c): rows that slabs (1, 1, slots, row) have already attend to what these hold: the first lanes of each
    slot are the keys of all heads, the first `latent` of them the values. Otherwise as `attend_slabs`."""
    how: Scores = {"scale": scale, "window": None, "softcap": None, "sinks_H": None}
    return _attended(q_BHm, 1, latent, [None, 0, None, 0], (slabs_B, numbers_N), code, how, threads)


def _attended(
    q_BHd: Tensor,
    groups: int,
    values: int,
    new: Sequence[int | None],
    places: tuple[Tensor, Tensor],
    code: RowCode,
    how: Scores,
    threads: int | None,
) -> Tensor:
    """(B, H, values). new: where new keys and values lie and how far apart rows are, no addresses for none."""
    batch, heads, width = q_BHd.shape
    o_BHd = torch.empty(batch, heads, values, dtype=q_BHd.dtype)
    sinks_H = None if how["sinks_H"] is None else how["sinks_H"].to(q_BHd.dtype).contiguous()
    failed = _library().zoo_attend(
        kind_of(code),
        q_BHd.dtype is torch.float32,
        native.library().level == native.DOT,
        batch,
        groups,
        heads // groups,
        width,
        values,
        code.width * code.stored.itemsize,
        0 if code.kind is None else code.start,
        q_BHd.data_ptr(),
        q_BHd.stride(0),
        *new,
        *(place.data_ptr() for place in places),
        how["window"] or 0,
        how["scale"],
        how["softcap"] or 0.0,
        None if sinks_H is None else sinks_H.data_ptr(),
        o_BHd.data_ptr(),
        threads or torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("no memory for the sums of attention")
    return o_BHd


@cache
def missing() -> str | None:
    """Why the kernel is not in use, None where it is: it is compared with the formula before its first use."""
    return native.refusal("attention", _error)


@cache
def _library() -> Library:
    handle = native.library().handle
    handle.zoo_attend.declare(_ARGUMENTS, checked=True)
    return handle


@torch.no_grad()
def _error() -> float:
    """The largest relative error of small cases, of every kind of row: the last rows of a sequence, one and three."""
    draw, slots, found = torch.Generator().manual_seed(0), 300, []
    how: Scores = {"scale": 0.2, "window": None, "softcap": None, "sinks_H": None}
    kinds = [RowCode(kind, (48,), dtype) for kind in (None, "int8", "fp8") for dtype in (torch.float32, torch.bfloat16)]
    for code, rows in product(kinds, (1, 3)):
        q_BHd, new_2BGd, old = (
            torch.randn(*size, generator=draw).to(code.dtype)
            for size in ((rows, 6, 48), (2, rows, 2, 48), (2, 2, slots, 48))
        )
        slab = code.encode(old)
        at = range(slots - rows, slots)
        numbers_N = torch.tensor([number for slot in at for number in (slots, slot, slot + 1, 0)])
        o_BHd = attend_slabs(q_BHd, new_2BGd[0], new_2BGd[1], addresses([slab] * rows), numbers_N, code, how)
        old[:, :, -rows:] = new_2BGd.transpose(1, 2)
        k_GSd, v_GSd = code.rounded(old)
        expected = reference(q_BHd, k_GSd, v_GSd, 0.2, slots - rows, None, {})
        found.append(float((o_BHd.float() - expected.float()).norm() / expected.float().norm()))
    return max(found)
