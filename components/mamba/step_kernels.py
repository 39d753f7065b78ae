"""The Triton programs behind zoo.components.mamba.single, apart so that Triton is imported on first use only."""

# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl


@triton.jit
def conv(pool, places, x, row, weight, bias, o, width, TAPS: tl.constexpr, BLOCK: tl.constexpr, BIASED: tl.constexpr):
    """Some channels of one sequence: the weighted sum of the kept inputs and the new one, which is kept in turn."""
    b, channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < width
    kept = pool + tl.load(places + b) * (TAPS - 1) * width + channel
    new = tl.load(x + b * row + channel, mask=mask, other=0.0)
    total = new.to(tl.float32) * tl.load(weight + channel * TAPS + TAPS - 1, mask=mask, other=0.0).to(tl.float32)
    for tap in tl.static_range(TAPS - 1):
        old = tl.load(kept + tap * width, mask=mask, other=0.0)
        total += old.to(tl.float32) * tl.load(weight + channel * TAPS + tap, mask=mask, other=0.0).to(tl.float32)
        if tap > 0:
            tl.store(kept + (tap - 1) * width, old, mask=mask)
    tl.store(kept + (TAPS - 2) * width, new, mask=mask)
    if BIASED:
        total += tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32)
    silu = total / (1.0 + tl.exp(-total))
    tl.store(o + b * width + channel, silu.to(o.dtype.element_ty), mask=mask)


@triton.jit
def ssd(
    pool,
    places,
    a,
    x,
    x_row,
    dt,
    b,
    b_row,
    c,
    c_row,
    o,
    shared,
    width,
    size,
    WIDE: tl.constexpr,
    SIZE: tl.constexpr,
):
    """One head of one sequence: its state moved on by one token, and what the token reads of it."""
    seq, h, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    lane, place = tl.arange(0, WIDE), tl.arange(0, SIZE)
    mask = (lane < width)[:, None] & (place < size)[None, :]
    state = pool + (tl.load(places + seq) * heads + h) * width * size + lane[:, None] * size + place[None, :]
    step = tl.load(dt + seq * heads + h)
    value = tl.load(x + seq * x_row + h * width + lane, mask=lane < width, other=0.0) * step
    group = h // shared * size + place
    written = tl.load(b + seq * b_row + group, mask=place < size, other=0.0)
    read = tl.load(c + seq * c_row + group, mask=place < size, other=0.0)
    kept = tl.load(state, mask=mask, other=0.0) * tl.exp(step * tl.load(a + h))
    kept += value[:, None] * written[None, :]
    tl.store(state, kept, mask=mask)
    tl.store(o + (seq * heads + h) * width + lane, tl.sum(kept * read[None, :], 1), mask=lane < width)
