"""What holds the state of all sequences between steps, for a group of layers with equal state Specs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from zoo.components.build import load
from zoo.components.decoder.spec import DecoderSpec
from zoo.components.step import Step
from zoo.registry.spec import StateSpec


class Store(Protocol):
    """The state of every sequence for one group of layers. A Spec of the cache slot names its class.

    The class is called with (spec, num_layers, dtype, device, storage, budget_bytes), and has a static method
    `fresh(rows, num_layers)` for the states of layers in a step that starts and ends with whole sequences.
    On the device "meta" it counts what the same store of another device of the model takes: `views` is not called.
    """

    @property
    def nbytes(self) -> int:
        """Bytes that sequences hold now."""
        ...

    def cost(self, tokens: int) -> int:
        """Bytes that a sequence of `tokens` tokens holds, over all layers of the group, as allocated."""
        ...

    def grow(self, seq: int, tokens: int) -> None:
        """Makes room for `tokens` tokens of a sequence in all, new or known. Raises CapacityError."""
        ...

    def free(self, seq: int) -> None:
        """Gives a sequence's memory back."""
        ...

    def views(self, seqs: Sequence[int], rows: Sequence[int], past: Sequence[int]) -> list[Any]:
        """One state per layer of the group for a step of `rows` new tokens after `past` cached ones each.

        A sequence may stand in `seqs` several times, with one row each that follow one another: each is computed as
        if it were the only one in its step.
        """
        ...

    @property
    def back(self) -> int | None:
        """How many rows can be taken back at most; None for any number."""
        ...

    def mark(self, seq: int, past: int, rows: int) -> None:
        """Of the next rows of a sequence, from `past` on, up to `rows` may be taken back; they come one at a time."""
        ...

    def rewind(self, seq: int, tokens: int) -> None:
        """A marked sequence is `tokens` long: rows since the mark that stand beyond are taken back. Ends the mark."""
        ...


@runtime_checkable
class Reusable(Store, Protocol):
    """A store whose sequences can begin where others stand. Without these methods, models that it serves compute
    every prompt from its first token."""

    def serves(self, held: int, tokens: int) -> bool:
        """Whether a sequence of `held` tokens still has all that one needs which goes on after its first `tokens`."""
        ...

    def holds(self, seqs: Sequence[int]) -> int:
        """Bytes that these sequences hold, those that they share counted once; one without room holds none."""
        ...

    def takes(self, source: int, tokens: int, room: int, move: bool) -> int:
        """Bytes that `adopt` would take, fewer than none where it gives some back."""
        ...

    def adopt(self, source: int, seq: int, tokens: int, room: int, move: bool) -> None:
        """Gives a new sequence the state of another after its first `tokens` tokens, and room for `room` in all.

        move: the other's own memory, without a copy where its size fits; the other then has nothing. Without, neither
        sequence sees what the other does from here on.
        """
        ...

    def trim(self, seq: int, tokens: int) -> bool:
        """Gives back the room of a sequence behind its first `tokens` tokens; False, and nothing done, where that needs
        a copy. Asked only where every store of the model serves any number of a sequence's tokens."""
        ...


def make_store(
    spec: StateSpec,
    num_layers: int,
    dtype: torch.dtype,
    device: str | torch.device,
    storage: str = "auto",
    budget_bytes: int | None = None,
) -> Store:
    """The store that a state Spec asks for.

    storage: "slab", one growable piece per sequence and layer; "pages", a pool that sequences share; "auto" takes
    slabs on the CPU and pages elsewhere. budget_bytes: never hold more; None sets no limit.
    """
    store: Store = load(spec.module)(spec, num_layers, dtype, torch.device(device), storage, budget_bytes)
    return store


def fresh_states(spec: DecoderSpec, rows: Sequence[int]) -> list[Any]:
    """One state per layer for a step of whole sequences with `rows` tokens each; nothing is kept after it."""
    parts = stored_parts(spec.states())
    counts = Counter(state for state in parts if state is not None)
    kinds = {state: iter(load(state.module).fresh(rows, count)) for state, count in counts.items()}
    return by_layer(spec.states(), [None if state is None else next(kinds[state]) for state in parts])


def stored_parts(states: Sequence[StateSpec | None]) -> list[StateSpec | None]:
    """What the layers keep, one after the other, states of several parts taken apart."""
    return [part for state in states for part in ((None,) if state is None else state.parts())]


def by_layer(states: Sequence[StateSpec | None], parts: Iterable[Any]) -> list[Any]:
    """The parts put together again: one thing for each layer, a tuple where its state has several parts."""
    rest = iter(parts)
    found = [tuple(next(rest) for _ in ((None,) if state is None else state.parts())) for state in states]
    return [parts if len(parts) > 1 else parts[0] for parts in found]


def fresh_step(spec: DecoderSpec, rows: Sequence[int], device: str | torch.device = "cpu") -> Step:
    """The step of whole sequences with `rows` tokens each, packed one after the other."""
    positions_T = torch.cat([torch.arange(count, device=device) for count in rows])
    return Step(positions_T, list(rows), [0] * len(rows), fresh_states(spec, rows))
