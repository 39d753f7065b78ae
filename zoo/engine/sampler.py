"""Logits -> tokens. Each row's token depends on its own logits, params and uniform number, never on other rows.

Letters: R rows, V vocabulary, C candidates (the likeliest tokens, best first).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.components.native import sampling
from zoo.engine.request import SamplingParams

CANDIDATES = 64
"""So many tokens are sorted at first; all are for rows whose filters keep more."""

BLOCK = 128
"""Tokens whose weights are added up, and compared, before any is looked at by itself."""

FEW = 32
"""Tokens of a block when the likeliest ones are looked for."""


def choose(logits_RV: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """One token id per row, (R,) int64, by inverse transform of `uniforms` (each in [0, 1)).

    logits_RV: float32, finite. Greedy rows take the likeliest token. Rows without filters go through the
    distribution in the order of ids; rows with top_k, top_p or min_p from the likeliest token on.
    """
    kinds = [_kind(p) for p in params]
    if sampling.runs(logits_RV):
        return sampling.draw(logits_RV, _settings(params, uniforms, logits_RV) if any(kinds) else None)
    if not any(kinds):
        return likeliest(logits_RV)
    tokens_R = torch.empty(len(params), dtype=torch.int64, device=logits_RV.device)
    for kind, draw in enumerate((_greedy, _plain, _filtered)):
        chosen = [row for row, k in enumerate(kinds) if k == kind]
        if chosen:
            index = torch.tensor(chosen, device=logits_RV.device)
            settings = _settings([params[r] for r in chosen], [uniforms[r] for r in chosen], logits_RV)
            tokens_R[index] = draw(logits_RV[index] if len(chosen) < len(params) else logits_RV, settings)
    return tokens_R


def likeliest(logits_RV: Tensor) -> Tensor:
    """The id of each row's likeliest token, (R,), of equal ones the first: on a CPU by its block, a fourth of the time
    that argmax takes."""
    if logits_RV.device.type != "cpu":
        return logits_RV.argmax(-1)
    blocks_RNC = _blocks(logits_RV, -torch.inf)
    block_R = blocks_RNC.amax(-1).argmax(-1)
    within_R = blocks_RNC[torch.arange(len(block_R)), block_R].argmax(-1)
    return block_R * BLOCK + within_R


def ranked(logits_RV: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and ids (R, C) of the `count` likeliest tokens, best first, equal ones by id; how many (R,) are certain.

    Which of several equal tokens topk lets in at its edge is not defined: those are not certain.
    """
    if count >= logits_RV.shape[-1]:
        values_RV, ids_RV = logits_RV.sort(dim=-1, descending=True, stable=True)
        return values_RV, ids_RV, torch.full((len(ids_RV),), ids_RV.shape[-1], device=ids_RV.device)
    values_RC, ids_RC = _largest(logits_RV, count)
    ids_RC, by_id = ids_RC.sort(dim=-1)
    values_RC, by_value = values_RC.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
    return values_RC, ids_RC.gather(-1, by_value), (values_RC > values_RC[:, -1:]).sum(-1)


def _largest(logits_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What topk gives. On a CPU only the blocks are looked at whose own largest are among the largest."""
    if logits_RV.device.type != "cpu" or logits_RV.shape[-1] < 4 * count * FEW:
        return logits_RV.topk(count, dim=-1)
    blocks_RNC = _blocks(logits_RV, -torch.inf, FEW)
    block_RC = blocks_RNC.amax(-1).topk(count, dim=-1, sorted=False).indices
    inside_RL = blocks_RNC.gather(1, block_RC.unsqueeze(-1).expand(-1, -1, FEW)).flatten(1)
    values_RC, places_RC = inside_RL.topk(count, dim=-1)
    return values_RC, block_RC.gather(-1, places_RC // FEW) * FEW + places_RC % FEW


def best(logits_RV: Tensor, count: int) -> Tensor:
    """The ids (R, count) of the likeliest tokens, best first, equal ones by id."""
    _, ids_RC, certain_R = ranked(logits_RV, count + 64)
    if bool((certain_R < count).any()):
        _, ids_RC, _ = ranked(logits_RV, logits_RV.shape[-1])
    return ids_RC[:, :count]


def _kind(params: SamplingParams) -> int:
    """0 greedy, 1 the whole distribution, 2 filtered."""
    if params.greedy:
        return 0
    return 2 if params.top_k or params.top_p < 1 or params.min_p else 1


def _settings(params: Sequence[SamplingParams], uniforms: Sequence[float], logits_RV: Tensor) -> Tensor:
    """Rows of (temperature, top_k, top_p, min_p, uniform) as columns, (5, R, 1) float64. Temperature 0 is greedy, an
    infinite top_k keeps all."""
    columns = [
        [0.0 if p.greedy else p.temperature for p in params],
        [float(p.top_k or torch.inf) for p in params],
        [p.top_p for p in params],
        [p.min_p for p in params],
        [*uniforms],
    ]
    return torch.tensor(columns, dtype=torch.float64, device=logits_RV.device)[:, :, None]


def _weights(logits_RV: Tensor, temperature_R1: Tensor) -> Tensor:
    """Probabilities relative to the likeliest token's, float32: no temperature can overflow them."""
    return (logits_RV - logits_RV.amax(-1, keepdim=True)).div_(_steepness(temperature_R1)).exp_()


def _steepness(temperature_R1: Tensor) -> Tensor:
    return temperature_R1.clamp(min=1e-30).float()


def _greedy(logits_RV: Tensor, settings: Tensor) -> Tensor:
    return likeliest(logits_RV)


def _plain(logits_RV: Tensor, settings: Tensor) -> Tensor:
    """First the block of tokens in which the uniform number falls, then the token: two short sums for a long one."""
    weights_RNC = _blocks(_weights(logits_RV, settings[0]))
    ends_RN = weights_RNC.sum(-1).cumsum(-1, dtype=torch.float64)
    goal_R1 = settings[4].clamp(max=1 - 1e-15) * ends_RN[:, -1:]
    block_R1 = torch.searchsorted(ends_RN, goal_R1, right=True).clamp(max=ends_RN.shape[-1] - 1)
    before_R1 = F.pad(ends_RN, (1, 0)).gather(-1, block_R1)
    index_R1C = block_R1.unsqueeze(-1).expand(-1, -1, BLOCK)
    sums_RC = weights_RNC.gather(1, index_R1C)[:, 0].cumsum(-1, dtype=torch.float64)
    # The two sums round differently: the token is one of the block, and one that has weight.
    rest_R1 = torch.minimum((goal_R1 - before_R1).clamp(min=0), sums_RC[:, -1:] * (1 - 1e-15))
    token_R1 = block_R1 * BLOCK + torch.searchsorted(sums_RC, rest_R1, right=True)
    return token_R1.clamp(max=logits_RV.shape[-1] - 1)[:, 0]


def _blocks(x_RV: Tensor, filling: float = 0.0, size: int = BLOCK) -> Tensor:
    """(R, V) as (R, N, size), filled up."""
    missing = -x_RV.shape[-1] % size
    blocks_RNC: Tensor = (F.pad(x_RV, (0, missing), value=filling) if missing else x_RV).unflatten(-1, (-1, size))
    return blocks_RNC


def _filtered(logits_RV: Tensor, settings: Tensor) -> Tensor:
    vocabulary, top_k = logits_RV.shape[-1], settings[1]
    everything_R1 = None
    if bool((top_k >= vocabulary).any()):
        everything_R1 = _blocks(_weights(logits_RV, settings[0])).sum(-1).sum(-1, keepdim=True, dtype=torch.float64)
    values_RC, ids_RC, certain_R = ranked(logits_RV, CANDIDATES)
    place_R1, kept_R1 = _place(values_RC, everything_R1, vocabulary, settings)
    tokens_R = ids_RC.gather(-1, place_R1)[:, 0]
    # A share of the top k needs all k; else what is kept must be certain, and its end seen.
    needed_R1 = torch.where((values_RC.shape[-1] < top_k) & (top_k < vocabulary), top_k, kept_R1)
    left = (needed_R1[:, 0] > certain_R).nonzero()[:, 0]
    if len(left):
        tokens_R[left] = _of_all(logits_RV[left], settings[:, left])
    return tokens_R


def _of_all(logits_RV: Tensor, settings: Tensor) -> Tensor:
    """The sampled ids (R,) where any number of tokens may be kept. Sorted are logits alone: numpy does that on a CPU in
    a fifteenth of the time that sorting with ids takes."""
    rising_RV = _rising(-logits_RV)
    place_R1, _ = _place(-rising_RV, None, logits_RV.shape[-1], settings)
    value_R1 = rising_RV.gather(-1, place_R1)
    # Of equal tokens, those behind the first ones by id.
    nth_R1 = place_R1 - torch.searchsorted(rising_RV, value_R1)
    equals_RV = (-logits_RV == value_R1).cumsum(-1)
    return torch.searchsorted(equals_RV, nth_R1 + 1).clamp(max=logits_RV.shape[-1] - 1)[:, 0]


def _rising(x_RV: Tensor) -> Tensor:
    if x_RV.device.type != "cpu":
        return x_RV.sort(dim=-1).values
    return torch.from_numpy(numpy.sort(x_RV.numpy(), axis=-1))


def _place(values_RC: Tensor, everything_R1: Tensor | None, vocabulary: int, settings: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the likeliest tokens is drawn, (R, 1), and how many of them are kept, (R, 1).

    values_RC: their logits, best first. everything_R1: what all tokens weigh; None where these are all, or where no row
    asks for it. Each filter keeps a beginning of them, so all of them together keep the shortest.
    """
    temperature, top_k, top_p, min_p, uniform = settings
    count = values_RC.shape[-1]
    weights_RC = (values_RC - values_RC[:, :1]).div_(_steepness(temperature)).exp_()
    sums_RC = weights_RC.cumsum(-1, dtype=torch.float64)
    by_k_R1 = top_k.clamp(max=count).long()
    total_R1 = sums_RC.gather(-1, by_k_R1 - 1)
    if everything_R1 is not None:
        total_R1 = torch.where(top_k < vocabulary, total_R1, everything_R1)
    by_p_R1 = torch.searchsorted(sums_RC, top_p * total_R1) + 1
    by_p_R1 = torch.where(top_p < 1, by_p_R1, count)
    by_weight_R1 = (weights_RC >= min_p).sum(-1, keepdim=True)
    # Of a row that is not finite no token weighs anything: it gets one all the same, which nobody will take.
    kept_R1 = torch.minimum(torch.minimum(by_k_R1, by_p_R1), by_weight_R1).clamp(min=1)
    goal_R1 = uniform * sums_RC.gather(-1, kept_R1 - 1)
    return torch.minimum(torch.searchsorted(sums_RC, goal_R1, right=True), kept_R1 - 1), kept_R1
