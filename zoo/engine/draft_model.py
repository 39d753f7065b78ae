"""Speculative decoding with a draft model: a smaller one of the same vocabulary proposes the next tokens.

It has a cache of its own and reads a sequence's tokens when drafts are first asked for, a chunk in each step. What it
has cached of rejected drafts is taken back before the next ones.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import torch

from zoo.engine.drafting import Asked
from zoo.engine.memory import Memory
from zoo.engine.pack import Batch
from zoo.engine.randoms import uniform
from zoo.engine.runner import Runner
from zoo.engine.sampler import choose
from zoo.engine.sequence import Sequence

AT_ONCE = 32
"""Rows of a sequence that are read in the step in which it gets drafts. More are read in steps of their own: reading is
paid once, and says nothing about what drafts cost."""


@dataclass(slots=True)
class Follower:
    """What the model has of a sequence. past: its tokens that are cached. drafts: those made after the first `length`
    tokens, of which all but the last are cached behind a mark."""

    past: int = 0
    length: int = 0
    drafts: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens of a sequence from position `past` on that a step computes; `last`: what follows them is asked for."""

    seq: Sequence
    past: int
    tokens: list[int]
    last: bool = True


class DraftModel:
    """A `zoo.engine.drafting.Source`. context: tokens up to which the model can guess. rows: of a step."""

    def __init__(self, runner: Runner, memory: Memory, *, context: int, rows: int) -> None:
        self.runner, self.memory, self.context, self.rows = runner, memory, context, rows
        self._followers: dict[int, Follower] = {}

    def drafts(self, asked: Asked) -> list[list[int]]:
        """The likeliest next tokens of each sequence, or what its own random numbers draw; nothing for those whose
        tokens are still being read, and for those without room."""
        found: dict[int, list[int]] = {seq.number: [] for seq, _ in asked}
        counts = {seq.number: self._count(seq, count) for seq, count in asked}
        parts = self._missing([seq for seq, _ in asked if counts[seq.number]])
        while parts:
            for part, token in zip([p for p in parts if p.last], self._run(parts), strict=True):
                found[part.seq.number].append(token)
            parts = [
                Part(part.seq, part.past + len(part.tokens), found[part.seq.number][-1:])
                for part in parts
                if part.last and len(found[part.seq.number]) < counts[part.seq.number]
            ]
            for part in parts:
                if len(found[part.seq.number]) == 1:
                    self.memory.mark(part.seq.number, part.past, counts[part.seq.number] - 1)
        for seq, _ in asked:
            if found[seq.number]:
                follower = self._followers[seq.number]
                follower.length, follower.drafts = len(seq.tokens), found[seq.number]
        return [found[seq.number] for seq, _ in asked]

    def free(self, seq: int) -> None:
        """Forgets a sequence."""
        self.memory.free(seq)
        self._followers.pop(seq, None)

    @property
    def caches(self) -> list[Memory]:
        """Its own."""
        return [self.memory]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the model."""
        return self.runner.weight_bytes

    def _count(self, seq: Sequence, count: int) -> int:
        """How many drafts there can be: as many as fit the model's context and its cache, and can be taken back."""
        count = min(count, self.context - len(seq.tokens) + 1)
        if self.memory.back is not None:
            count = min(count, self.memory.back)
        return count if count > 0 and self.memory.reserve(seq.number, len(seq.tokens) + count - 1) else 0

    def _missing(self, seqs: Items[Sequence]) -> list[Part]:
        """What the model has not read of these sequences, as far as a step's rows go; single rows first."""
        parts, left = [], self.rows
        for seq in seqs:
            follower = self._settled(seq)
            tokens = seq.tokens[follower.past : follower.past + left]
            if tokens:
                last = len(tokens) <= AT_ONCE and follower.past + len(tokens) == len(seq.tokens)
                parts.append(Part(seq, follower.past, tokens, last))
                follower.past += len(tokens)
                left -= len(tokens)
        return sorted(parts, key=lambda part: len(part.tokens) > 1)

    def _settled(self, seq: Sequence) -> Follower:
        """The sequence's follower, with nothing cached but tokens of it: wrong drafts are taken back."""
        follower = self._followers.setdefault(seq.number, Follower())
        cached, follower.drafts = follower.drafts[:-1], []
        if cached:
            right = 0
            while right < len(cached) and seq.tokens[follower.length + right] == cached[right]:
                right += 1
            follower.past = follower.length + right
            self.memory.rewind(seq.number, follower.past)
        return follower

    def _run(self, parts: list[Part]) -> list[int]:
        """A step; the tokens that follow those parts whose last row is asked for."""
        asked = [part for part in parts if part.last]
        logits_RV = self.runner.run(self._packed(parts))
        if not asked:
            return []
        uniforms = [
            0.0 if part.seq.params.greedy else uniform(part.seq.seed, part.past + len(part.tokens)) for part in asked
        ]
        with torch.inference_mode():
            logits_RV = logits_RV.cpu() if logits_RV.device.type == "mps" else logits_RV
            tokens_R = choose(logits_RV, [part.seq.params for part in asked], uniforms)
            # Of numbers that are not finite anything may come: a bad guess must still be a token.
            tokens: list[int] = tokens_R.clamp(max=logits_RV.shape[-1] - 1).tolist()
        return tokens

    def _packed(self, parts: list[Part]) -> Batch:
        tokens: list[int] = []
        positions: list[int] = []
        picks: list[int] = []
        for part in parts:
            tokens += part.tokens
            positions += range(part.past, part.past + len(part.tokens))
            picks += [len(tokens) - 1] if part.last else []
        total = len(tokens)
        packed = torch.tensor(tokens + positions + picks, dtype=torch.int64).to(self.runner.device, non_blocking=True)
        return Batch(
            tokens_T=packed[:total],
            positions_T=packed[total : 2 * total],
            rows_R=None if len(picks) == total else packed[2 * total :],
            seqs=[part.seq.number for part in parts],
            rows=[len(part.tokens) for part in parts],
            past=[part.past for part in parts],
            wanted=[],
            adapters=[None] * len(parts),
            media=[()] * len(parts),
        )
