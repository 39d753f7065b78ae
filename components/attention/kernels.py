"""Causal attention of one sequence's new rows over its keys: one dispatch, every kernel behind it.

The last T of the S keys belong to the T rows themselves; `past` = S - T keys stand before them. Row t sees keys
0 .. past + t, with a window w only the last w of these.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.components.attention.memory_efficient import memory_efficient
from zoo.components.attention.paged import can_attend
from zoo.components.native import prompts
from zoo.registry.errors import ZooError, nearest

BLOCK = 256
"""Rows that windowed attention takes at once, where its window is not larger."""

FEW = 16
"""Rows up to which query heads are laid below one another on their key head."""

Memo = dict[Hashable, Any]
Kernel = Callable[[Tensor, Tensor, Tensor, float, int, int | None, Memo], Tensor]


class Scores(TypedDict):
    """How scores are made: scaled, masked but for the last `window` keys, bounded smoothly by `softcap`.

    sinks_H: a further score of each query head that no value belongs to, so that weights add up to less than one.
    """

    scale: float
    window: int | None
    softcap: float | None
    sinks_H: Tensor | None


def attention(
    q_THd: Tensor,
    k_GSd: Tensor,
    v_GSd: Tensor,
    *,
    scale: float,
    past: int,
    window: int | None,
    memo: Memo | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """(T, H, d) of queries over (G, S, d) keys and values; H is a multiple of G and S = past + T.

    `memo` keeps masks, and the choice of a kernel, between the layers of a step. ZOO_ATTENTION forces a kernel;
    raises ZooError for a name that is none. Scores with a `softcap` or sinks are computed by the formula: no kernel of
    prompts has them.
    """
    memo = {} if memo is None else memo
    how: Scores = {"scale": scale, "window": window, "softcap": softcap, "sinks_H": sinks_H}
    if window is not None:
        k_GSd, v_GSd, past = _trimmed(k_GSd, v_GSd, past, window)
        if q_THd.shape[0] >= max(window, BLOCK) + prompts.FEWEST:
            return _in_blocks(q_THd, k_GSd, v_GSd, past, memo, how)
        if past + q_THd.shape[0] <= window:
            how["window"] = window = None
    if softcap is not None or sinks_H is not None:
        if q_THd.shape[0] >= max(window or 0, BLOCK) + prompts.FEWEST:
            return _in_blocks(q_THd, k_GSd, v_GSd, past, memo, how)
        return reference(q_THd, k_GSd, v_GSd, scale, past, window, memo, softcap, sinks_H)
    return _kernel(memo)(q_THd, k_GSd, v_GSd, scale, past, window, memo)


def attention_rows(
    q_BHd: Tensor,
    k_BGSd: Tensor,
    v_BGSd: Tensor,
    *,
    scale: float,
    seen_BS: Tensor,
    memo: Memo,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """(B, H, d): one new row of each of B sequences, over its own keys as far as `seen_BS` is true.

    By SDPA, also where ZOO_ATTENTION says "xformers": single rows need no mask of its kind. By the formula in
    float32 where it says "reference", or with a `softcap` or sinks.
    """
    exact = _kernel(memo) is reference or softcap is not None or sinks_H is not None
    q, k, v = (x.float() if exact else x for x in (q_BHd, k_BGSd, v_BGSd))
    q_BGJd = q.view(len(q), k.shape[1], -1, q.shape[-1])
    seen_B11S = seen_BS[:, None, None]
    if not exact:
        return F.scaled_dot_product_attention(q_BGJd, k, v, attn_mask=seen_B11S, scale=scale).view(q_BHd.shape)
    scores_BGJS = _capped(q_BGJd @ k.transpose(-1, -2) * scale, softcap).masked_fill(~seen_B11S, float("-inf"))
    sinks = None if sinks_H is None else sinks_H.view(k.shape[1], -1, 1)
    return (_shares(scores_BGJS, sinks) @ v).view(q_BHd.shape).to(q_BHd.dtype)


def attention_chosen(
    q_THd: Tensor, k_GSd: Tensor, v_GSd: Tensor, *, scale: float, seen_TS: Tensor, memo: Memo
) -> Tensor:
    """(T, H, d): attention in which each row sees the keys where `seen_TS` is true, and no others.

    By SDPA, or by the formula in float32 where ZOO_ATTENTION says "reference".
    """
    rows, groups = len(q_THd), len(k_GSd)
    if _kernel(memo) is reference:
        q_GJTd = q_THd.float().view(rows, groups, -1, q_THd.shape[-1]).permute(1, 2, 0, 3)
        scores_GJTS = q_GJTd @ k_GSd.float().unsqueeze(1).transpose(-1, -2) * scale
        o_GJTd = scores_GJTS.masked_fill(~seen_TS, float("-inf")).softmax(-1) @ v_GSd.float().unsqueeze(1)
        return o_GJTd.permute(2, 0, 1, 3).reshape(q_THd.shape).to(q_THd.dtype)
    q_1HTd, k_1GSd, v_1GSd = q_THd.transpose(0, 1).unsqueeze(0), k_GSd.unsqueeze(0), v_GSd.unsqueeze(0)
    shared = q_THd.shape[1] != groups
    o_1HTd = F.scaled_dot_product_attention(q_1HTd, k_1GSd, v_1GSd, attn_mask=seen_TS, scale=scale, enable_gqa=shared)
    return o_1HTd[0].transpose(0, 1)


def _trimmed(k_GSd: Tensor, v_GSd: Tensor, past: int, window: int) -> tuple[Tensor, Tensor, int]:
    """Without the keys that even the first row does not see."""
    unseen = past - window + 1
    return (k_GSd, v_GSd, past) if unseen <= 0 else (k_GSd[:, unseen:], v_GSd[:, unseen:], past - unseen)


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _shares(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """The softmax over the keys, and over a sink that takes its share and is dropped."""
    if sinks is None:
        return scores.softmax(-1)
    return (scores - torch.logaddexp(scores.logsumexp(-1, keepdim=True), sinks.float())).exp()


def _in_blocks(q_THd: Tensor, k_GSd: Tensor, v_GSd: Tensor, past: int, memo: Memo, how: Scores) -> Tensor:
    """Block by block: rows need the keys of their own block and of one window before it, not a mask of T by S."""
    blocks = []
    rows, size = len(q_THd), max(how["window"] or 0, BLOCK)
    # A rest of few rows goes with the block before it: few rows may be computed in another way.
    for start in range(0, rows - prompts.FEWEST + 1, size):
        q_block = q_THd[start : start + size if rows - start >= size + prompts.FEWEST else rows]
        end = past + start + len(q_block)
        blocks.append(attention(q_block, k_GSd[:, :end], v_GSd[:, :end], past=past + start, memo=memo, **how))
    return torch.cat(blocks)


def reference(
    q_THd: Tensor,
    k_GSd: Tensor,
    v_GSd: Tensor,
    scale: float,
    past: int,
    window: int | None,
    memo: Memo,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """The formula in float32."""
    rows, groups = len(q_THd), len(k_GSd)
    q_GJTd = q_THd.float().view(rows, groups, -1, q_THd.shape[-1]).permute(1, 2, 0, 3)
    scores_GJTS = q_GJTd @ k_GSd.float().unsqueeze(1).transpose(-1, -2) * scale
    scores_GJTS = _capped(scores_GJTS, softcap).masked_fill(~visible(rows, past, window, q_THd.device), float("-inf"))
    sinks = None if sinks_H is None else sinks_H.view(groups, -1, 1, 1)
    o_GJTd = _shares(scores_GJTS, sinks) @ v_GSd.float().unsqueeze(1)
    return o_GJTd.permute(2, 0, 1, 3).reshape(q_THd.shape).to(q_THd.dtype)


def sdpa(
    q_THd: Tensor, k_GSd: Tensor, v_GSd: Tensor, scale: float, past: int, window: int | None, memo: Memo
) -> Tensor:
    """PyTorch's fused attention. Few rows are sent as rows of their key head, so that keys are read once, not J times.

    On a CPU that is two to seven times faster for one row to eight; from some twenty rows on it is the same.
    """
    rows, heads, width = q_THd.shape
    groups = len(k_GSd)
    q_HTd, k_1GSd, v_1GSd = q_THd.transpose(0, 1), k_GSd.unsqueeze(0), v_GSd.unsqueeze(0)
    if rows <= FEW:
        q_1GNd = q_HTd.reshape(1, groups, -1, width)
        mask = None if rows == 1 else _mask(q_THd, past, window, heads // groups, memo)
        o_1GNd = F.scaled_dot_product_attention(q_1GNd, k_1GSd, v_1GSd, attn_mask=mask, scale=scale)
        return o_1GNd.reshape(heads, rows, width).transpose(0, 1)
    causal = past == 0 and window is None
    mask = None if causal else _many_rows(q_THd, past, window, memo)
    o_1HTd = F.scaled_dot_product_attention(
        q_HTd.unsqueeze(0), k_1GSd, v_1GSd, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=heads != groups
    )
    return o_1HTd[0].transpose(0, 1)


def visible(rows: int, past: int, window: int | None, device: torch.device) -> Tensor:
    """Which of the keys each row sees, (T, S) bool."""
    ones_TS = torch.ones(rows, past + rows, dtype=torch.bool, device=device)
    seen_TS = ones_TS.tril(past)
    return seen_TS if window is None else seen_TS.triu(past - window + 1)


def _many_rows(q_THd: Tensor, past: int, window: int | None, memo: Memo) -> Tensor | None:
    """The mask of a chunk of a prompt; on CUDA one that is never written out, where no window cuts it."""
    if q_THd.is_cuda and window is None:
        # Brings PyTorch's compiler with it: half a second and 130 MB that no CPU needs.
        from torch.nn.attention.bias import causal_lower_right

        return causal_lower_right(len(q_THd), past + len(q_THd))
    return _mask(q_THd, past, window, 1, memo)


def _mask(q_THd: Tensor, past: int, window: int | None, copies: int, memo: Memo) -> Tensor:
    """`visible` as an addend in q's dtype, for `copies` heads one below the other."""
    key = ("mask", len(q_THd), past, window, copies)
    if key not in memo:
        hidden_TS = ~visible(len(q_THd), past, window, q_THd.device).repeat(copies, 1)
        zeros_TS = torch.zeros(hidden_TS.shape, dtype=q_THd.dtype, device=q_THd.device)
        memo[key] = zeros_TS.masked_fill_(hidden_TS, float("-inf"))
    mask: Tensor = memo[key]
    return mask


def automatic(
    q_THd: Tensor, k_GSd: Tensor, v_GSd: Tensor, scale: float, past: int, window: int | None, memo: Memo
) -> Tensor:
    """Many rows on a CPU by the native kernels where these can, everything else by PyTorch's attention."""
    if prompts.attends(q_THd, k_GSd, v_GSd):
        return prompts.attend(q_THd, k_GSd, v_GSd, scale, window)
    return sdpa(q_THd, k_GSd, v_GSd, scale, past, window, memo)


KERNELS: dict[str, Kernel] = {"auto": automatic, "reference": reference, "sdpa": sdpa, "xformers": memory_efficient}
"""By name, as ZOO_ATTENTION says it. "auto" also reads single rows' keys straight from slabs or pages where it can."""


def by_slabs(memo: Memo) -> bool:
    """Whether single rows are attended to by the kernel of zoo.components.native.attention, where it runs."""
    return _automatic(memo)


def by_pages(q_BHd: Tensor, pool: Tensor, memo: Memo) -> bool:
    """Whether single rows are attended to by the kernel of zoo.components.attention.paged."""
    return _automatic(memo) and can_attend(q_BHd, pool)


def _automatic(memo: Memo) -> bool:
    if "automatic" not in memo:
        memo["automatic"] = os.environ.get("ZOO_ATTENTION", "auto") == "auto"
    return bool(memo["automatic"])


def _kernel(memo: Memo) -> Kernel:
    if "kernel" not in memo:
        memo["kernel"] = KERNELS[chosen()]
    kernel: Kernel = memo["kernel"]
    return kernel


def chosen() -> str:
    """The kernel's name by ZOO_ATTENTION. Raises ZooError for one that is not known."""
    name = os.environ.get("ZOO_ATTENTION", "auto")
    if name not in KERNELS:
        raise ZooError(
            "unknown attention kernel",
            where="ZOO_ATTENTION",
            found=repr(name),
            expected=" or ".join(repr(known) for known in KERNELS),
            hint=nearest(name, KERNELS),
        )
    return name
