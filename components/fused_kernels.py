"""The Triton programs behind zoo.components.fused, apart so that Triton is imported on first use only."""

# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl


@triton.jit
def rotate(x, cos, sin, o, row, head, heads, lanes, width, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr):
    """Some heads of one row: both halves of the first `lanes` lanes turned, the others copied."""
    t, h = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    lane, half = tl.arange(0, HALF), lanes // 2
    there = (h < heads)[:, None]
    mask = there & (lane < half)[None, :]
    source, target = x + t * row + h[:, None] * head, o + (t * heads + h[:, None]) * width
    a = tl.load(source + lane[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + half + lane[None, :], mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cos + t * lanes + lane, mask=lane < half, other=0.0)[None, :]
    s = tl.load(sin + t * lanes + half + lane, mask=lane < half, other=0.0)[None, :]
    tl.store(target + lane[None, :], (a * c - b * s).to(o.dtype.element_ty), mask=mask)
    tl.store(target + half + lane[None, :], (b * c + a * s).to(o.dtype.element_ty), mask=mask)
    if REST > 0:
        rest = lanes + tl.arange(0, REST)
        kept = there & (rest < width)[None, :]
        tl.store(target + rest[None, :], tl.load(source + rest[None, :], mask=kept), mask=kept)


@triton.jit
def gate(x, o, row, width, BLOCK: tl.constexpr):
    """A block of one row: silu of the first half, rounded, times the second."""
    t, lane = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = lane < width
    first = tl.load(x + t * row + lane, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x + t * row + width + lane, mask=mask, other=0.0).to(tl.float32)
    silu = (first / (1.0 + tl.exp(-first))).to(o.dtype.element_ty).to(tl.float32)
    tl.store(o + t * width + lane, (silu * second).to(o.dtype.element_ty), mask=mask)


@triton.jit
def rms(x, weight, o, row, width, eps, BLOCK: tl.constexpr):
    """One row: normalised in float32, rounded, times the weight."""
    t, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask = lane < width
    value = tl.load(x + t * row + lane, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / width + eps)
    normed = (value * scale).to(o.dtype.element_ty).to(tl.float32)
    by = tl.load(weight + lane, mask=mask, other=0.0).to(tl.float32)
    tl.store(o + t * width + lane, (normed * by).to(o.dtype.element_ty), mask=mask)


@triton.jit
def add_rms(x, y, weight, total, o, x_row, y_row, width, eps, BLOCK: tl.constexpr):
    """One row: x + y, rounded and kept, and that normalised as `rms` does it."""
    t, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask = lane < width
    first = tl.load(x + t * x_row + lane, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(y + t * y_row + lane, mask=mask, other=0.0).to(tl.float32)
    rounded = (first + second).to(o.dtype.element_ty)
    tl.store(total + t * width + lane, rounded, mask=mask)
    value = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / width + eps)
    normed = (value * scale).to(o.dtype.element_ty).to(tl.float32)
    by = tl.load(weight + lane, mask=mask, other=0.0).to(tl.float32)
    tl.store(o + t * width + lane, (normed * by).to(o.dtype.element_ty), mask=mask)
