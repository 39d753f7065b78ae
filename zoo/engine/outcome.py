"""Logits -> what each sequence gets from a step: sampled tokens, log-probabilities, and whether all is finite.

Letters: R logits rows, S sampled ones, N rows of one kind, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import Tensor

from zoo.engine.pack import Batch, Wanted
from zoo.engine.randoms import uniform
from zoo.engine.sampler import best, choose


@dataclass(slots=True)
class Outcome:
    """tokens: the sampled ids, the first ones equal to the work's drafts; none when the sequence's prompt goes on.
    logprobs, tops: their log-probabilities and the best alternatives, when asked for. scores: log-probabilities of
    further prompt tokens. broken: the first position whose logits are not finite."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] | None = None
    tops: list[dict[int, float]] | None = None
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
    rows = [row for wants in batch.wanted for row in wants.drawn]
    tokens_S = _sample(batch.wanted, _select(logits_RV, rows))
    # A sum is finite only if every term is; one copy to the host carries tokens and verdicts.
    host = torch.cat([tokens_S, logits_RV.sum(-1).isfinite().long()]).tolist()
    drawn, finite = iter(host[: len(rows)]), host[len(rows) :]
    for wants, outcome in zip(batch.wanted, outcomes, strict=True):
        outcome.tokens = _agreed([next(drawn) for _ in wants.drawn], wants.work.drafts)
        outcome.broken = _broken(wants, finite, len(outcome.tokens))
    _add_logprobs(batch.wanted, logits_RV, outcomes)
    for wants, outcome in zip(batch.wanted, outcomes, strict=True):
        if wants.scored:
            outcome.scores = _score(wants, _select(logits_RV, wants.scored))
    return outcomes


def _select(rows_NV: Tensor, chosen: list[int]) -> Tensor:
    if chosen == [*range(len(rows_NV))]:
        return rows_NV
    return rows_NV[torch.tensor(chosen, device=rows_NV.device).long()]


def _sample(wanted: Sequence[Wanted], rows_SV: Tensor) -> Tensor:
    """Every row's token, drawn by its position's own random number from the model's own distribution: whatever was
    guessed, the tokens are those that would be drawn one after the other."""
    seqs = [(wants.work.sequence, i) for wants in wanted for i in range(len(wants.drawn))]
    uniforms = [0.0 if seq.params.greedy else uniform(seq.seed, len(seq.tokens) + i) for seq, i in seqs]
    return choose(rows_SV, [seq.params for seq, _ in seqs], uniforms)


def _agreed(drawn: list[int], drafts: Sequence[int]) -> list[int]:
    """The drawn tokens as far as each stands behind the right ones: those that were guessed, and one more."""
    right = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(drawn, drafts, strict=False)))
    return drawn[: right + 1]


def _broken(wants: Wanted, finite: list[int], tokens: int) -> int | None:
    """The first position whose logits are not finite, if any of those that count."""
    if all(finite):
        return None
    last = len(wants.work.sequence.tokens) - 1
    places = [*enumerate(wants.scored, wants.start), *enumerate(wants.drawn[:tokens], last)]
    return next((position for position, row in places if not finite[row]), None)


def _add_logprobs(wanted: Sequence[Wanted], logits_RV: Tensor, outcomes: list[Outcome]) -> None:
    """Raw log-softmax of the sampled tokens and of the k best, for the sequences that asked."""
    asked = [
        (outcome, row, token, wants.work.sequence.params.logprobs)
        for wants, outcome in zip(wanted, outcomes, strict=True)
        for row, token in zip(wants.drawn, outcome.tokens, strict=False)
        if wants.work.sequence.params.logprobs is not None
    ]
    if not asked:
        return
    logits_NV = _select(logits_RV, [row for _, row, _, _ in asked])
    tokens_N1 = torch.tensor([token for _, _, token, _ in asked], device=logits_NV.device).unsqueeze(-1)
    ids_NK = best(logits_NV, max(count or 0 for _, _, _, count in asked))
    ids_NK = torch.cat([tokens_N1, ids_NK], -1)
    logprobs = (logits_NV.gather(-1, ids_NK) - logits_NV.logsumexp(-1, keepdim=True)).tolist()
    for (outcome, _, _, count), ids, values in zip(asked, ids_NK.tolist(), logprobs, strict=True):
        top = dict(zip(ids[1 : (count or 0) + 1], values[1 : (count or 0) + 1], strict=True))
        outcome.logprobs = [*(outcome.logprobs or []), values[0]]
        outcome.tops = [*(outcome.tops or []), top]


def _score(wants: Wanted, logits_NV: Tensor) -> list[float]:
    """Log-probabilities of the prompt tokens that follow positions `start` and on."""
    targets = wants.work.sequence.tokens[wants.start + 1 : wants.start + 1 + len(wants.scored)]
    index_N1 = torch.tensor(targets, device=logits_NV.device)[:, None]
    logprobs_N = logits_NV.gather(-1, index_N1)[:, 0] - logits_NV.logsumexp(-1)
    found: list[float] = logprobs_N.tolist()
    return found
