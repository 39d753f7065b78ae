"""The Triton programs behind zoo.components.few, apart so that Triton is imported on first use only."""

# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl


@triton.jit
def multiply(
    x,
    weight,
    bias,
    y,
    inputs,
    outputs,
    rows,
    x_row,
    weight_row,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    DEPTH: tl.constexpr,
    BIASED: tl.constexpr,
    GATED: tl.constexpr,
):
    """All rows times some outputs, whose weights are read once. Sums are float32 and rounded where PyTorch's are.

    Gated: each output is silu of one product times another, whose weights stand `outputs` further down.
    """
    row, lane = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    out = tl.program_id(0) * OUT + tl.arange(0, OUT)
    there, held = row < rows, out < outputs
    first = tl.zeros([ROWS, OUT, DEPTH], tl.float32)
    second = tl.zeros([ROWS, OUT, DEPTH], tl.float32)
    source, target = x + row.to(tl.int64)[:, None] * x_row, weight + out.to(tl.int64)[:, None] * weight_row
    further = weight + (out + outputs).to(tl.int64)[:, None] * weight_row
    for begin in range(0, inputs, DEPTH):
        at = begin + lane
        value = tl.load(source + at[None, :], mask=there[:, None] & (at < inputs)[None, :], other=0.0).to(tl.float32)
        mask = held[:, None] & (at < inputs)[None, :]
        first += value[:, None, :] * tl.load(target + at[None, :], mask=mask, other=0.0).to(tl.float32)[None, :, :]
        if GATED:
            up = tl.load(further + at[None, :], mask=mask, other=0.0).to(tl.float32)
            second += value[:, None, :] * up[None, :, :]
    total = tl.sum(first, 2)
    if BIASED:
        total += tl.load(bias + out, mask=held, other=0.0).to(tl.float32)[None, :]
    if GATED:
        gate = total.to(y.dtype.element_ty).to(tl.float32)
        silu = (gate / (1.0 + tl.exp(-gate))).to(y.dtype.element_ty).to(tl.float32)
        total = silu * tl.sum(second, 2).to(y.dtype.element_ty).to(tl.float32)
    target = y + row.to(tl.int64)[:, None] * outputs + out[None, :]
    tl.store(target, total.to(y.dtype.element_ty), mask=there[:, None] & held[None, :])
