"""The Triton programs behind zoo.components.attention.paged, apart so that Triton is imported on first use only."""

# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl


@triton.jit
def fp8(code):
    """int32 bytes as the e4m3 numbers that they are, by arithmetic: not every device has the type."""
    bits, size = code & 127, code & 7
    large = ((bits << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(bits < 8, size.to(tl.float32) * 0.001953125, large)
    return tl.where((code & 128) != 0, -value, value)


@triton.jit
def nearest(x):
    """Whole numbers, ties to even, of numbers far below 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def e4m3(x):
    """Numbers of at most 448 as e4m3 bytes."""
    size = tl.abs(x)
    bits = size.to(tl.int32, bitcast=True)
    large = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    code = tl.where(size < 0.015625, nearest(size * 512.0).to(tl.int32), large)
    return tl.where(x < 0, code | 128, code)


@triton.jit
def bfloat16(x):
    """The bits of the nearest bfloat16."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@triton.jit
def keep(
    k,
    v,
    pool,
    scales,
    numbers,
    k_row,
    k_head,
    v_row,
    v_head,
    width,
    stored,
    WIDE: tl.constexpr,
    KIND: tl.constexpr,
    PAGE: tl.constexpr,
    PLANES: tl.constexpr,
):
    """One head of one sequence's new row, at its page and offset: as it is, or as codes behind their scale."""
    b, g, batch, groups = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(0), tl.num_programs(1)
    lane = tl.arange(0, WIDE)
    mask = lane < width
    page, offset = tl.load(numbers + b), tl.load(numbers + batch + b)
    for plane in tl.static_range(PLANES):
        place = (((page * PLANES + plane) * PAGE + offset) * groups + g) * stored
        if plane == 0:
            x = tl.load(k + b * k_row + g * k_head + lane, mask=mask, other=0.0)
        else:
            x = tl.load(v + b * v_row + g * v_head + lane, mask=mask, other=0.0)
        if KIND == 0:
            tl.store(pool + place + lane, x, mask=mask)
        else:
            top = 127.0 if KIND == 1 else 448.0
            x = x.to(tl.float32)
            # What is not a number must stay none, whatever a maximum makes of it.
            lost = tl.sum((x != x).to(tl.int32), 0) > 0
            bits = tl.where(lost, 0x7FC0, bfloat16(tl.div_rn(tl.max(tl.abs(x), 0), top)))
            scale = tl.maximum((bits << 16).to(tl.float32, bitcast=True), 1.1754943508222875e-38)
            code = tl.minimum(tl.maximum(tl.div_rn(x, scale), -top), top)
            code = nearest(code).to(tl.int32) if KIND == 1 else e4m3(code)
            tl.store(scales + place // 2, bits.to(tl.int16))
            tl.store(pool + place + 2 + lane, code.to(tl.int8), mask=mask)


@triton.jit
def rows(pool, scales, place, lane, live, width, q, KIND: tl.constexpr):
    """Rows of the pool that begin at `place`: numbers as they are, or codes behind the scale that they share."""
    mask = live[:, None] & (lane < width)[None, :]
    if KIND == 0:
        found = tl.load(pool + place[:, None] + lane[None, :], mask=mask, other=0.0)
    else:
        code = tl.load(pool + 2 + place[:, None] + lane[None, :], mask=mask, other=0).to(tl.int32)
        scale = (tl.load(scales + place // 2, mask=live, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
        value = code.to(tl.float32) if KIND == 1 else fp8(code)
        found = tl.where(mask, value * scale[:, None], 0.0).to(q.dtype.element_ty)
    return found


@triton.jit
def capped(scores, softcap):
    """softcap tanh(scores / softcap), in a form that cannot overflow."""
    half = scores / softcap
    small = tl.exp(-2.0 * tl.abs(half))
    return softcap * tl.where(half < 0, -1.0, 1.0) * (1.0 - small) / (1.0 + small)


@triton.jit
def split(
    q,
    pool,
    scales,
    tables,
    filled,
    parts,
    peaks,
    totals,
    q_row,
    q_head,
    scale,
    softcap,
    window,
    pages,
    shared,
    width,
    stored,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    KIND: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """One split of one key head: the weighted values of its query heads, their largest score and their sum."""
    groups, splits = tl.num_programs(1), tl.num_programs(2)
    b, g, s = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    count = tl.load(filled + b).to(tl.int32)
    first = tl.maximum(count - window, 0)
    start, stop = tl.maximum(s * SPLIT, first // BLOCK * BLOCK), tl.minimum((s + 1) * SPLIT, count)
    row, lane, slot = tl.arange(0, ROWS), tl.arange(0, WIDE), tl.arange(0, BLOCK)
    inside = (row < shared)[:, None] & (lane < width)[None, :]
    head = b * q_row + (g * shared + row) * q_head
    q_tile = tl.load(q + head[:, None] + lane[None, :], mask=inside, other=0.0)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDE], tl.float32)
    for at in range(start, stop, BLOCK):
        slots = at + slot
        live = (slots < stop) & (slots >= first)
        page = tl.load(tables + b * pages + slots // PAGE, mask=slots < stop, other=0)
        place = ((page * 2 * PAGE + slots % PAGE) * groups + g) * stored
        k = rows(pool, scales, place, lane, live, width, q, KIND)
        v = rows(pool, scales, place + PAGE * groups * stored, lane, live, width, q, KIND)
        scores = tl.dot(q_tile, tl.trans(k), input_precision="ieee") * scale
        if CAPPED:
            scores = capped(scores, softcap)
        scores = tl.where(live[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        # A block in which nothing is seen leaves all as it was.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - base[:, None])
        shrink = tl.exp(peak - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        peak = higher
    place = ((b * groups + g) * splits + s) * shared + row
    tl.store(peaks + place, peak, mask=row < shared)
    tl.store(totals + place, total, mask=row < shared)
    tl.store(parts + place[:, None] * width + lane[None, :], acc, mask=inside)


@triton.jit
def add(
    parts,
    peaks,
    totals,
    sinks,
    o,
    groups,
    splits,
    shared,
    width,
    WIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    SUNK: tl.constexpr,
):
    """One query head of one sequence: its splits together, and the share that a sink takes of them."""
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, WIDE)
    first = (b * groups + h // shared) * splits * shared + h % shared
    highest, whole = float("-inf"), 0.0
    if SUNK:
        highest, whole = tl.load(sinks + h).to(tl.float32), 1.0
    value = tl.zeros([WIDE], tl.float32)
    for begin in range(0, splits, SPLITS):
        split_ = begin + tl.arange(0, SPLITS)
        place, there = first + split_ * shared, split_ < splits
        peak = tl.load(peaks + place, mask=there, other=float("-inf"))
        total = tl.load(totals + place, mask=there, other=0.0)
        higher = tl.maximum(highest, tl.max(peak, 0))
        # Splits in which nothing is seen leave all as it was.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight, shrink = tl.exp(peak - base), tl.exp(highest - base)
        mask = there[:, None] & (lane < width)[None, :]
        part = tl.load(parts + place[:, None] * width + lane[None, :], mask=mask, other=0.0)
        whole = whole * shrink + tl.sum(total * weight, 0)
        value = value * shrink + tl.sum(part * weight[:, None], 0)
        highest = higher
    tl.store(o + (b * groups * shared + h) * width + lane, (value / whole).to(o.dtype.element_ty), mask=lane < width)
