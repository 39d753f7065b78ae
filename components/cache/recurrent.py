"""States of constant size: what recurrent mixers keep of a sequence, however long it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from zoo.components.cache.spec import RecurrentCacheSpec
from zoo.components.step import Advance
from zoo.registry.errors import CapacityError

Piece = Literal["conv", "ssm"]
"""What a layer keeps: the convolution's last inputs, and the state."""


@dataclass(frozen=True)
class Span:
    """Neighbouring sequences that run as one batch: `count` of them from number `first` on, `rows` rows each.

    start: their first row in the step. begins: nothing came before these rows.
    """

    first: int
    count: int
    start: int
    rows: int
    begins: bool


def spans(rows: Sequence[int], past: Sequence[int]) -> list[Span]:
    """The step as batches: neighbours with one row each together, every other sequence alone."""
    found: list[Span] = []
    start = 0
    for i, (count, before) in enumerate(zip(rows, past, strict=True)):
        last = found[-1] if found else None
        if last and count == last.rows == 1 and last.begins == (before == 0):
            found[-1] = Span(last.first, last.count + 1, last.start, 1, last.begins)
        else:
            found.append(Span(i, 1, start, count, before == 0))
        start += count
    return found


class RecurrentStore:
    """The states of all sequences for a group of layers: one piece of memory for each sequence.

    It is the same under every storage: a state never grows, so pages would have nothing to share.
    """

    def __init__(
        self,
        spec: RecurrentCacheSpec,
        num_layers: int,
        dtype: torch.dtype,
        device: torch.device,
        storage: str,
        budget_bytes: int | None,
    ) -> None:
        self.num_layers, self.device, self.budget_bytes = num_layers, device, budget_bytes
        self.kinds: dict[Piece, tuple[tuple[int, ...], torch.dtype]] = {
            "conv": ((num_layers, *spec.conv_shape), dtype),
            "ssm": ((num_layers, *spec.ssm_shape), torch.float32),
        }
        self.bytes = num_layers * spec.nbytes(1, dtype.itemsize)
        self._held: dict[int, dict[Piece, Tensor]] = {}
        self._seen: dict[int, int] = {}

    @staticmethod
    def fresh(rows: Sequence[int]) -> FreshRecurrent:
        """The state of a layer in a step of whole sequences."""
        return FreshRecurrent(spans(rows, [0] * len(rows)))

    @property
    def nbytes(self) -> int:
        """Bytes that sequences hold now."""
        return self.bytes * len(self._held)

    def cost(self, tokens: int) -> int:
        """Bytes that a sequence holds, over all layers."""
        return self.bytes

    def grow(self, seq: int, tokens: int) -> None:
        """Makes room for a sequence. Raises CapacityError beyond the budget."""
        if seq in self._held:
            return
        if self.budget_bytes is not None and self.nbytes + self.bytes > self.budget_bytes:
            raise CapacityError(
                "the cache is full",
                found=f"{self.nbytes + self.bytes} bytes for the state of one more sequence",
                expected=f"at most {self.budget_bytes} bytes",
            )
        self._held[seq] = {
            piece: torch.empty(shape, dtype=dtype, device=self.device) for piece, (shape, dtype) in self.kinds.items()
        }

    def free(self, seq: int) -> None:
        """Gives a sequence's memory back; a sequence without any is no fault."""
        self._held.pop(seq, None)
        self._seen.pop(seq, None)

    def views(self, seqs: Sequence[int], rows: Sequence[int], past: Sequence[int]) -> list[RecurrentView]:
        """One state per layer for a step of `rows` new tokens after `past` cached ones each."""
        for seq, count, before in zip(seqs, rows, past, strict=True):
            assert before in (0, self._seen.get(seq, 0)), "a recurrent state goes on where it stands, or begins anew"
            self._seen[seq] = before + count
        held, batches = [self._held[seq] for seq in seqs], spans(rows, past)
        return [RecurrentView(layer, held, batches) for layer in range(self.num_layers)]


@dataclass(frozen=True)
class RecurrentView:
    """One layer's states in one step. held: those of each sequence of the step, all layers."""

    layer: int
    held: list[dict[Piece, Tensor]]
    spans: list[Span]

    def advance(self, piece: Piece, function: Advance, *rows: Tensor) -> Tensor:
        """Runs `function` over every sequence's rows from what is kept, and keeps what it leaves."""
        parts = []
        for span in self.spans:
            places = [held[piece][self.layer] for held in self.held[span.first : span.first + span.count]]
            output, left = function(None if span.begins else _batch(places), *_cut(span, rows))
            for place, value in zip(places, left, strict=True):
                place.copy_(value)
            parts.append(output.flatten(0, 1))
        return torch.cat(parts) if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class FreshRecurrent:
    """A layer's state that keeps nothing: every sequence is whole within the step. Gradients flow through it."""

    spans: list[Span]

    def advance(self, piece: Piece, function: Advance, *rows: Tensor) -> Tensor:
        """Runs `function` over every sequence's rows."""
        return torch.cat([function(None, *_cut(span, rows))[0].flatten(0, 1) for span in self.spans])


def _batch(places: list[Tensor]) -> Tensor:
    return places[0].unsqueeze(0) if len(places) == 1 else torch.stack(places)


def _cut(span: Span, rows: Iterable[Tensor]) -> list[Tensor]:
    """The span's rows, as (B, T, ...)."""
    stop = span.start + span.count * span.rows
    return [value[span.start : stop].unflatten(0, (span.count, span.rows)) for value in rows]
