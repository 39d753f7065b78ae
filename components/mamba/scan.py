"""Linear recurrences over time: chunked for prompts, one step for decoding, and token by token as references.

All in float32. With step sizes dt > 0 and A < 0, for each channel of a head

    state_t = exp(dt_t A) state_t-1 + dt_t x_t B_t        y_t = C_t . state_t

Letters as in docs/shapes.md: T packed tokens, B sequences, H query heads, d head size, n size of a channel's state.
A state of None is one before any token.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 64
"""Tokens that `ssd` takes at once: its work per token grows with them, the work per chunk does not."""

BUSY = {"cpu": 1 << 14}
OTHER_BUSY = 1 << 24
"""Elements of a state that keep a device busy: with fewer, more pieces of a sequence run at once."""


def ssd(
    a_H: Tensor, state_BWn: Tensor | None, x_BTHd: Tensor, dt_BTH: Tensor, b_BTGn: Tensor, c_BTGn: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, H, d) and the state after them, for heads of one decay each (arXiv 2405.21060, section 6)."""
    state_BHdn = _heads(state_BWn, x_BTHd, b_BTGn)
    if x_BTHd.shape[1] == 1:
        y_BHd, state_BHdn = _ssd_step(a_H, state_BHdn, x_BTHd[:, 0], dt_BTH[:, 0], b_BTGn[:, 0], c_BTGn[:, 0])
        return y_BHd.unsqueeze(1), state_BHdn.flatten(1, 2)
    parts = []
    length = CHUNK * max(1, _busy(state_BHdn) // state_BHdn.numel())
    for piece in zip(*(rows.split(length, dim=1) for rows in (x_BTHd, dt_BTH, b_BTGn, c_BTGn)), strict=True):
        y_BTHd, state_BHdn = _ssd_chunks(a_H, state_BHdn, *piece)
        parts.append(y_BTHd)
    return torch.cat(parts, dim=1), state_BHdn.flatten(1, 2)


def ssd_reference(
    a_H: Tensor, state_BWn: Tensor | None, x_BTHd: Tensor, dt_BTH: Tensor, b_BTGn: Tensor, c_BTGn: Tensor
) -> tuple[Tensor, Tensor]:
    """As `ssd`, by the formula above."""
    state_BHdn, parts = _heads(state_BWn, x_BTHd, b_BTGn), []
    for x_BHd, dt_BH, b_BGn, c_BGn in zip(*(r.unbind(1) for r in (x_BTHd, dt_BTH, b_BTGn, c_BTGn)), strict=True):
        y_BHd, state_BHdn = _ssd_step(a_H, state_BHdn, x_BHd, dt_BH, b_BGn, c_BGn)
        parts.append(y_BHd)
    return torch.stack(parts, dim=1), state_BHdn.flatten(1, 2)


def selective(
    a_Wn: Tensor, state_BWn: Tensor | None, x_BTW: Tensor, dt_BTW: Tensor, b_BTn: Tensor, c_BTn: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, W) and the state after them, for channels with decays of their own (arXiv 2312.00752).

    A sequence is cut into pieces that run side by side as if nothing came before them. Then each gets the state
    that the one before it left, and what that state adds to its outputs.
    """
    if state_BWn is None:
        state_BWn = x_BTW.new_zeros(x_BTW.shape[0], *a_Wn.shape)
    rows = x_BTW.shape[1]
    pieces = _pieces(rows, state_BWn)
    length = -(-rows // pieces)
    x_BPTW, dt_BPTW, b_BPTn, c_BPTn = (_cut(value, pieces, length) for value in (x_BTW, dt_BTW, b_BTn, c_BTn))
    state_BPWn = F.pad(state_BWn.unsqueeze(1), (0, 0, 0, 0, 0, pieces - 1))
    parts = []
    for t in range(length):
        dt_BPW1 = dt_BPTW[:, :, t].unsqueeze(-1)
        input_BPWn = (dt_BPW1[..., 0] * x_BPTW[:, :, t]).unsqueeze(-1) * b_BPTn[:, :, t].unsqueeze(-2)
        state_BPWn = torch.addcmul(input_BPWn, torch.exp(dt_BPW1 * a_Wn), state_BPWn)
        parts.append((state_BPWn @ c_BPTn[:, :, t].unsqueeze(-1)).squeeze(-1))
    y_BPTW = torch.stack(parts, dim=2)
    if pieces > 1:
        y_BPTW, state_BPWn = _joined(a_Wn, state_BPWn, y_BPTW, dt_BPTW.cumsum(2), c_BPTn)
    return y_BPTW.flatten(1, 2)[:, :rows], state_BPWn[:, -1]


def selective_reference(
    a_Wn: Tensor, state_BWn: Tensor | None, x_BTW: Tensor, dt_BTW: Tensor, b_BTn: Tensor, c_BTn: Tensor
) -> tuple[Tensor, Tensor]:
    """As `selective`, by the formula above."""
    state = x_BTW.new_zeros(x_BTW.shape[0], *a_Wn.shape) if state_BWn is None else state_BWn
    parts = []
    for x_BW, dt_BW, b_Bn, c_Bn in zip(*(r.unbind(1) for r in (x_BTW, dt_BTW, b_BTn, c_BTn)), strict=True):
        decay_BWn = torch.exp(dt_BW[:, :, None] * a_Wn)
        state = decay_BWn * state + (dt_BW * x_BW)[:, :, None] * b_Bn[:, None, :]
        parts.append((state * c_Bn[:, None, :]).sum(-1))
    return torch.stack(parts, dim=1), state


def segment_sums(a_BHT: Tensor) -> Tensor:
    """The sum of a over source + 1 .. target, (B, H, source, target); minus infinity where the source comes later.

    Added up for each source by itself: the difference of two long sums would lose what lies between them.
    """
    rows = a_BHT.shape[-1]
    later = torch.ones(rows, rows, dtype=torch.bool, device=a_BHT.device).triu(1)
    sums = a_BHT.unsqueeze(-2).expand(*a_BHT.shape, rows).masked_fill(~later, 0).cumsum(-1)
    return sums.masked_fill(later.t(), -torch.inf)


def _heads(state_BWn: Tensor | None, x_BTHd: Tensor, b_BTGn: Tensor) -> Tensor:
    """The state as (B, H, d, n)."""
    heads = x_BTHd.shape[2:]
    if state_BWn is None:
        return x_BTHd.new_zeros(x_BTHd.shape[0], *heads, b_BTGn.shape[-1])
    state_BHdn: Tensor = state_BWn.unflatten(1, heads)
    return state_BHdn


def _ssd_step(
    a_H: Tensor, state_BHdn: Tensor, x_BHd: Tensor, dt_BH: Tensor, b_BGn: Tensor, c_BGn: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of each sequence: (B, H, d), and the state after it."""
    shared = x_BHd.shape[1] // b_BGn.shape[1]
    b_BHn, c_BHn = (value.repeat_interleave(shared, dim=1) for value in (b_BGn, c_BGn))
    decay_BH11 = torch.exp(dt_BH * a_H)[:, :, None, None]
    input_BHd1 = (dt_BH.unsqueeze(-1) * x_BHd).unsqueeze(-1)
    state_BHdn = torch.addcmul(state_BHdn * decay_BH11, input_BHd1, b_BHn.unsqueeze(2))
    return (state_BHdn @ c_BHn.unsqueeze(-1)).squeeze(-1), state_BHdn


def _ssd_chunks(
    a_H: Tensor, state_BHdn: Tensor, x_BTHd: Tensor, dt_BTH: Tensor, b_BTGn: Tensor, c_BTGn: Tensor
) -> tuple[Tensor, Tensor]:
    """Chunks side by side: each chunk's outputs from its own tokens as masked attention, and from the state before it.

    The sequence is filled up to whole chunks: a step of size zero keeps the state.
    """
    batch, rows, groups = *x_BTHd.shape[:2], b_BTGn.shape[2]
    shared, size = x_BTHd.shape[2] // groups, min(rows, CHUNK)
    x_NTHd, dt_NTH, b_NTGn, c_NTGn = (_chunks(value, size) for value in (x_BTHd, dt_BTH, b_BTGn, c_BTGn))
    a_NHT = (dt_NTH * a_H).transpose(1, 2)
    decay_NHTT = torch.exp(segment_sums(a_NHT))
    start_NHT1 = torch.exp(a_NHT.cumsum(-1)).unsqueeze(-1)
    input_NHTd = (x_NTHd * dt_NTH.unsqueeze(-1)).transpose(1, 2)
    b_NGTn, c_NGTn = b_NTGn.transpose(1, 2), c_NTGn.transpose(1, 2)
    scores_NGTT = b_NGTn @ c_NGTn.transpose(2, 3)
    weights_NHTT = (decay_NHTT.unflatten(1, (groups, shared)) * scores_NGTT.unsqueeze(2)).flatten(1, 2)
    b_NHTn, c_NHTn = (value.repeat_interleave(shared, dim=1) for value in (b_NGTn, c_NGTn))
    y_NHTd = weights_NHTT.transpose(2, 3) @ input_NHTd
    added_NHdn = (input_NHTd * decay_NHTT[..., -1:]).transpose(2, 3) @ b_NHTn
    before_NHdn, state_BHdn = _passed_on(state_BHdn, start_NHT1[:, :, -1:], added_NHdn)
    y_NHTd = torch.addcmul(y_NHTd, start_NHT1, c_NHTn @ before_NHdn.transpose(2, 3))
    return y_NHTd.transpose(1, 2).unflatten(0, (batch, -1)).flatten(1, 2)[:, :rows], state_BHdn


def _chunks(rows_BT: Tensor, size: int) -> Tensor:
    """(B, T, ...) as chunks of `size` rows, (N, T, ...), zeros at the end of a sequence."""
    missing = -rows_BT.shape[1] % size
    if missing:
        rows_BT = torch.cat((rows_BT, rows_BT.new_zeros(rows_BT.shape[0], missing, *rows_BT.shape[2:])), dim=1)
    chunks_NT: Tensor = rows_BT.unflatten(1, (-1, size)).flatten(0, 1)
    return chunks_NT


def _passed_on(state_BHdn: Tensor, kept_NH11: Tensor, added_NHdn: Tensor) -> tuple[Tensor, Tensor]:
    """The state before each chunk, (N, H, d, n), and after the last: a chunk keeps a share of it and adds its own."""
    kept, added = (value.unflatten(0, (len(state_BHdn), -1)).unbind(1) for value in (kept_NH11, added_NHdn))
    before = []
    for share_BH11, more_BHdn in zip(kept, added, strict=True):
        before.append(state_BHdn)
        state_BHdn = torch.addcmul(more_BHdn, state_BHdn, share_BH11)
    return torch.stack(before, dim=1).flatten(0, 1), state_BHdn


def _busy(state: Tensor) -> int:
    return BUSY.get(state.device.type, OTHER_BUSY)


def _pieces(rows: int, state_BWn: Tensor) -> int:
    """How many pieces of a sequence run side by side: more steps than pieces, and no more than the device can use."""
    return max(1, min(isqrt(rows), _busy(state_BWn) // state_BWn.numel()))


def _cut(rows_BTW: Tensor, pieces: int, length: int) -> Tensor:
    """(B, T, W) as (B, P, T, W); zeros at the end change nothing, for a step of size zero keeps the state."""
    padding = pieces * length - rows_BTW.shape[1]
    cut_BPTW: Tensor = F.pad(rows_BTW, (0, 0, 0, padding)).unflatten(1, (pieces, length))
    return cut_BPTW


def _joined(
    a_Wn: Tensor, ends_BPWn: Tensor, y_BPTW: Tensor, passed_BPTW: Tensor, c_BPTn: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs and last states of the pieces with what came before them. passed: the sum of steps since a piece began.

    The first piece had its past from the beginning.
    """
    ends = [ends_BPWn[:, 0]]
    for piece in range(1, ends_BPWn.shape[1]):
        decay_BWn = torch.exp(passed_BPTW[:, piece, -1].unsqueeze(-1) * a_Wn)
        ends.append(torch.addcmul(ends_BPWn[:, piece], decay_BWn, ends[-1]))
    before_BPWn = torch.stack(ends[:-1], dim=1)
    parts = []
    for t in range(y_BPTW.shape[2]):
        left_BPWn = torch.exp(passed_BPTW[:, 1:, t].unsqueeze(-1) * a_Wn) * before_BPWn
        parts.append((left_BPWn @ c_BPTn[:, 1:, t].unsqueeze(-1)).squeeze(-1))
    later_BPTW = y_BPTW[:, 1:] + torch.stack(parts, dim=2)
    return torch.cat((y_BPTW[:, :1], later_BPTW), dim=1), torch.stack(ends, dim=1)
