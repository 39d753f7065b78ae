"""Logits -> tokens. Each row's token depends on its own logits, params and uniform number, never on other rows.

Letters: R rows, V vocabulary, C candidates (the likeliest tokens, best first).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.engine.request import SamplingParams

# So many tokens are sorted at first, then for rows whose filters keep more; at last all are.
CANDIDATES = (64, 1024)

BLOCK = 128
"""Tokens whose weights are added up before any is looked at by itself."""


def choose(logits_RV: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """One token id per row, (R,) int64, by inverse transform of `uniforms` (each in [0, 1)).

    logits_RV: float32, finite. Greedy rows take the likeliest token. Rows without filters go through the
    distribution in the order of ids; rows with top_k, top_p or min_p from the likeliest token on.
    """
    kinds = [_kind(p) for p in params]
    if not any(kinds):
        return logits_RV.argmax(-1)
    tokens_R = torch.empty(len(params), dtype=torch.int64, device=logits_RV.device)
    for kind, draw in enumerate((_greedy, _plain, _filtered)):
        chosen = [row for row, k in enumerate(kinds) if k == kind]
        if chosen:
            index = torch.tensor(chosen, device=logits_RV.device)
            settings = _settings([params[r] for r in chosen], [uniforms[r] for r in chosen], logits_RV)
            tokens_R[index] = draw(logits_RV[index] if len(chosen) < len(params) else logits_RV, settings)
    return tokens_R


def ranked(logits_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ids (R, C) of the `count` likeliest tokens, best first, equal ones by id; and how many (R,) are certain.

    Which of several equal tokens topk lets in at its edge is not defined: those are not certain.
    """
    if count >= logits_RV.shape[-1]:
        ids_RV = logits_RV.sort(dim=-1, descending=True, stable=True).indices
        return ids_RV, torch.full((len(ids_RV),), ids_RV.shape[-1], device=ids_RV.device)
    values_RC, ids_RC = logits_RV.topk(count, dim=-1)
    ids_RC, by_id = ids_RC.sort(dim=-1)
    values_RC, by_value = values_RC.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
    return ids_RC.gather(-1, by_value), (values_RC > values_RC[:, -1:]).sum(-1)


def best(logits_RV: Tensor, count: int) -> Tensor:
    """The ids (R, count) of the likeliest tokens, best first, equal ones by id."""
    ids_RC, certain_R = ranked(logits_RV, count + 64)
    if bool((certain_R < count).any()):
        ids_RC, _ = ranked(logits_RV, logits_RV.shape[-1])
    return ids_RC[:, :count]


def _kind(params: SamplingParams) -> int:
    """0 greedy, 1 the whole distribution, 2 filtered."""
    if params.greedy:
        return 0
    return 2 if params.top_k or params.top_p < 1 or params.min_p else 1


def _settings(params: Sequence[SamplingParams], uniforms: Sequence[float], logits_RV: Tensor) -> Tensor:
    """Rows of (temperature, top_k, top_p, min_p, uniform) as columns, (5, R, 1) float64."""
    vocabulary = logits_RV.shape[-1]
    columns = [
        [p.temperature for p in params],
        [float(p.top_k or vocabulary) for p in params],
        [p.top_p for p in params],
        [p.min_p for p in params],
        [*uniforms],
    ]
    return torch.tensor(columns, dtype=torch.float64, device=logits_RV.device)[:, :, None]


def _weights(logits_RV: Tensor, temperature_R1: Tensor) -> Tensor:
    """Probabilities relative to the likeliest token's, float32: no temperature can overflow them."""
    steepness_R1 = temperature_R1.clamp(min=1e-30).float()
    return (logits_RV - logits_RV.amax(-1, keepdim=True)).div_(steepness_R1).exp_()


def _greedy(logits_RV: Tensor, settings: Tensor) -> Tensor:
    return logits_RV.argmax(-1)


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
    return (block_R1 * BLOCK + torch.searchsorted(sums_RC, rest_R1, right=True))[:, 0]


def _blocks(weights_RV: Tensor) -> Tensor:
    """(R, V) as (R, N, BLOCK), filled up with zeros."""
    weights_RNC: Tensor = F.pad(weights_RV, (0, -weights_RV.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    return weights_RNC


def _filtered(logits_RV: Tensor, settings: Tensor) -> Tensor:
    weights_RV = _weights(logits_RV, settings[0])
    tokens_R, unsure_R = _cut(weights_RV, *ranked(logits_RV, CANDIDATES[0]), settings)
    for count in (*CANDIDATES[1:], logits_RV.shape[-1]):
        left = unsure_R.nonzero()[:, 0]
        if not len(left):
            break
        again = _cut(weights_RV[left], *ranked(logits_RV[left], count), settings[:, left])
        tokens_R[left], unsure_R[left] = again
    return tokens_R


def _cut(weights_RV: Tensor, ids_RC: Tensor, certain_R: Tensor, settings: Tensor) -> tuple[Tensor, Tensor]:
    """The sampled ids (R,), and for which rows (R,) more candidates had to be certain."""
    _, top_k, top_p, min_p, uniform = settings
    vocabulary, count = weights_RV.shape[-1], ids_RC.shape[-1]
    rank_C = torch.arange(count, device=ids_RC.device)
    weights_RC = weights_RV.gather(-1, ids_RC).double() * (rank_C < top_k)
    everything_R1 = _blocks(weights_RV).sum(-1).sum(-1, keepdim=True, dtype=torch.float64)
    total_R1 = torch.where(top_k < vocabulary, weights_RC.sum(-1, keepdim=True), everything_R1)
    before_RC = weights_RC.cumsum(-1) - weights_RC
    keep_RC = (before_RC < top_p * total_R1) & (weights_RC >= min_p) & (rank_C < top_k)
    sums_RC = (weights_RC * keep_RC).cumsum_(-1)
    place_R1 = torch.searchsorted(sums_RC, uniform * sums_RC[:, -1:], right=True)
    # A share of the top k needs all k; else what is kept must be certain, and its end seen.
    needed_R1 = torch.where((count < top_k) & (top_k < vocabulary), top_k, keep_RC.sum(-1, keepdim=True))
    return ids_RC.gather(-1, place_R1)[:, 0], needed_R1[:, 0] > certain_R
