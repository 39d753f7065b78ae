"""What one forward pass may see: which tokens, where they stand in their sequences, and each layer's state.

Tokens of all sequences are packed in one stream without a batch dimension. Prefill, chunk, decode and draft
verification differ only in how many rows a sequence has. Letters as in docs/shapes.md: T packed tokens,
B sequences, D model, H query heads, G key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from zoo.components.native.latent import InSlabs
from zoo.components.native.recurrent import Places

Value = TypeVar("Value")
EMBEDDINGS = "embeddings"
"""Where what entered the first layer stands in a step's memo."""

Advance = Callable[..., tuple[Tensor, Tensor]]
"""(state (B, ...) or None where nothing came before, rows (B, T, ...)...) -> (output (B, T, ...), state after it)."""


@runtime_checkable
class InPlace(Protocol):
    """What an `Advance` may have besides: a way to move states of single rows on where they lie, on CUDA devices."""

    def in_place(self, pool: Tensor, places_B: Tensor, *rows: Tensor) -> Tensor:
        """The outputs (B, ...) of one row (B, ...) each; the states at these places of the pool are replaced."""
        ...


@runtime_checkable
class Movable(Protocol):
    """What an `Advance` may have besides: a way to move states of any numbers of rows on where they lie, on a CPU."""

    def moves(self, *rows: Tensor) -> bool:
        """Whether `move` takes such rows."""
        ...

    def move(self, places: Places, *rows: Tensor) -> Tensor:
        """The outputs (T, ...) of the rows (T, ...) of a step; the states at these places are replaced."""
        ...


class KVState(Protocol):
    """One attention layer's view of the cache for this step. Attention cannot tell which policy it got."""

    def attend(
        self,
        q_THd: Tensor,
        k_TGd: Tensor,
        v_TGd: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """Append this step's keys and values, then attend causally within each sequence.

        Returns (T, H, d) in q's dtype. `window`: how many positions a token sees, itself included; None for all.
        `softcap` bounds the scores; None leaves them. `sinks_H`: a score of each head that takes a share of the softmax
        and adds nothing; None for none.
        """
        ...


@dataclass(frozen=True)
class Cached:
    """What is kept of sequences whose new rows are worked on together.

    kept_BSm: one row for each token, those of this step last.
    rows: how many new rows each of the B sequences has.
    seen_BS: which keys the one new row of each sequence sees; None: B is 1, and each row sees those before it.
    """

    kept_BSm: Tensor
    rows: int
    seen_BS: Tensor | None = None

    @property
    def count(self) -> int:
        """How many new rows there are, of all sequences."""
        return self.rows * len(self.kept_BSm)


class LatentState(Protocol):
    """One layer's view of a cache that keeps one row per token, of which the mixer makes keys and values itself."""

    def append(self, new_Tm: Tensor) -> None:
        """Keeps this step's rows."""
        ...

    def read(self, lying: torch.dtype | None = None) -> Sequence[Cached | InSlabs]:
        """All rows of the step's sequences, in the order of the step.

        lying: the type of queries that attend to rows where they lie, by the native kernel; None for no such.
        """
        ...


class RecurrentState(Protocol):
    """One recurrent layer's view of the cache for this step: what it keeps is of constant size."""

    def advance(self, piece: Literal["conv", "ssm"], function: Advance, *rows: Tensor) -> Tensor:
        """Runs `function` over the rows (T, ...) of each sequence, from what is kept, and keeps what it leaves.

        Returns the outputs, (T, ...). Sequences with equally many rows may run as one batch.
        """
        ...


@dataclass(frozen=True)
class Rows:
    """Rows of the residual stream that an encoder made, in place of the embeddings of their tokens.

    rows_N: which rows of the step (int64, on the model's device). values_ND: what stands there.
    """

    rows_N: Tensor
    values_ND: Tensor


@dataclass(frozen=True)
class Step:
    """One forward pass.

    positions_T: position of each row in its own sequence (int64, on the model's device).
    rows: how many rows each sequence has in this step (host integers, sum T).
    past: how many tokens of each sequence are cached already (host integers).
    states: one state per layer, in layer order; None for a layer that keeps nothing.
    media: rows of images and sounds; None in a step of text.
    memo: values computed once per step and shared by all layers, such as rope's angles.
    """

    positions_T: Tensor
    rows: Sequence[int]
    past: Sequence[int]
    states: Sequence[Any]
    media: Rows | None = None
    memo: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def embeddings_TD(self) -> Tensor:
        """What entered the first layer, as the decoder left it for those that come back to it."""
        x_TD: Tensor = self.memo[EMBEDDINGS]
        return x_TD

    def once(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value made for `key` in this step, made on first use."""
        if key not in self.memo:
            self.memo[key] = make()
        value: Value = self.memo[key]
        return value
