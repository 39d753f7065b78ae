"""One token of each of many sequences, whose states move on where they lie: Triton kernels for CUDA devices.

They stand for `CausalConv` and `ssd` with one row, which read states, make new ones and write these back.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

BLOCK = 512
"""Channels that a program of the convolution takes."""


def conv(pool_PkW: Tensor, places_B: Tensor, x_BW: Tensor, weight_W1k: Tensor, bias_W: Tensor | None) -> Tensor:
    """silu(convolution), (B, W); the last inputs of each sequence stand at its place of the pool and are replaced."""
    width = x_BW.shape[1]
    o_BW = torch.empty(x_BW.shape, dtype=x_BW.dtype, device=x_BW.device)
    grid = (len(x_BW), -(-width // BLOCK))
    _kernels().conv[grid](
        pool_PkW,
        places_B,
        x_BW,
        x_BW.stride(0),
        weight_W1k,
        weight_W1k if bias_W is None else bias_W,
        o_BW,
        width,
        TAPS=weight_W1k.shape[2],
        BLOCK=BLOCK,
        BIASED=bias_W is not None,
    )
    return o_BW


def ssd(
    pool_PWn: Tensor, places_B: Tensor, a_H: Tensor, x_BHd: Tensor, dt_BH: Tensor, b_BGn: Tensor, c_BGn: Tensor
) -> Tensor:
    """Outputs (B, H, d) of `zoo.components.mamba.scan.ssd`; each sequence's state in the pool is replaced."""
    (batch, heads, width), size = x_BHd.shape, b_BGn.shape[2]
    o_BHd = torch.empty(x_BHd.shape, dtype=x_BHd.dtype, device=x_BHd.device)
    _kernels().ssd[(batch, heads)](
        pool_PWn,
        places_B,
        a_H,
        x_BHd,
        x_BHd.stride(0),
        dt_BH.contiguous(),
        b_BGn,
        b_BGn.stride(0),
        c_BGn,
        c_BGn.stride(0),
        o_BHd,
        heads // b_BGn.shape[1],
        width,
        size,
        WIDE=1 << (width - 1).bit_length(),
        SIZE=1 << (size - 1).bit_length(),
        num_warps=8,
    )
    return o_BHd


@cache
def _kernels() -> ModuleType:
    from zoo.components.mamba import step_kernels

    return step_kernels
