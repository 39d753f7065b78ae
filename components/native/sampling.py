"""Tokens drawn by the native kernels (sampling.c): PyTorch takes a dozen passes over the logits, and sorts them."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.components import native

ENTRY = 8
"""Bytes in which a row's tokens are sorted, each: its logit and its id."""


def runs(logits_RV: Tensor) -> bool:
    """Whether `draw` takes these: float32 on a CPU, each row's side by side."""
    return (
        logits_RV.dtype is torch.float32
        and logits_RV.device.type == "cpu"
        and logits_RV.stride(-1) == 1
        and native.missing() is None
    )


def draw(logits_RV: Tensor, settings_5R: Tensor | None) -> Tensor:
    """One token id per row, (R,) int64. A row's does not depend on the others. See `zoo.engine.sampler.choose`.

    settings_5R: float64, without gaps: temperature (0 takes the likeliest token), top_k (infinite for all),
    top_p, min_p and the uniform number. None where every row takes the likeliest.
    """
    (rows, vocabulary), threads = logits_RV.shape, torch.get_num_threads()
    tokens_R = torch.empty(rows, dtype=torch.int64)
    room = None if settings_5R is None else torch.empty(min(rows, threads) * vocabulary * ENTRY, dtype=torch.uint8)
    places = [None if tensor is None else tensor.data_ptr() for tensor in (settings_5R, tokens_R, room)]
    sizes = (rows, vocabulary, logits_RV.data_ptr(), logits_RV.stride(0))
    native.library().handle.zoo_draw(*sizes, *places, threads)
    return tokens_R
