"""The first rank's runner, whose steps the other ranks repeat with their shares of the model, and its messages.

Only the first rank has requests, a scheduler and a sampler. Whatever it does to its cache, and each step that it runs,
the others do too. Messages hold numbers and names, never objects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zoo.components.step import Rows
from zoo.engine.adapters import Adapters
from zoo.engine.memory import MIRRORED, Memory
from zoo.engine.pack import Batch
from zoo.engine.runner import Runner
from zoo.loading.adapters.read import Adapter
from zoo.registry.errors import CapacityError
from zoo.registry.spec import StateSpec

Message = dict[str, Any]

Reads = Callable[[str], Adapter]
"""Reads a rank's own part of an adapter."""

ANSWERED = ("add", "remove", "merge")
"""Changes of the adapters, after which ranks say that they are done."""


class Spreads(Protocol):
    """What hands a tensor to all ranks."""

    def spread(self, x: Tensor) -> Tensor:
        """The first rank's tensor, on every rank: the others pass one of its shape and type."""
        ...


class Others(Spreads, Protocol):
    """The other ranks, as the first one knows them."""

    @property
    def elsewhere(self) -> Sequence[tuple[Sequence[StateSpec | None], int | None]]:
        """What layers of other stages keep of sequences, and the bytes that their caches may take."""
        ...

    def mirror(self, memory: Memory) -> None:
        """From now on they repeat what changes this memory."""
        ...

    def together(self, task: str, message: Message, *, settled: bool = True) -> AbstractContextManager[None]:
        """A block that they run as well: `follow` with this task and message. settled: nothing is under way then."""
        ...

    def later(self, wait: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """The end of such a block, to be run later: as what comes back is called, and in the order of the blocks."""
        ...

    def agree(self) -> None:
        """Waits until they have done what they were told, where that is `ANSWERED`."""
        ...

    def close(self) -> None:
        """They end."""
        ...


class Leading(Runner):
    """The first rank's runner."""

    def __init__(self, others: Others, runner: Runner) -> None:
        super().__init__(runner.decoder, runner.memory, runner.device, runner.captured)
        self.others = others
        self.adapters = Shared(runner.decoder, others)
        others.mirror(runner.memory)

    @torch.inference_mode()
    def compute(self, batch: Batch, media: Rows | None, pieces: int | None = None) -> Callable[[], Tensor]:
        batch = replace(batch, adapters=[*map(self.adapters.resolve, batch.adapters)])
        pieces = self.pieces(batch, media) if pieces is None else pieces
        message = _told(batch) | {"pieces": pieces} | _shape(media)
        settled = media is not None or self.decoder.stages == 1
        with self.others.together("compute", message, settled=settled):
            _handed_on(media, self.others)
            return self.others.later(super().compute(batch, media, pieces))

    def whole(self, tokens: Sequence[int], media: Rows | None, adapter: str | None, *, head: bool) -> Tensor:
        adapter = self.adapters.resolve(adapter)
        message = {"tokens": [*tokens], "adapter": adapter, "head": head}
        with self.others.together("whole", message | _shape(media)):
            _handed_on(media, self.others)
            return super().whole(tokens, media, adapter, head=head)


class Shared(Adapters):
    """The first rank's adapters: the others read and change theirs alike. What requests choose is known here."""

    def __init__(self, module: nn.Module, others: Others) -> None:
        super().__init__(module)
        self._others = others

    def add(self, name: str, adapter: Adapter) -> None:
        """Raises, beside RequestError, what another rank does, and then the run is over."""
        super().add(name, adapter)
        self._tell("add", name, adapter.ref)

    def remove(self, name: str, users: Sequence[str | None] = ()) -> None:
        """As for one rank."""
        super().remove(name, users)
        self._tell("remove", name)

    def merge(self, name: str, users: Sequence[str | None] = ()) -> None:
        """As for one rank."""
        super().merge(name, users)
        self._tell("merge", name)

    def _tell(self, task: str, name: str, ref: str | None = None) -> None:
        with self._others.together(task, {"name": name, "ref": ref}):
            pass
        self._others.agree()


def follow(runner: Runner, group: Spreads, task: str, message: Any, reads: Reads) -> None:
    """What the first rank does, on another one. message: a task's, or the arguments of a method of the cache."""
    if task in ANSWERED:
        _adapt(runner, task, message, reads)
    elif task in MIRRORED:
        if getattr(runner.memory, task)(*message) is False:
            raise CapacityError("the cache of this device is full", hint="load with a smaller max_batch_size")
    elif task == "compute":
        batch = _batch(message, runner.device)
        runner.compute(batch, _media(message, runner, group), message["pieces"])()
    else:
        assert task == "whole", task
        media = _media(message, runner, group)
        runner.whole(message["tokens"], media, message["adapter"], head=message["head"])


def _adapt(runner: Runner, task: str, message: Message, reads: Reads) -> None:
    adapters, name = runner.adapters, message["name"]
    if task == "add":
        adapters.add(name, reads(message["ref"]))
    elif task == "remove":
        adapters.remove(name)
    else:
        adapters.merge(name)
    if runner.captured is not None:
        runner.captured.clear()


def _told(batch: Batch) -> Message:
    """The numbers of a step."""
    return {
        "tokens": batch.tokens_T.tolist(),
        "positions": batch.positions_T.tolist(),
        "picks": None if batch.rows_R is None else batch.rows_R.tolist(),
        "seqs": batch.seqs,
        "rows": batch.rows,
        "past": batch.past,
        "adapters": batch.adapters,
    }


def _batch(message: Message, device: torch.device) -> Batch:
    """The step that the numbers say; what comes of it is the first rank's business."""
    picks = message["picks"]
    return Batch(
        tokens_T=torch.tensor(message["tokens"], device=device),
        positions_T=torch.tensor(message["positions"], device=device),
        rows_R=None if picks is None else torch.tensor(picks, dtype=torch.int64, device=device),
        seqs=message["seqs"],
        rows=message["rows"],
        past=message["past"],
        wanted=[],
        adapters=message["adapters"],
        media=[()] * len(message["seqs"]),
    )


def _shape(media: Rows | None) -> Message:
    """Where rows of media stand, and how wide they are."""
    if media is None:
        return {"media": None}
    dtype = str(media.values_ND.dtype).removeprefix("torch.")
    return {"media": media.rows_N.tolist(), "width": media.values_ND.shape[1], "dtype": dtype}


def _handed_on(media: Rows | None, others: Spreads) -> None:
    if media is not None:
        others.spread(media.values_ND.contiguous())


def _media(message: Message, runner: Runner, group: Spreads) -> Rows | None:
    if message["media"] is None:
        return None
    rows_N = torch.tensor(message["media"], device=runner.device)
    dtype = getattr(torch, message["dtype"])
    return Rows(rows_N, group.spread(torch.empty(len(rows_N), message["width"], dtype=dtype, device=runner.device)))
