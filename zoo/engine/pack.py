"""Sequences -> one packed stream of tokens, and which of its rows need logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.engine.scheduler import Work


@dataclass(frozen=True, slots=True)
class Wanted:
    """The logits rows of one sequence: `scored` rows from position `start` on that score prompt tokens, then,
    when `samples`, the row that the next token is drawn from."""

    work: Work
    start: int
    scored: int
    samples: bool

    @property
    def rows(self) -> int:
        return self.scored + self.samples


@dataclass(frozen=True, slots=True)
class Batch:
    """A step's input on the device.

    tokens_T, positions_T: int64. rows_R: which of the T rows need logits, None for all. rows, past: per sequence.
    adapters: what each sequence's request chose.
    """

    tokens_T: Tensor
    positions_T: Tensor
    rows_R: Tensor | None
    seqs: list[int]
    rows: list[int]
    past: list[int]
    wanted: list[Wanted]
    adapters: list[str | None]


def pack(work: Sequence[Work], device: torch.device) -> Batch:
    """The work as one stream, copied to the device at once."""
    tokens: list[int] = []
    positions: list[int] = []
    picks: list[int] = []
    wanted: list[Wanted] = []
    for item in work:
        start, stop = item.sequence.past, item.sequence.past + item.rows
        wants = _wanted(item, start, stop)
        picks += range(len(tokens) + wants.start - start, len(tokens) + wants.start - start + wants.scored)
        tokens += item.sequence.tokens[start:stop]
        positions += range(start, stop)
        if wants.samples:
            picks.append(len(tokens) - 1)
        wanted.append(wants)
    total = len(tokens)
    packed = torch.tensor(tokens + positions + picks, dtype=torch.int64).to(device, non_blocking=True)
    return Batch(
        tokens_T=packed[:total],
        positions_T=packed[total : 2 * total],
        rows_R=None if len(picks) == total else packed[2 * total :],
        seqs=[w.sequence.number for w in work],
        rows=[w.rows for w in work],
        past=[w.sequence.past for w in work],
        wanted=wanted,
        adapters=[w.sequence.params.adapter for w in work],
    )


def _wanted(work: Work, start: int, stop: int) -> Wanted:
    """Position p predicts token p + 1: prompt tokens not scored yet are, and the last row of all is sampled."""
    seq = work.sequence
    samples = stop == len(seq.tokens) and seq.generated < seq.allowed
    if not seq.scores:
        return Wanted(work, stop, 0, samples)
    first = max(start, len(seq.prompt_logprobs) - 1)
    return Wanted(work, first, max(min(stop, seq.prompt_length - 1) - first, 0), samples)
