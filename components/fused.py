"""Small operations in one pass each, as Triton kernels for CUDA devices: a GPU spends more time on starting and on
reading such operations one by one than on what they compute.

Each rounds where the plain formula beside its component rounds. Those formulas are what every other device runs, and
what the kernels are tested against; ZOO_FUSED=off makes CUDA devices run them too.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from zoo.registry.errors import ZooError

log = logging.getLogger("zoo.components")

WIDEST = 16384
"""The longest row that `rms` takes at once."""

TOLERANCE = 1e-4
"""Relative error of float32 that a kernel may have."""

BLOCK = 1024
"""Elements of a row that a program of `gate` takes."""


def runs(x: Tensor) -> bool:
    """Whether the kernels run on `x`: on a CUDA device, without gradients, rows of lanes that lie together."""
    return x.is_cuda and not torch.is_grad_enabled() and x.stride(-1) == 1 and is_wanted() and works(x.device)


@cache
def is_wanted() -> bool:
    """Whether Triton is installed, as it comes with torch's builds for CUDA, and ZOO_FUSED does not forbid its use."""
    choice = os.environ.get("ZOO_FUSED", "auto")
    if choice not in ("auto", "off"):
        raise ZooError(
            "unknown way to run small operations", where="ZOO_FUSED", found=repr(choice), expected="'auto' or 'off'"
        )
    return choice == "auto" and find_spec("triton") is not None


@cache
def works(device: torch.device) -> bool:
    """Whether every kernel gives on this device what its formula gives on the CPU: asked once, and said if not."""
    from zoo.components.fused_check import differences

    try:
        wrong = [f"{name} is off by {error:.0e}" for name, error in differences(device) if not error < TOLERANCE]
    except Exception as error:
        # Whatever a compiler may raise: what it cannot build is computed by the formulas.
        wrong = [str(error).partition("\n")[0] or type(error).__name__]
    if wrong:
        log.warning("zoo: small operations run by PyTorch's own kernels on %s: %s", device, "; ".join(wrong))
    return not wrong


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


def _power(count: int) -> int:
    """The least power of two that holds `count`."""
    return 1 << (count - 1).bit_length()


@cache
def _kernels() -> ModuleType:
    from zoo.components import fused_kernels

    return fused_kernels
