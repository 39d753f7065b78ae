"""Decode steps recorded once and replayed: a GPU then works without waiting for the host between its kernels.

A step of one row of each sequence always runs the same kernels; only tokens, positions and places in the cache
differ. They live in tensors that are written before each replay. One record serves every batch up to its size and
every sequence up to its length: sizes come in buckets, and rows that fill a batch up change nothing.
"""

from __future__ import annotations

import gc
import logging
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.components.decoder.model import Decoder
from zoo.components.step import Step
from zoo.engine.memory import HeldStep, Memory
from zoo.engine.pack import Batch
from zoo.registry.errors import ZooError, nearest

log = logging.getLogger("zoo.engine")

MOST = 64
"""Records that are kept: the ones used last. Each holds what its kernels hand to each other."""


CHOICES = ("auto", "on", "off")


def captures(device: torch.device) -> bool:
    """Whether decode steps are recorded: on CUDA devices, unless ZOO_CAPTURE says "off". "on" runs recorded steps
    on every device, where there is nothing to replay step by step. Raises ZooError for another word."""
    choice = os.environ.get("ZOO_CAPTURE", "auto")
    if choice not in CHOICES:
        raise ZooError(
            "unknown way to capture decode steps",
            where="ZOO_CAPTURE",
            found=repr(choice),
            expected=" or ".join(map(repr, CHOICES)),
            hint=nearest(choice, CHOICES),
        )
    return device.type == "cuda" if choice == "auto" else choice == "on"


@dataclass
class Recorded:
    """A step of B rows: its tokens and positions, its places in the cache, and what runs it again."""

    inputs_2B: Tensor
    held: HeldStep
    run: Callable[[], Tensor]


class Captured:
    """The decode steps of a decoder, each recorded when first needed.

    record: as CUDA graphs; without, a step's kernels are launched anew each time, on any device: the reference.
    """

    def __init__(self, decoder: Decoder, memory: Memory, device: torch.device, *, record: bool = True) -> None:
        self.decoder, self.memory, self.device, self.record = decoder, memory, device, record
        self._steps: OrderedDict[tuple[int, int], Recorded] = OrderedDict()
        self._pool: Any = None
        self._possible = True

    def clear(self) -> None:
        """Forgets every record: the weights have moved or changed their kernels."""
        self._steps.clear()

    def run(self, batch: Batch) -> Tensor | None:
        """Logits (R, V) float32 of a batch of single rows, or None where it cannot be run this way.

        They are overwritten by the next run.
        """
        if not self._possible or batch.rows_R is not None or max(batch.rows) > 1:
            return None
        key = (row_bucket(len(batch.rows)), token_bucket(max(batch.past) + 1))
        step = self._steps.get(key) or self._prepared(*key)
        if step is None or not step.held.fits(batch.seqs):
            return None
        self._fill(step, batch)
        self._steps[key] = step
        self._steps.move_to_end(key)
        if len(self._steps) > MOST:
            self._steps.popitem(last=False)
        return step.run()[: len(batch.rows)]

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
        return step if not self.record or self._record(step) else None

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
                forward()
            torch.cuda.current_stream(self.device).wait_stream(stream)
            gc.collect()
            with torch.cuda.graph(graph, pool=self._pool):
                logits_RV = forward()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._possible = False
            log.warning("zoo: decode runs without a CUDA graph: %s", str(error).partition("\n")[0])
            return False

        def replay() -> Tensor:
            graph.replay()
            return logits_RV

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
