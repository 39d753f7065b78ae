"""Asynchronous steps: a device begins the next step before the host has read the last one's tokens.

When every sequence is decoded greedily, the next step is known but for its tokens, and these are on the device. So it
is launched behind the last one, and only then are the last one's tokens read and shown. If a sequence turns out to have
ended, the row that was computed for it stays unused behind its end. Windows and states would be overwritten by such a
row, so models that have them do not run ahead.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.components.fused import on
from zoo.engine.media import Placed
from zoo.engine.memory import Memory
from zoo.engine.outcome import Outcome, read
from zoo.engine.pack import Batch, pack
from zoo.engine.prefixes import Prefixes
from zoo.engine.runner import Runner
from zoo.engine.scheduler import Work
from zoo.engine.sequence import Sequence as Running


@dataclass(frozen=True)
class Begun:
    """A step of one row of each of some sequences that the device computes or has computed.

    lengths: tokens of each when the host reads what came of it. numbers_2R: on the host once `done`: the likeliest
    tokens, and whether logits are finite. tokens_R, positions_R: on the device, what the next step of the same ones
    gets, positions still to be raised by one.
    """

    sequences: list[Running]
    lengths: list[int]
    numbers_2R: Tensor
    tokens_R: Tensor
    positions_R: Tensor
    done: torch.cuda.Event | None

    @classmethod
    def of(cls, sequences: list[Running], lengths: list[int], logits_RV: Tensor, positions_R: Tensor) -> Begun:
        """Asks for what the logits say, without waiting for it."""
        tokens_R = logits_RV.argmax(-1)
        found_2R = torch.cat([tokens_R, logits_RV.sum(-1).isfinite().long()])
        if not found_2R.is_cuda:
            return cls(sequences, lengths, found_2R, tokens_R, positions_R, None)
        numbers_2R = torch.empty(found_2R.shape, dtype=found_2R.dtype, pin_memory=True)
        numbers_2R.copy_(found_2R, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return cls(sequences, lengths, numbers_2R, tokens_R, positions_R, done)

    def outcomes(self, work: list[Work]) -> list[Outcome]:
        """What came of the work, which is of some of the sequences; waits for it."""
        if self.done is not None:
            self.done.synchronize()
        numbers, count = self.numbers_2R.tolist(), len(self.sequences)
        places = {id(seq): place for place, seq in enumerate(self.sequences)}
        rows = [(item.sequence, places[id(item.sequence)]) for item in work]
        return [
            Outcome([numbers[place]], broken=None if numbers[count + place] else len(seq.tokens) - 1)
            for seq, place in rows
        ]


class Steps:
    """Computes the engine's steps and, with `ahead`, begins those that surely follow."""

    def __init__(self, prefixes: Prefixes, *, ahead: bool) -> None:
        self._prefixes, self.ahead = prefixes, ahead
        self._begun: Begun | None = None

    def clear(self) -> None:
        """Forgets what was begun."""
        self._begun = None

    def run(self, runner: Runner, work: list[Work]) -> list[list[tuple[Work, Outcome]]]:
        """All of the work, in one part."""
        return [[*zip(work, self._outcomes(runner, work), strict=True)]]

    def pause(self) -> None:
        """What was begun is forgotten."""
        self.clear()

    @torch.inference_mode()
    def _outcomes(self, runner: Runner, work: list[Work]) -> list[Outcome]:
        """What comes of each item of the work."""
        begun, self._begun = self._begun, None
        if begun is None or not _is_of(begun, work):
            batch = pack(work, runner.device)
            logits_RV = runner.run(batch)
            if not self.ahead or not _is_plain(work):
                return read(batch, logits_RV)
            with on(runner.device):
                sequences = [item.sequence for item in work]
                begun = Begun.of(sequences, [len(seq.tokens) for seq in sequences], logits_RV, batch.positions_T)
        if len(work) == len(begun.sequences):
            self._begun = self._next(runner, begun)
        return begun.outcomes(work)

    def _next(self, runner: Runner, begun: Begun) -> Begun | None:
        """The step behind one whose tokens the host does not know yet; None where it may not follow or find room."""
        captured, sequences = runner.captured, begun.sequences
        adapters = [seq.params.adapter for seq in sequences]
        if captured is None or any(map(runner.adapters.resolve, adapters)):
            return None
        if any(seq.generated + 1 >= seq.allowed for seq in sequences):
            return None
        past = [len(seq.tokens) for seq in sequences]
        if not all(self._prefixes.grow(seq, before + 1) for seq, before in zip(sequences, past, strict=True)):
            return None
        positions_R, seqs = begun.positions_R + 1, [seq.cache for seq in sequences]
        media: list[SequenceOf[Placed]] = [() for _ in sequences]
        batch = Batch(begun.tokens_R, positions_R, None, seqs, [1] * len(seqs), past, [], adapters, media)
        with on(runner.device):
            logits_RV = captured.run(batch)
            if logits_RV is None:
                return None
            return Begun.of(sequences, [before + 1 for before in past], logits_RV, positions_R)


def goes_ahead(runner: Runner, memory: Memory) -> bool:
    """Whether steps may be begun ahead: recorded ones that run over fixed tensors, of a cache in which a row too many
    does no harm."""
    recorded = runner.captured is not None and runner.captured.way != "calls"
    return recorded and memory.reusable and not memory.moves


def _is_plain(work: list[Work]) -> bool:
    """Whether every item is a sequence's last token, of which nothing but the likeliest next one is asked."""
    return all(item.rows == 1 and not item.drafts and _asks_little(item.sequence) for item in work)


def _asks_little(seq: Running) -> bool:
    params = seq.params
    return (
        params.greedy and params.logprobs is None and not seq.scores and seq.todo == 1 and seq.generated < seq.allowed
    )


def _is_of(begun: Begun, work: list[Work]) -> bool:
    """Whether the work is what was begun, at most without some of it."""
    lengths = {id(seq): length for seq, length in zip(begun.sequences, begun.lengths, strict=True)}
    return _is_plain(work) and all(lengths.get(id(item.sequence)) == len(item.sequence.tokens) for item in work)
