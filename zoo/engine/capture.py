"""Decode steps recorded once and replayed: a device then works without waiting for the host between its kernels.

A step of one row of each sequence always runs the same kernels; only tokens, positions and places in the cache
differ. They live in tensors that are written before each replay. On a GPU a record is a CUDA graph and serves every
batch up to its size and every sequence up to its length: sizes come in buckets, and rows that fill a batch up change
nothing. On a CPU it is the calls of the native kernels and serves batches of its size.
"""

from __future__ import annotations

import gc
import logging
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from zoo.components import native
from zoo.components.cache.kv import UnpreparedError
from zoo.components.decoder.model import Decoder
from zoo.components.native.calls import Arena, Record
from zoo.components.step import Step
from zoo.engine.memory import HeldStep, Memory
from zoo.engine.pack import Batch
from zoo.registry.errors import ZooError, nearest

log = logging.getLogger("zoo.engine")

MOST = 64
"""Records that are kept: the ones used last. Each holds what its kernels hand to each other."""


CHOICES = ("auto", "on", "off")

Key = tuple[int, int, int]
Way = Literal["graphs", "calls", "anew"]
"""How decode steps are recorded: as CUDA graphs, as calls of the native kernels, or not at all but run over the same
fixed tensors, which is the reference."""


def captures(device: torch.device, spread: bool = False) -> Way | None:
    """How decode steps are recorded, None for planning each anew: as graphs on CUDA devices, as calls where the native
    kernels run, unless ZOO_CAPTURE says "off". With "on" every device runs steps over fixed tensors.

    spread: the model is shared out over ranks, whose messages calls would leave out. Raises ZooError for another word.
    """
    choice = os.environ.get("ZOO_CAPTURE", "auto")
    if choice not in CHOICES:
        raise ZooError(
            "unknown way to capture decode steps",
            where="ZOO_CAPTURE",
            found=repr(choice),
            expected=" or ".join(map(repr, CHOICES)),
            hint=nearest(choice, CHOICES),
        )
    if choice == "off":
        return None
    if device.type == "cuda" or choice == "on":
        return "graphs" if device.type == "cuda" else "anew"
    return "calls" if device.type == "cpu" and native.missing() is None and not spread else None


@dataclass
class Recorded:
    """A step of B rows: its tokens and positions, its places in the cache, and what runs it again."""

    inputs_2B: Tensor
    held: HeldStep
    run: Callable[[], Tensor]


class Captured:
    """The decode steps of a decoder, each recorded when first needed."""

    def __init__(self, decoder: Decoder, memory: Memory, device: torch.device, way: Way) -> None:
        self.decoder, self.memory, self.device, self.way = decoder, memory, device, way
        self._steps: OrderedDict[Key, Recorded] = OrderedDict()
        self._pool: Any = None
        self._arena = Arena()
        self._logits: dict[int, Tensor] = {}
        self._possible = True
        parts = [*decoder.modules()]
        self._hooks = [h for part in parts for h in (part._forward_pre_hooks, part._forward_hooks)]

    def clear(self) -> None:
        """Forgets every record: the weights have moved or changed their kernels."""
        self._steps.clear()
        self._logits.clear()

    def run(self, batch: Batch) -> Tensor | None:
        """Logits (R, V) float32 of a batch of single rows, or None where it cannot be run this way.

        They are overwritten by the next run. Raises UnpreparedError where it cannot, after states have moved on: what
        was cached of the batch's sequences must be computed again.
        """
        if not self._possible or batch.rows_R is not None or max(batch.rows) > 1:
            return None
        if self.way == "calls" and any(self._hooks):
            return None  # hooks are Python's, and whoever set them wants them called
        key = self._key(batch)
        step = self._steps.get(key) or self._prepared(*key[:2])
        if step is None or not step.held.fits(batch.seqs):
            return None
        self._fill(step, batch)
        self._steps[key] = step
        self._steps.move_to_end(key)
        if len(self._steps) > MOST:
            self._steps.popitem(last=False)
        try:
            return step.run()[: len(batch.rows)]
        except UnpreparedError:
            self._possible = False
            if self.memory.moves:
                raise
            return None

    def _key(self, batch: Batch) -> Key:
        """What a record must fit: rows, tokens, and the threads that calls were made for."""
        rows, called = len(batch.rows), self.way == "calls"
        size = rows if called else row_bucket(rows)
        return size, token_bucket(max(batch.past) + 1), torch.get_num_threads() if called else 0

    def _fill(self, step: Recorded, batch: Batch) -> None:
        rows = len(batch.rows)
        step.inputs_2B[0, :rows].copy_(batch.tokens_T, non_blocking=True)
        step.inputs_2B[1, :rows].copy_(batch.positions_T, non_blocking=True)
        step.held.fill(batch.seqs, batch.past)

    def _prepared(self, size: int, tokens: int) -> Recorded | None:
        """A step of `size` rows of sequences of up to `tokens` tokens, not recorded yet."""
        held = self.memory.hold(size, tokens)
        if held is None:
            self._possible = False
            return None
        inputs_2B = torch.zeros(2, size, dtype=torch.int64, device=self.device)

        def forward() -> Tensor:
            step = Step(inputs_2B[1], [1] * size, [tokens - 1] * size, held.states())
            logits_RV: Tensor = self.decoder(inputs_2B[0], step)
            return logits_RV

        step = Recorded(inputs_2B, held, forward)
        if self.way == "calls":
            step.run = partial(self._first, step, forward)
        return step if self.way != "graphs" or self._record(step) else None

    def _first(self, step: Recorded, forward: Callable[[], Tensor]) -> Tensor:
        """Runs a step for the first time, which records its calls, unless they cannot be made again."""
        record = Record(self._arena)
        logits_RV = record.make(forward)
        if record.refused is not None:
            self._possible = False
            log.info("zoo: decode steps are planned anew: %s cannot be recorded", record.refused)

        def replay() -> Tensor:
            record.run()
            return logits_RV

        step.run = replay
        return logits_RV

    def _kept(self, logits_RV: Tensor) -> Tensor:
        """Where logits of so many rows are left by every record that has them, so that each need not hold its own."""
        return self._logits.setdefault(len(logits_RV), torch.empty_like(logits_RV))

    def _record(self, step: Recorded) -> bool:
        """Turns what runs the step into a replay; False, said once, for a model whose steps cannot be recorded."""
        # With nothing but spare rows: no sequence's state moves.
        step.held.fill([], [])
        graph, forward = torch.cuda.CUDAGraph(), step.run
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            # Once by itself: what is made on first use must not be made inside of the record.
            with torch.cuda.stream(stream):
                kept_RV = self._kept(forward())
            torch.cuda.current_stream(self.device).wait_stream(stream)
            gc.collect()
            with torch.cuda.graph(graph, pool=self._pool):
                kept_RV.copy_(forward())
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._possible = False
            log.warning("zoo: decode runs without a CUDA graph: %s", str(error).partition("\n")[0])
            return False

        def replay() -> Tensor:
            graph.replay()
            return kept_RV

        step.run = replay
        return True


def row_bucket(rows: int) -> int:
    """The batch size of the record for `rows` sequences: 1, 2, 4, 8, then steps of 8, from 64 on of 16."""
    if rows <= 8:
        return 1 << (rows - 1).bit_length()
    step = 8 if rows <= 64 else 16
    return -(-rows // step) * step


def token_bucket(tokens: int) -> int:
    """The length of the record for sequences of `tokens` tokens: steps of 256, then of 1 / 16 of a power of two."""
    step = max(256, (1 << (tokens - 1).bit_length()) // 16)
    return -(-tokens // step) * step
