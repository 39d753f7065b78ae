"""The Triton programs behind zoo.components.quantised_gpu, apart so that Triton is imported on first use only.

Codes lie as zoo.components.quantised says: blocks of 16 outputs, and in a block 64 bytes for every four rows of bytes,
four neighbouring ones of each output. A row of bytes is one input in eight bits, and in four bits two inputs, 16 apart.
"""

# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl


@triton.jit
def place(at, out, groups, BITS: tl.constexpr):
    """Where the bytes (rows `at`, outputs `out`) of a matrix stand."""
    blocks = (out // 16).to(tl.int64) * groups * BITS * 64
    return blocks[None, :] + (at // 4 * 64 + at % 4)[:, None] + (out % 16 * 4)[None, :]


@triton.jit
def scaled(whole, scales, at, out, held, groups, DEPTH: tl.constexpr, OUT: tl.constexpr):
    """Whole numbers of four bits times the scales of their groups, each of which is read once."""
    group = tl.min(at, 0) // 16 + tl.arange(0, DEPTH // 16)
    where = ((out // 16).to(tl.int64) * groups)[None, :] + group[:, None]
    mask = (group < groups)[:, None] & held[None, :]
    scale = tl.load(scales + where * 16 + (out % 16)[None, :], mask=mask, other=0.0).to(tl.float32)
    grouped = tl.reshape(whole, (DEPTH // 16, 16, OUT)) * scale[:, None, :]
    return tl.reshape(grouped, (DEPTH, OUT))


@triton.jit
def share(ends, tile, experts, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """Of rows that stand expert by expert: where the tile begins, where its expert's rows end, and the expert."""
    e = tl.arange(0, EXPERTS)
    last = tl.load(ends + e, mask=e < experts, other=0)
    first = tl.load(ends + e - 1, mask=(e > 0) & (e < experts), other=0)
    tiles = tl.where(e < experts, (last - first + ROWS - 1) // ROWS, 0)
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    mine = e == expert
    start = tl.sum(tl.where(mine, first, 0), 0) + (tile - tl.sum(tl.where(e < expert, tiles, 0), 0)) * ROWS
    # A tile behind all rows ends before it begins.
    stop = tl.sum(tl.where(mine, last, 0), 0)
    return tl.where(expert < experts, start, 0), tl.where(expert < experts, stop, 0), tl.minimum(expert, experts - 1)


@triton.jit
def multiply(
    x,
    codes,
    scales,
    bias,
    y,
    ends,
    rows,
    inputs,
    outputs,
    stride,
    groups,
    experts,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    DEPTH: tl.constexpr,
    BITS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Some rows times some outputs: bytes are read once, made numbers of x's type, and added up in float32.

    Of a mixture, rows stand expert by expert up to `ends`, and a program finds the expert whose rows it takes.
    """
    start, stop, expert = tl.program_id(0) * ROWS, rows, 0
    if EXPERTS > 0:
        start, stop, expert = share(ends, tl.program_id(0), experts, ROWS, EXPERTS)
    blocks = (outputs + 15) // 16
    row, out = start + tl.arange(0, ROWS), tl.program_id(1) * OUT + tl.arange(0, OUT)
    there, held = row < stop, out < blocks * 16
    far = row.to(tl.int64) * stride
    own = tl.cast(expert, tl.int64) * blocks
    codes += own * groups * BITS * 64
    scales += own * 16 * (groups if BITS == 4 else 1)
    total = tl.zeros([ROWS, OUT], tl.float32)
    depth = tl.where(start < stop, groups * 4 * BITS, 0)
    for begin in range(0, depth, DEPTH):
        at = begin + tl.arange(0, DEPTH)
        mask = (at < depth)[:, None] & held[None, :]
        byte = tl.load(codes + place(at, out, groups, BITS), mask=mask, other=0).to(tl.int32)
        if BITS == 8:
            seen = there[:, None] & (at < inputs)[None, :]
            value = tl.load(x + far[:, None] + at[None, :], mask=seen, other=0.0)
            whole = (byte - 128).to(tl.float32).to(value.dtype)
            total = tl.dot(value, whole, total, input_precision="ieee")
        else:
            at_low = at // 16 * 32 + at % 16
            seen = there[:, None] & (at_low < inputs)[None, :]
            value = tl.load(x + far[:, None] + at_low[None, :], mask=seen, other=0.0)
            whole = scaled(((byte & 15) - 8).to(tl.float32), scales, at, out, held, groups, DEPTH, OUT)
            total = tl.dot(value, whole.to(value.dtype), total, input_precision="ieee")
            seen = there[:, None] & (at_low + 16 < inputs)[None, :]
            value = tl.load(x + far[:, None] + (at_low + 16)[None, :], mask=seen, other=0.0)
            whole = scaled(((byte >> 4) - 8).to(tl.float32), scales, at, out, held, groups, DEPTH, OUT)
            total = tl.dot(value, whole.to(value.dtype), total, input_precision="ieee")
    if BITS == 8:
        total = total * tl.load(scales + out, mask=held, other=0.0)[None, :]
    if BIASED:
        total += tl.load(bias + out, mask=out < outputs, other=0.0).to(tl.float32)[None, :]
    inside = there[:, None] & (out < outputs)[None, :]
    tl.store(y + row.to(tl.int64)[:, None] * outputs + out[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def numbers(
    codes,
    scales,
    o,
    inputs,
    outputs,
    groups,
    OUT: tl.constexpr,
    DEPTH: tl.constexpr,
    BITS: tl.constexpr,
):
    """Some of a matrix as numbers, row-major."""
    at, out = tl.program_id(0) * DEPTH + tl.arange(0, DEPTH), tl.program_id(1) * OUT + tl.arange(0, OUT)
    held = out < (outputs + 15) // 16 * 16
    mask = (at < groups * 4 * BITS)[:, None] & held[None, :]
    byte = tl.load(codes + place(at, out, groups, BITS), mask=mask, other=0).to(tl.int32)
    target = o + out.to(tl.int64)[None, :] * inputs
    kept = (out < outputs)[None, :]
    if BITS == 8:
        value = (byte - 128).to(tl.float32) * tl.load(scales + out, mask=held, other=0.0)[None, :]
        tl.store(target + at[:, None], value.to(o.dtype.element_ty), mask=kept & (at < inputs)[:, None])
    else:
        low = (at // 16 * 32 + at % 16)[:, None]
        value = scaled(((byte & 15) - 8).to(tl.float32), scales, at, out, held, groups, DEPTH, OUT)
        tl.store(target + low, value.to(o.dtype.element_ty), mask=kept & (low < inputs))
        value = scaled(((byte >> 4) - 8).to(tl.float32), scales, at, out, held, groups, DEPTH, OUT)
        tl.store(target + low + 16, value.to(o.dtype.element_ty), mask=kept & (low + 16 < inputs))
