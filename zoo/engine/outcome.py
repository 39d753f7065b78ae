"""Logits -> what each sequence gets from a step. R logits rows, S sampled ones, N rows of one kind, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zoo.engine.pack import Batch, Wanted
from zoo.engine.randoms import uniform
from zoo.engine.sampler import best, choose


@dataclass(slots=True)
class Outcome:
    """token: the sampled id, None when the sequence's prompt goes on. logprob, top: its log-probability and the best
    alternatives, when asked for. scores: log-probabilities of further prompt tokens. broken: the first position
    whose logits are not finite."""

    token: int | None = None
    logprob: float | None = None
    top: dict[int, float] | None = None
    scores: list[float] = field(default_factory=list)
    broken: int | None = None


@torch.inference_mode()
def read(batch: Batch, logits_RV: Tensor) -> list[Outcome]:
    """One Outcome per sequence of the batch, in its order."""
    # Apple's GPUs have no float64, which sampling needs.
    logits_RV = logits_RV.cpu() if logits_RV.device.type == "mps" else logits_RV
    outcomes = [Outcome() for _ in batch.wanted]
    if not len(logits_RV):
        return outcomes
    ends = _ends(batch.wanted)
    samples = [i for i, wants in enumerate(batch.wanted) if wants.samples]
    rows_SV = _select(logits_RV, [ends[i] - 1 for i in samples])
    tokens_S = _sample([batch.wanted[i] for i in samples], rows_SV)
    # A sum is finite only if every term is; one copy to the host carries tokens and verdicts.
    host = torch.cat([tokens_S, logits_RV.sum(-1).isfinite().long()]).tolist()
    for i, token in zip(samples, host, strict=False):
        outcomes[i].token = token
    _find_broken(batch.wanted, ends, host[len(samples) :], outcomes)
    _add_logprobs(batch.wanted, samples, rows_SV, tokens_S, outcomes)
    for wants, end, outcome in zip(batch.wanted, ends, outcomes, strict=True):
        if wants.scored:
            outcome.scores = _score(wants, logits_RV[end - wants.rows :][: wants.scored])
    return outcomes


def _ends(wanted: Sequence[Wanted]) -> list[int]:
    """Where each sequence's logits rows end."""
    ends, end = [], 0
    for wants in wanted:
        end += wants.rows
        ends.append(end)
    return ends


def _select(rows_NV: Tensor, chosen: list[int]) -> Tensor:
    return rows_NV if len(chosen) == len(rows_NV) else rows_NV[torch.tensor(chosen, device=rows_NV.device).long()]


def _sample(wanted: Sequence[Wanted], rows_SV: Tensor) -> Tensor:
    seqs = [wants.work.sequence for wants in wanted]
    uniforms = [0.0 if seq.params.greedy else uniform(seq.seed, len(seq.tokens)) for seq in seqs]
    return choose(rows_SV, [seq.params for seq in seqs], uniforms)


def _find_broken(wanted: Sequence[Wanted], ends: list[int], finite: list[int], outcomes: list[Outcome]) -> None:
    if all(finite):
        return
    for wants, end, outcome in zip(wanted, ends, outcomes, strict=True):
        for place, good in enumerate(finite[end - wants.rows : end]):
            if not good and outcome.broken is None:
                last = wants.work.sequence.past + wants.work.rows - 1
                outcome.broken = wants.start + place if place < wants.scored else last


def _add_logprobs(
    wanted: Sequence[Wanted], samples: list[int], rows_SV: Tensor, tokens_S: Tensor, outcomes: list[Outcome]
) -> None:
    """Raw log-softmax of the sampled tokens and of the k best, for the sequences that asked."""
    counts = [wanted[i].work.sequence.params.logprobs for i in samples]
    asked = [place for place, count in enumerate(counts) if count is not None]
    if not asked:
        return
    logits_NV = _select(rows_SV, asked)
    sums_N1 = logits_NV.logsumexp(-1, keepdim=True)
    tokens_N1 = tokens_S.unsqueeze(-1) if len(asked) == len(samples) else tokens_S[asked].unsqueeze(-1)
    ids_NK = best(logits_NV, max(counts[place] or 0 for place in asked))
    ids_NK = torch.cat([tokens_N1, ids_NK], -1)
    logprobs = (logits_NV.gather(-1, ids_NK) - sums_N1).tolist()
    for place, ids, values in zip(asked, ids_NK.tolist(), logprobs, strict=True):
        count = counts[place] or 0
        outcome = outcomes[samples[place]]
        outcome.logprob, outcome.top = values[0], dict(zip(ids[1 : count + 1], values[1 : count + 1], strict=True))


def _score(wants: Wanted, logits_NV: Tensor) -> list[float]:
    """Log-probabilities of the prompt tokens that follow positions `start` and on."""
    targets = wants.work.sequence.tokens[wants.start + 1 : wants.start + 1 + wants.scored]
    index_N1 = torch.tensor(targets, device=logits_NV.device)[:, None]
    logprobs_N = logits_NV.gather(-1, index_N1)[:, 0] - logits_NV.logsumexp(-1)
    found: list[float] = logprobs_N.tolist()
    return found
