"""Pipeline parallelism while decoding: sequences form groups (micro-batches) that take turns on the stages.

With one group all stages but one would wait, since nobody knows the next tokens before the last stage has ended. With
several, each stage computes the step of another group. As soon as the tokens of a group's step are known, its next step
begins behind those of the others. A sequence may be cancelled or preempted while its step is under way: the step's
tokens are dropped then, and its cache, which has one row more than is known, is not reused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from zoo.engine.outcome import Outcome, read
from zoo.engine.pack import Batch, pack
from zoo.engine.prefixes import Prefixes
from zoo.engine.runner import Runner
from zoo.engine.scheduler import Work
from zoo.engine.sequence import NOWHERE
from zoo.engine.sequence import Sequence as Running

Done = list[tuple[Work, Outcome]]
"""Work that has been computed, and what came of it."""


class Order(Protocol):
    """In which order steps are begun, and what came of them is waited for."""

    def run(self, runner: Runner, work: list[Work]) -> Iterable[Done]:
        """Computes the work; what came of it, to be applied part by part."""
        ...

    def pause(self) -> None:
        """Weights, adapters or what is kept may change now."""
        ...

    def clear(self) -> None:
        """Forgets what was begun: an error has interrupted it."""
        ...


@dataclass(frozen=True)
class Begun:
    """A group's step that has begun. ahead: before the scheduler has planned it. logits: waits for what it gives."""

    work: Sequence[Work]
    batch: Batch
    logits: Callable[[], Tensor]
    ahead: bool


class Turns:
    """The order for stages. What was begun is the beginning of the next work."""

    def __init__(self, prefixes: Prefixes) -> None:
        self._prefixes = prefixes
        self._begun: deque[Begun] = deque()

    def pause(self) -> None:
        """What was begun holds: an adapter that unfinished requests use does not change."""

    def clear(self) -> None:
        """The scheduler has all sequences begin anew."""
        self._begun.clear()

    def run(self, runner: Runner, work: list[Work]) -> Iterator[Done]:
        """Group by group. Others than those whose step has begun are a batch of their own, after which all groups are
        formed anew."""
        rest = [item for item in work if not item.sequence.begun]
        keeps = not (rest and self._begun)
        for part in _parted(rest, runner.decoder.turns(len(rest), runner.device) if keeps and _decodes(rest) else 1):
            self._begin(runner, part, alone=len(part) == len(rest))
        count = len(self._begun)
        for _ in range(count):
            begun = self._begun[0]
            outcomes = read(begun.batch, begun.logits())
            found = [*zip(begun.work, outcomes, strict=True)]
            done = [(item, outcome) for item, outcome in found if item.sequence.begun or not begun.ahead]
            self._begun.popleft()
            for item, _ in done:
                item.sequence.begun = False
            yield done
            if keeps and count > 1:
                self._go_on(runner, [item.sequence for item, _ in done], count)

    def _begin(self, runner: Runner, work: Sequence[Work], *, alone: bool, ahead: bool = False) -> None:
        """alone: no other group keeps the stages busy meanwhile, so that the step may be cut into pieces."""
        batch = pack(work, runner.device)
        self._begun.append(Begun(work, batch, runner.begin(batch, None if alone else 1), ahead))

    def _go_on(self, runner: Runner, seqs: Sequence[Running], count: int) -> None:
        """Begins the next step of a group of `count`, unless it has become too small, or there is no room at once."""
        left = [seq for seq in seqs if seq.cache != NOWHERE]
        if (
            not left
            or any(seq.todo != 1 for seq in left)
            or runner.decoder.turns(count * len(left), runner.device) < count
        ):
            return
        if all(self._prefixes.grow(seq, len(seq.tokens)) for seq in left):
            self._begin(runner, [Work(seq, 1) for seq in left], alone=False, ahead=True)
            for seq in left:
                seq.begun = True


def _decodes(work: Sequence[Work]) -> bool:
    return all(item.rows == 1 for item in work)


def _parted(work: list[Work], count: int) -> Iterator[list[Work]]:
    """In so many parts of about the same size; none of nothing."""
    for i in range(count if work else 0):
        yield work[len(work) * i // count : len(work) * (i + 1) // count]
