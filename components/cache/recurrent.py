"""States of constant size: what recurrent mixers keep of a sequence, however long it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor

from zoo.components import fused, native
from zoo.components.cache.pages import to_send
from zoo.components.cache.spec import RecurrentCacheSpec
from zoo.components.native.recurrent import Places
from zoo.components.step import Advance, InPlace, Movable
from zoo.registry.errors import CapacityError

Piece = Literal["conv", "ssm"]
"""What a layer keeps: the convolution's last inputs, and the state."""

KERNELS: dict[Piece, str] = {"conv": "convolution", "ssm": "state"}
"""The kernel that moves a piece on by single rows, by its name in zoo.components.fused."""


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


def spans(seqs: Sequence[int], rows: Sequence[int], past: Sequence[int]) -> list[Span]:
    """The step as batches: neighbours with one row each together, none of them twice, every other sequence alone."""
    found: list[Span] = []
    start, met = 0, set[int]()
    for i, (seq, count, before) in enumerate(zip(seqs, rows, past, strict=True)):
        last = found[-1] if found else None
        if last and count == last.rows == 1 and last.begins == (before == 0) and seq not in met:
            found[-1] = Span(last.first, last.count + 1, last.start, 1, last.begins)
        else:
            found.append(Span(i, 1, start, count, before == 0))
            met.clear()
        met.add(seq)
        start += count
    return found


@dataclass(frozen=True)
class Trail:
    """The rows of a marked sequence after its first `past` tokens, whose states stay as the mark found them.

    A state cannot be computed backwards, and a copy of it for each row takes more memory than there may be. The rows
    that made it are small: those that hold are run again.
    """

    past: int
    states: dict[tuple[Piece, int], Tensor] = field(default_factory=dict)
    rows: dict[tuple[Piece, int], list[tuple[Advance, list[Tensor]]]] = field(default_factory=dict)

    def add(self, key: tuple[Piece, int], function: Advance, row: list[Tensor], left: Tensor) -> None:
        """A row (1, 1, ...) of a layer's piece, and the state that it left."""
        self.rows.setdefault(key, []).append((function, row))
        self.states[key] = left

    def after(self, key: tuple[Piece, int], kept: Tensor, rows: int) -> Tensor:
        """The state after so many of its rows."""
        if rows == len(self.rows[key]):
            return self.states[key]
        state = kept
        for function, row in self.rows[key][:rows]:
            state = function(state.unsqueeze(0), *row)[1][0].to(kept.dtype)
        return state


class RecurrentStore:
    """The states of all sequences for a group of layers: one piece of memory for each sequence.

    A state never grows, so pages would have nothing to share. Where sequences share pages, states stand in one pool
    instead, at places that steps which are run many times can refer to; place 0 belongs to no sequence.
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
        self._trails: dict[int, Trail] = {}
        pages = storage == "pages" or (storage == "auto" and device.type != "cpu")
        self._places = 1 + budget_bytes // self.bytes if pages and budget_bytes is not None else 0
        self._unused = [*range(1, self._places)]
        self._place: dict[int, int] = {}
        self.moved: set[tuple[Piece, int]] = set()
        """What has been moved on by kernels where it lies, of which layer: what can be prepared to be moved so."""

    @cached_property
    def pool(self) -> dict[Piece, Tensor]:
        """The states of all places, (layers, places, ...) each, made on first use."""
        return {
            piece: torch.zeros((shape[0], self._places, *shape[1:]), dtype=dtype, device=self.device)
            for piece, (shape, dtype) in self.kinds.items()
        }

    @staticmethod
    def fresh(rows: Sequence[int], num_layers: int) -> list[FreshRecurrent]:
        """The states of layers in a step of whole sequences."""
        return [FreshRecurrent(spans(range(len(rows)), rows, [0] * len(rows)))] * num_layers

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
        self._held[seq] = (
            self._room(seq)
            if self._places
            else {
                piece: torch.empty(shape, dtype=dtype, device=self.device)
                for piece, (shape, dtype) in self.kinds.items()
            }
        )

    def _room(self, seq: int) -> dict[Piece, Tensor]:
        """A place of the pool, as if nothing had come before."""
        self._place[seq] = self._unused.pop()
        return {piece: pool[:, self._place[seq]].zero_() for piece, pool in self.pool.items()}

    def free(self, seq: int) -> None:
        """Gives a sequence's memory back; a sequence without any is no fault."""
        self._held.pop(seq, None)
        self._seen.pop(seq, None)
        self._trails.pop(seq, None)
        if seq in self._place:
            self._unused.append(self._place.pop(seq))

    @property
    def back(self) -> None:
        """Any number of rows can be taken back."""
        return None

    def mark(self, seq: int, past: int, rows: int) -> None:
        """From here on the sequence's states stay as they are, and its rows are remembered."""
        self._trails[seq] = Trail(past)

    @torch.inference_mode()
    def rewind(self, seq: int, tokens: int) -> None:
        """Moves the states on to `tokens` tokens, by those rows since the mark that hold."""
        trail = self._trails.pop(seq, None)
        if trail is None:
            return
        for key in trail.rows:
            piece, layer = key
            kept = self._held[seq][piece][layer]
            kept.copy_(trail.after(key, kept, tokens - trail.past))
        self._seen[seq] = tokens

    def marked(self, seqs: Sequence[int]) -> bool:
        """Whether one of the sequences is marked."""
        return any(seq in self._trails for seq in seqs)

    def serves(self, held: int, tokens: int) -> bool:
        """See `Reusable`. A state knows only where it stands."""
        return held == tokens

    def holds(self, seqs: Sequence[int]) -> int:
        """See `Reusable`."""
        return self.bytes * sum(seq in self._held for seq in seqs)

    def takes(self, source: int, tokens: int, room: int, move: bool) -> int:
        """See `Reusable`."""
        return 0 if move else self.bytes

    def adopt(self, source: int, seq: int, tokens: int, room: int, move: bool) -> None:
        """See `Reusable`."""
        counts = self.device.type == "meta"
        assert counts or self._seen[source] == tokens, "a recurrent state goes on where it stands"
        self._seen[seq] = tokens
        if move:
            self._held[seq] = self._held.pop(source)
            self._seen.pop(source, None)
            if source in self._place:
                self._place[seq] = self._place.pop(source)
            return
        self.grow(seq, room)
        for piece, state in self._held[seq].items():
            state.copy_(self._held[source][piece])

    def trim(self, seq: int, tokens: int) -> bool:
        """See `Reusable`."""
        return False

    def hold(self, batch: int, tokens: int) -> HeldStates | HeldPlaces | None:
        """A step of single rows that is run many times; None without a pool or kernels."""
        if self._places:
            return HeldStates(self, batch)
        return HeldPlaces(self, batch) if self.device.type == "cpu" and native.missing() is None else None

    def places(self, seqs: Sequence[int], past: Sequence[int]) -> list[int]:
        """The places in the pool of the sequences of a step of single rows."""
        self._go_on(seqs, [1] * len(seqs), past)
        return [self._place[seq] for seq in seqs]

    def table(self, piece: Piece, seqs: Sequence[int], rows: Sequence[int], past: Sequence[int]) -> Tensor:
        """The numbers of `Places` for the first layer."""
        states, starts = [self._held[seq][piece] for seq in seqs], accumulate(rows, initial=0)
        numbers = [
            (state.data_ptr(), start, count, before == 0)
            for state, start, count, before in zip(states, starts, rows, past, strict=False)
        ]
        return torch.tensor(numbers, dtype=torch.int64)

    def layer_bytes(self, piece: Piece) -> int:
        """From a layer's states to the next one's."""
        shape, dtype = self.kinds[piece]
        return math.prod(shape[1:]) * dtype.itemsize * max(1, self._places)

    def tables(self, seqs: Sequence[int], past: Sequence[int]) -> dict[Piece, Tensor]:
        """The numbers of `Places` for the first layer, for a step of single rows."""
        rows = [1] * len(seqs)
        self._go_on(seqs, rows, past)
        return {piece: self.table(piece, seqs, rows, past) for piece in self.kinds}

    def _go_on(self, seqs: Sequence[int], rows: Sequence[int], past: Sequence[int]) -> None:
        for seq, count, before in zip(seqs, rows, past, strict=True):
            assert before in (0, self._seen.get(seq, 0)), "a recurrent state goes on where it stands, or begins anew"
            self._seen[seq] = before + count

    def views(self, seqs: Sequence[int], rows: Sequence[int], past: Sequence[int]) -> list[RecurrentView]:
        """One state per layer for a step of `rows` new tokens after `past` cached ones each."""
        self._go_on(seqs, rows, past)
        held, batches = [self._held[seq] for seq in seqs], spans(seqs, rows, past)
        trails = [self._trails.get(seq) for seq in seqs]
        alone = self.device.type == "cpu" and len(set(seqs)) == len(seqs) and not self.marked(seqs)
        tables = {piece: self.table(piece, seqs, rows, past) for piece in self.kinds} if alone else {}
        return [RecurrentView(layer, held, batches, trails, self, tables) for layer in range(self.num_layers)]


class HeldStates:
    """A step of one row for each of `batch` sequences that is run again and again: its places are written anew."""

    def __init__(self, store: RecurrentStore, batch: int) -> None:
        self._store = store
        self._places_B = torch.zeros(batch, dtype=torch.int64, device=store.device)

    def views(self) -> list[PooledView]:
        """One state per layer for one run."""
        return [PooledView(self._store.pool, layer, self._places_B) for layer in range(self._store.num_layers)]

    def fits(self, seqs: Sequence[int]) -> bool:
        """Whether rows of these sequences can be run at once, and their states moved on where they lie."""
        return len(set(seqs)) == len(seqs) and not self._store.marked(seqs)

    def fill(self, seqs: Sequence[int], past: Sequence[int]) -> None:
        """The step's next run is one row of each of these sequences, at most `batch`, after `past` cached tokens."""
        places = self._store.places(seqs, past)
        spare = len(self._places_B) - len(places)
        numbers = to_send(torch.tensor(places + [0] * spare), self._store.device)
        self._places_B.copy_(numbers, non_blocking=True)


@dataclass(frozen=True)
class PooledView:
    """One layer's states at some places of the pool, each for one row."""

    pool: dict[Piece, Tensor]
    layer: int
    places_B: Tensor

    def advance(self, piece: Piece, function: Advance, *rows: Tensor) -> Tensor:
        """Runs `function` over one row of every place, from what is kept, and keeps what it leaves."""
        kept = self.pool[piece][self.layer]
        if isinstance(function, InPlace) and fused.runs(kept, KERNELS[piece]):
            return function.in_place(kept, self.places_B, *rows)
        output, left = function(kept[self.places_B], *(value.unsqueeze(1) for value in rows))
        kept[self.places_B] = left.to(kept.dtype)
        return output.flatten(0, 1)


class HeldPlaces:
    """As `HeldStates`, of exactly `batch` sequences, each with its state in memory of its own."""

    def __init__(self, store: RecurrentStore, batch: int) -> None:
        self._store, self._batch = store, batch
        self._tables = {piece: torch.zeros(batch, 4, dtype=torch.int64) for piece in store.kinds}

    def views(self) -> list[PlacedView]:
        """One state per layer for one run."""
        return [PlacedView(layer, self._store, self._tables) for layer in range(self._store.num_layers)]

    def fits(self, seqs: Sequence[int]) -> bool:
        """Whether rows of these sequences can be run at once: by kernels that each layer has been seen to use."""
        known = len(self._store.moved) == len(self._store.kinds) * self._store.num_layers
        return known and len(set(seqs)) == len(seqs) == self._batch and not self._store.marked(seqs)

    def fill(self, seqs: Sequence[int], past: Sequence[int]) -> None:
        """The step's next run is one row of each of these sequences after `past` cached tokens."""
        for piece, numbers_B4 in self._store.tables(seqs, past).items():
            self._tables[piece].copy_(numbers_B4)


@dataclass(frozen=True)
class PlacedView:
    """One layer's states where `HeldPlaces` says, each for one row."""

    layer: int
    store: RecurrentStore
    tables: dict[Piece, Tensor]

    def advance(self, piece: Piece, function: Advance, *rows: Tensor) -> Tensor:
        """Moves every sequence's state on by its row, by the kernel that did so before."""
        assert _movable(function), "prepared for what has been moved on before"
        return function.move(Places(self.tables[piece], self.layer * self.store.layer_bytes(piece)), *rows)


@dataclass(frozen=True)
class RecurrentView:
    """One layer's states in one step.

    held: those of each sequence of the step, all layers; trails: of marked ones. tables: where the first layer's lie,
    if no sequence is marked or stands twice in the step.
    """

    layer: int
    held: list[dict[Piece, Tensor]]
    spans: list[Span]
    trails: list[Trail | None]
    store: RecurrentStore
    tables: dict[Piece, Tensor]

    def advance(self, piece: Piece, function: Advance, *rows: Tensor) -> Tensor:
        """Runs `function` over every sequence's rows from what is kept, and keeps what it leaves."""
        if self.tables and _movable(function) and function.moves(*rows):
            self.store.moved.add((piece, self.layer))
            return function.move(Places(self.tables[piece], self.layer * self.store.layer_bytes(piece)), *rows)
        parts = []
        for span in self.spans:
            members, cut = range(span.first, span.first + span.count), _cut(span, rows)
            states = [self._state(i, piece) for i in members]
            output, left = function(None if span.begins else _batch(states), *cut)
            for place, i in enumerate(members):
                trail, value = self.trails[i], left[place]
                if trail is None:
                    states[place].copy_(value)
                else:
                    assert span.rows == 1, "rows that may be taken back come one at a time"
                    row = [part[place : place + 1].clone() for part in cut]
                    trail.add((piece, self.layer), function, row, value.to(states[place].dtype))
            parts.append(output.flatten(0, 1))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _state(self, i: int, piece: Piece) -> Tensor:
        """Where the i-th sequence of the step stands: the kept state, or what its marked rows have made of it."""
        kept, trail = self.held[i][piece][self.layer], self.trails[i]
        return kept if trail is None else trail.states.get((piece, self.layer), kept)


@dataclass(frozen=True)
class FreshRecurrent:
    """A layer's state that keeps nothing: every sequence is whole within the step. Gradients flow through it."""

    spans: list[Span]

    def advance(self, piece: Piece, function: Advance, *rows: Tensor) -> Tensor:
        """Runs `function` over every sequence's rows."""
        return torch.cat([function(None, *_cut(span, rows))[0].flatten(0, 1) for span in self.spans])


def _movable(function: Any) -> TypeGuard[Movable]:
    """As `isinstance`, which takes longer than a layer's convolution to compare a class with a protocol."""
    return hasattr(function, "move")


def _batch(places: list[Tensor]) -> Tensor:
    return places[0].unsqueeze(0) if len(places) == 1 else torch.stack(places)


def _cut(span: Span, rows: Iterable[Tensor]) -> list[Tensor]:
    """The span's rows, as (B, T, ...)."""
    stop = span.start + span.count * span.rows
    return [value[span.start : stop].unflatten(0, (span.count, span.rows)) for value in rows]
