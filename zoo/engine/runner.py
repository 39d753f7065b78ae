"""A packed batch -> logits: the one step function of prefill, chunk and decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from zoo.allocator import keep_freed_memory
from zoo.components.cache.store import fresh_step
from zoo.components.decoder.model import Decoder
from zoo.components.fused import on, wanted
from zoo.components.matrix import weight_bytes
from zoo.components.step import Rows, Step
from zoo.engine.adapters import Adapters
from zoo.engine.capture import Captured
from zoo.engine.interrupts import interruptible
from zoo.engine.media import Placed, rows_of_media
from zoo.engine.memory import Memory
from zoo.engine.pack import Batch, split
from zoo.registry.errors import CapacityError


class Runner:
    """Runs the decoder, with the cache or without. captured: the decode steps that are replayed, where any are."""

    def __init__(
        self, decoder: Decoder, memory: Memory, device: torch.device, captured: Captured | None = None
    ) -> None:
        wanted()  # A word that ZOO_FUSED must not have is refused where no GPU would ask for it, too.
        self.decoder, self.memory, self.device, self.captured = decoder, memory, device, captured
        if device.type == "cpu":
            keep_freed_memory()
        self.adapters = Adapters(decoder)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the decoder's parameters and buffers as they are stored, and of the loaded adapters."""
        return self.adapters.nbytes + weight_bytes(self.decoder)

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """Logits (R, V) float32 of the batch's wanted rows; its tokens are in the cache afterwards."""
        with interruptible():
            return self.begin(batch)()

    @torch.inference_mode()
    def begin(self, batch: Batch, pieces: int | None = None) -> Callable[[], Tensor]:
        """Begins a step; what comes back waits for its logits. pieces: in how many it is cut; None: as is best."""
        with interruptible(), on(self.device):
            return self.compute(batch, self._media(batch), pieces)

    @torch.inference_mode()
    def compute(self, batch: Batch, media: Rows | None, pieces: int | None = None) -> Callable[[], Tensor]:
        """As `begin`, with what encoders made of the batch's images and sounds."""
        with on(self.device):
            return self._compute(batch, media, self.pieces(batch, media) if pieces is None else pieces)

    def pieces(self, batch: Batch, media: Rows | None) -> int:
        """In how many pieces the step is to be cut."""
        return 1 if media is not None else self.decoder.pieces(len(batch.tokens_T), self.device)

    def _compute(self, batch: Batch, media: Rows | None, pieces: int) -> Callable[[], Tensor]:
        if self.captured is not None and media is None and not any(map(self.adapters.resolve, batch.adapters)):
            replayed_RV = self.captured.run(batch)
            if replayed_RV is not None:
                return lambda: replayed_RV
        hidden = [self._hidden(piece, media) for piece in split(batch, pieces)]
        hidden_TD = hidden[0] if len(hidden) == 1 else torch.cat(hidden)
        return partial(self._logits, hidden_TD if batch.rows_R is None else hidden_TD[batch.rows_R])

    @torch.inference_mode()
    def _logits(self, x_RD: Tensor) -> Tensor:
        with on(self.device):
            return self.decoder.logits(x_RD)

    def _hidden(self, batch: Batch, media: Rows | None) -> Tensor:
        states = self.memory.states(batch.seqs, batch.rows, batch.past)
        step = Step(batch.positions_T, batch.rows, batch.past, states, media)
        with self.adapters.applied(batch.adapters, batch.rows, self.device):
            return self.decoder.hidden(batch.tokens_T, step)

    def _media(self, batch: Batch) -> Rows | None:
        if not any(batch.media):
            return None
        spans = zip(batch.media, batch.past, batch.rows, strict=True)
        return rows_of_media(self.decoder, [(media, past, past + rows) for media, past, rows in spans], self.device)

    @torch.no_grad()
    def hidden(self, tokens: Sequence[int], media: Sequence[Placed] = (), adapter: str | None = "auto") -> Tensor:
        """The normalised last hidden states (T, D) of one whole sequence, beside the cache."""
        with interruptible():
            return self.whole(tokens, self._rows(tokens, media), adapter, head=False)

    @torch.no_grad()
    def logits(self, tokens: Sequence[int], media: Sequence[Placed] = (), adapter: str | None = "auto") -> Tensor:
        """Logits (T, V) float32 of one whole sequence, beside the cache; an ordinary tensor that may be written to."""
        with interruptible():
            return self.whole(tokens, self._rows(tokens, media), adapter, head=True)

    @torch.no_grad()
    def whole(self, tokens: Sequence[int], media: Rows | None, adapter: str | None, *, head: bool) -> Tensor:
        """The last hidden states of one whole sequence, or with `head` its logits."""
        step = replace(fresh_step(self.decoder.spec, [len(tokens)], self.device), media=media)
        with on(self.device), self.adapters.applied([adapter], [len(tokens)], self.device):
            hidden_TD = self.decoder.hidden(torch.tensor(tokens, device=self.device), step)
            return self.decoder.logits(hidden_TD) if head else self.decoder.brought(hidden_TD)

    def _rows(self, tokens: Sequence[int], media: Sequence[Placed]) -> Rows | None:
        with on(self.device):
            return rows_of_media(self.decoder, [(media, 0, len(tokens))], self.device) if media else None


def memory_is_full(error: BaseException) -> bool:
    """Whether an allocation failed. torch has a class for GPUs only; the CPU's allocator is known by its words."""
    words = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return words or isinstance(error, MemoryError | torch.OutOfMemoryError)


def no_memory(device: torch.device, error: BaseException) -> CapacityError:
    """What is said of a failed allocation."""
    return CapacityError(
        "memory is full while computing",
        where=str(device),
        found=str(error).partition("\n")[0],
        hint="end other programs, ask for less at once, or load with a smaller max_batch_size or max_context",
    )
