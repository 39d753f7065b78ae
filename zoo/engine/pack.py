"""Sequences -> one packed stream of tokens, and which of its rows need logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from zoo.components.cache.pages import to_send
from zoo.engine.media import Placed
from zoo.engine.scheduler import Work


@dataclass(frozen=True, slots=True)
class Wanted:
    """The logits rows of one sequence, by number: those from position `start` on that score prompt tokens, then those
    that the next tokens are drawn from, one more than there are drafts."""

    work: Work
    start: int
    scored: list[int] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Batch:
    """A step's input on the device.

    tokens_T, positions_T: int64. rows_R: which of the T rows need logits, None for all.
    seqs, rows, past: the sequences in the order of the stream; one that checks drafts stands there once for each row.
    wanted: of each work. adapters, media: what the request of each of `seqs` chose and brought.
    """

    tokens_T: Tensor
    positions_T: Tensor
    rows_R: Tensor | None
    seqs: list[int]
    rows: list[int]
    past: list[int]
    wanted: list[Wanted]
    adapters: list[str | None]
    media: list[Sequence[Placed]]


def pack(work: Sequence[Work], device: torch.device) -> Batch:
    """The work as one stream, copied to the device at once."""
    packing = _Packing()
    wanted = [_wanted(item) for item in work]
    for item, want, start, stop in _pieces(work, wanted):
        packing.add(item, want, start, stop)
    total = len(packing.tokens)
    numbers = packing.tokens + packing.positions + packing.picks
    packed = to_send(torch.tensor(numbers, dtype=torch.int64), device).to(device, non_blocking=True)
    return Batch(
        tokens_T=packed[:total],
        positions_T=packed[total : 2 * total],
        rows_R=None if len(packing.picks) == total else packed[2 * total :],
        seqs=[item.sequence.cache for item in packing.items],
        rows=packing.rows,
        past=packing.past,
        wanted=wanted,
        adapters=[item.sequence.params.adapter for item in packing.items],
        media=[item.sequence.media for item in packing.items],
    )


def split(batch: Batch, count: int) -> list[Batch]:
    """The batch in `count` pieces of about as many rows, to be computed one after the other. A chunk may be cut; which
    rows are wanted, the whole batch says."""
    if count == 1:
        return [batch]
    total = len(batch.tokens_T)
    return [_cut(batch, total * i // count, total * (i + 1) // count) for i in range(count)]


def _cut(batch: Batch, first: int, last: int) -> Batch:
    """Rows `first` to `last` - 1 of the stream."""
    ends = [*accumulate(batch.rows)]
    spans = [(max(first, end - rows), min(last, end)) for rows, end in zip(batch.rows, ends, strict=True)]
    kept = [i for i, (start, stop) in enumerate(spans) if start < stop]
    return Batch(
        tokens_T=batch.tokens_T[first:last],
        positions_T=batch.positions_T[first:last],
        rows_R=None,
        seqs=[batch.seqs[i] for i in kept],
        rows=[spans[i][1] - spans[i][0] for i in kept],
        past=[batch.past[i] + spans[i][0] - (ends[i] - batch.rows[i]) for i in kept],
        wanted=[],
        adapters=[batch.adapters[i] for i in kept],
        media=[batch.media[i] for i in kept],
    )


class _Packing:
    """The stream so far."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.picks: list[int] = []
        self.items: list[Work] = []
        self.rows: list[int] = []
        self.past: list[int] = []

    def add(self, work: Work, wants: Wanted, start: int, stop: int) -> None:
        """Positions start .. stop - 1 of a sequence."""
        seq = work.sequence
        length, row = len(seq.tokens), len(self.tokens) - start
        self.tokens += seq.tokens[start:stop] if start < length else work.drafts[start - length : stop - length]
        self.positions += range(start, stop)
        for position in range(max(start, wants.start), stop):
            scored = seq.scores and position < seq.prompt_length - 1
            if scored or (position >= length - 1 and seq.generated < seq.allowed):
                (wants.scored if scored else wants.drawn).append(len(self.picks))
                self.picks.append(row + position)
        self.items.append(work)
        self.rows.append(stop - start)
        self.past.append(start)


def _pieces(work: Sequence[Work], wanted: Sequence[Wanted]) -> list[tuple[Work, Wanted, int, int]]:
    """The stream's pieces: work and the positions of it.

    Drafts are computed as if they were decoded: one row each, which attends as a single row does, so that the numbers
    are the same. The first row of everybody who decodes, then the second ones, and so on; then chunks of prompts.
    """
    pieces, chunks = [], []
    for item, wants in zip(work, wanted, strict=True):
        start = item.sequence.past
        if item.rows == 1 or item.drafts:
            pieces += [(wave, item, wants, start + wave) for wave in range(item.rows)]
        else:
            chunks.append((item, wants, start, start + item.rows))
    pieces.sort(key=lambda piece: piece[0])
    return [(item, wants, at, at + 1) for _, item, wants, at in pieces] + chunks


def _wanted(work: Work) -> Wanted:
    """Position p predicts token p + 1: prompt tokens not scored yet are, and what follows the last ones is drawn."""
    seq = work.sequence
    first = len(seq.prompt_logprobs) - 1 if seq.scores else len(seq.tokens) - 1
    return Wanted(work, max(seq.past, first))
