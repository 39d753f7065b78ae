"""Small operations in one pass each, as Triton kernels for CUDA devices: a GPU spends more time on starting and on
reading such operations one by one than on what they compute. And where all of zoo's Triton kernels are chosen.

Each rounds where the plain formula beside its component rounds. Those formulas are what every other device runs, and
what the kernels are tested against; ZOO_FUSED=off makes CUDA devices run them too, and a list of kernels all but these.
"""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from zoo.registry.errors import ZooError, nearest

log = logging.getLogger("zoo.components")

KERNELS = ("attention", "cache", "convolution", "gate", "norm", "products", "rope", "rows", "state")
"""By name. attention: of single rows, over pages. cache: new rows to pages. products: with quantised weights. rows: few
of them times plain weights. convolution, state: of mixers that are recurrent, one token at a time."""

WIDEST = 16384
"""The longest row that `rms` takes at once."""

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}
"""Relative error that a kernel may have: the largest difference by the largest number."""

BLOCK = 1024
"""Elements of a row that a program of `gate` takes."""


def runs(x: Tensor, kernel: str) -> bool:
    """Whether one of `KERNELS` runs on `x`: on a CUDA device, without gradients, rows of lanes that lie together."""
    if not x.is_cuda or torch.is_grad_enabled() or x.stride(-1) != 1:
        return False
    return kernel in wanted() and works(x.device, kernel)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """A block in which the thread's current GPU is `device`: Triton starts kernels there and graphs are recorded there,
    wherever tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def wanted() -> frozenset[str]:
    """The kernels that ZOO_FUSED allows; none where Triton is not installed. Raises ZooError for unknown words."""
    words = os.environ.get("ZOO_FUSED", "auto").split(",")
    named = frozenset(KERNELS if words == ["auto"] else () if words == ["off"] else words)
    for word in named - set(KERNELS):
        raise ZooError(
            "unknown Triton kernel",
            where="ZOO_FUSED",
            found=repr(word),
            expected=f"'auto', 'off', or some of {', '.join(KERNELS)} with commas between",
            hint=nearest(word, ("auto", "off", *KERNELS)),
        )
    if find_spec("triton") is not None:
        return named
    if named and words != ["auto"]:
        raise ZooError(
            "Triton is not installed", where="ZOO_FUSED", found=repr(",".join(words)), expected="'auto' or 'off'"
        )
    return frozenset()


@cache
def works(device: torch.device, kernel: str) -> bool:
    """Whether a kernel gives on this device what its formula gives on the CPU: asked at first use, and said if not."""
    from zoo.components.fused_check import difference

    try:
        with on(device):
            errors = {dtype: difference(kernel, device, dtype) for dtype in _dtypes(device)}
        wrong = next((f"off by {e:.0e} in {dtype}" for dtype, e in errors.items() if not e < TOLERANCES[dtype]), None)
    except Exception as fault:
        # Whatever a compiler may raise: what it cannot build is computed by the formulas.
        wrong = str(fault).partition("\n")[0] or type(fault).__name__
    if wrong is not None:
        log.warning("zoo: the Triton kernel for %s is left out on %s: %s", kernel, device, wrong)
    return wrong is None


def _dtypes(device: torch.device) -> list[torch.dtype]:
    """What kernels are checked in: a compiler treats each type in its own way. Triton's interpreter has no bfloat16."""
    if device.type != "cuda":
        return [torch.float32]
    return [torch.float32, torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16]


def rotate(x_THd: Tensor, cos_T1r: Tensor, sin_T1r: Tensor) -> Tensor:
    """As `zoo.components.rope.rotary.rotate`."""
    rows, heads, width = x_THd.shape
    lanes = cos_T1r.shape[-1]
    o_THd = torch.empty(x_THd.shape, dtype=x_THd.dtype, device=x_THd.device)
    half, rest = _power(lanes // 2), _power(width - lanes) if lanes < width else 0
    together = min(_power(heads), max(1, 2048 // half))
    grid = (rows, -(-heads // together))
    strides = (x_THd.stride(0), x_THd.stride(1))
    _kernels().rotate[grid](
        x_THd,
        cos_T1r.contiguous(),
        sin_T1r.contiguous(),
        o_THd,
        *strides,
        heads,
        lanes,
        width,
        HEADS=together,
        HALF=half,
        REST=rest,
    )
    return o_THd


def gate(gate_up_T2F: Tensor) -> Tensor:
    """silu(first half) * second half, (T, 2 F) to (T, F)."""
    rows, width = len(gate_up_T2F), gate_up_T2F.shape[1] // 2
    o_TF = torch.empty(rows, width, dtype=gate_up_T2F.dtype, device=gate_up_T2F.device)
    _kernels().gate[(rows, -(-width // BLOCK))](gate_up_T2F, o_TF, gate_up_T2F.stride(0), width, BLOCK=BLOCK)
    return o_TF


def rms(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """As `zoo.components.norm.rms`; x may have any number of axes whose rows lie at equal distances."""
    width = x_TD.shape[-1]
    rows_ND = x_TD.flatten(0, -2)
    o_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    _kernels().rms[(len(rows_ND),)](rows_ND, weight_D, o_TD, rows_ND.stride(0), width, eps, BLOCK=_power(width))
    return o_TD


def add_rms(x_TD: Tensor, y_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y of (T, D) rows, and the norm of that."""
    rows, width = x_TD.shape
    total_TD, o_TD = (torch.empty(rows, width, dtype=x_TD.dtype, device=x_TD.device) for _ in range(2))
    strides = (x_TD.stride(0), y_TD.stride(0))
    _kernels().add_rms[(rows,)](x_TD, y_TD, weight_D, total_TD, o_TD, *strides, width, eps, BLOCK=_power(width))
    return total_TD, o_TD


def _power(count: int) -> int:
    """The least power of two that holds `count`."""
    return 1 << (count - 1).bit_length()


@cache
def _kernels() -> ModuleType:
    from zoo.components import fused_kernels

    return fused_kernels
