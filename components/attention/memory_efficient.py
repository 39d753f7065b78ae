"""xformers' memory-efficient attention: an optional extra, found at run time, for CUDA devices."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Tensor

from zoo.registry.errors import ZooError


def memory_efficient(
    q_THd: Tensor, k_GSd: Tensor, v_GSd: Tensor, scale: float, past: int, window: int | None, memo: dict[Any, Any]
) -> Tensor:
    """(T, H, d), with masks that are never written out. Raises ZooError without xformers or without CUDA."""
    if q_THd.device.type != "cuda":
        raise ZooError(
            "xformers' attention runs on CUDA devices",
            where="ZOO_ATTENTION",
            found=f"a tensor on {q_THd.device}",
            hint="unset ZOO_ATTENTION",
        )
    try:
        fmha = import_module("xformers.ops.fmha")
    except ImportError as error:
        raise ZooError(
            "xformers cannot be imported",
            where="ZOO_ATTENTION",
            found=str(error),
            hint="install it with `pip install 'zoo-inference[xformers]'`, or unset ZOO_ATTENTION",
        ) from error
    return attend(fmha, q_THd, k_GSd, v_GSd, scale, window)


def attend(fmha: Any, q_THd: Tensor, k_GSd: Tensor, v_GSd: Tensor, scale: float, window: int | None) -> Tensor:
    """Query heads stand beside the key head that they share; the last row sees the last key.

    Shapes as in the documentation of `xformers.ops.memory_efficient_attention`: 1, rows, G, J, d.
    """
    groups, keys, width = k_GSd.shape
    q_1TGJd = q_THd.view(1, len(q_THd), groups, -1, width)
    shape = (1, keys, groups, q_1TGJd.shape[3], width)
    k_1SGJd, v_1SGJd = (x.transpose(0, 1)[None, :, :, None].expand(shape) for x in (k_GSd, v_GSd))
    biases = fmha.attn_bias
    if window is None:
        bias = biases.LowerTriangularFromBottomRightMask()
    else:
        bias = biases.LowerTriangularFromBottomRightLocalAttentionMask(window)
    o_1TGJd: Tensor = fmha.memory_efficient_attention_forward(q_1TGJd, k_1SGJd, v_1SGJd, bias, scale=scale)
    return o_1TGJd.reshape(q_THd.shape)
