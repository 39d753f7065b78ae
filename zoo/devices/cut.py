"""Where a model is cut into pipeline stages: so that the fullest device is as little full as possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from zoo.components.block.spec import SharingSpec, holding
from zoo.components.decoder.spec import DecoderSpec
from zoo.components.kinds import HEAD, KINDS, kind_of, weight_bytes
from zoo.costs.work import BYTES
from zoo.devices.stage import borrowers, lent
from zoo.registry.spec import IndivisibleError, Param


@dataclass(frozen=True)
class Load:
    """What is reckoned as a device's load: weights in `dtype`, or as `quantize` has them, and the cache of one
    sequence of `context` tokens."""

    dtype: str = "bfloat16"
    quantize: str | None = None
    context: int = 0

    def weights(self, params: dict[str, Param]) -> int:
        """Bytes of parameters outside of encoders."""
        kind = None if self.quantize is None else KINDS[self.quantize]
        kinds = {name: None if kind is None else kind_of(param, kind, name == HEAD) for name, param in params.items()}
        return sum(weight_bytes(param, BYTES[self.dtype], kinds[name]) for name, param in params.items())


@dataclass(frozen=True)
class Loads:
    """The loads of all stages that a model can be cut into. model: as one rank of each stage has it."""

    model: DecoderSpec
    load: Load

    def of(self, start: int, stop: int) -> int:
        """Bytes of a stage of layers `start` to `stop` - 1."""
        weights = self._layers[stop] - self._layers[start] - self._held_once(start, stop)
        return weights + self._ends(start, stop) + self._states[stop] - self._states[start] + self._copies(start, stop)

    def _ends(self, start: int, stop: int) -> int:
        """Of embedding, head, norm and encoders."""
        begins, ends, tied = start == 0, stop == len(self.model.layers), self.model.tied_embeddings
        embedding, head, encoders = self._outer
        return begins * (embedding + encoders) + ends * head - (begins and ends and tied) * embedding

    @cached_property
    def _outer(self) -> tuple[int, int, int]:
        """Bytes of the embedding; of head and norm; of encoders, which are never quantised."""
        own, plain = self.model.parameters(), Load(self.load.dtype)
        embedding = self.load.weights({"embed": own["embed.weight"]})
        head = self.load.weights({HEAD: own[HEAD]}) if HEAD in own else embedding
        encoders = sum(plain.weights(spec.all_parameters()) for spec in self.model.encoders().values())
        return embedding, head + self.load.weights(self.model.norm.all_parameters()), encoders

    @cached_property
    def _layers(self) -> list[int]:
        """Of layers, each with the shared block that it uses, summed up."""
        alone = [holding((layer,))[0].all_parameters() for layer in self.model.layers]
        return [0, *accumulate(self.load.weights(params) for params in alone)]

    @cached_property
    def _blocks(self) -> list[int]:
        """Of shared blocks, without what belongs to single uses."""
        return [self.load.weights(block.all_parameters()) for block in self.model.shared]

    def _held_once(self, start: int, stop: int) -> int:
        """What is counted too often of shared blocks that several layers of a stage use."""
        layers = self.model.layers[start:stop]
        numbers = [layer.number for layer in layers if isinstance(layer, SharingSpec)]
        return sum(self._blocks[number] for number in numbers) - sum(self._blocks[number] for number in {*numbers})

    @cached_property
    def _states(self) -> list[int]:
        size = BYTES[self.load.dtype]
        states = self.model.states()
        return [0, *accumulate(state.nbytes(self.load.context, size) if state else 0 for state in states)]

    def _copies(self, start: int, stop: int) -> int:
        """Of the states of earlier layers that some of these borrow."""
        size, lenders = BYTES[self.load.dtype], {lender: at for at, lender in self._borrowed if start <= at < stop}
        states = [lent(self.model, lender) for lender in lenders if lender < start]
        return sum(state.nbytes(self.load.context, size) for state in states if state)

    @cached_property
    def _borrowed(self) -> list[tuple[int, int]]:
        return [(number, borrowed.layer) for number, borrowed in borrowers(self.model)]


def cut(model: DecoderSpec, stages: int, load: Load, room: Sequence[int] | None = None) -> tuple[int, ...]:
    """Where the stages begin, and the end: neighbouring layers, so that the stage which takes the largest part of its
    room takes as little of it as can be.

    room: bytes that each stage's devices have, of which the one with the least counts; None: all have the same.
    Raises IndivisibleError where there are fewer places to cut than are needed, naming what forbids them.
    """
    count, ties = len(model.layers), tied(model)
    borders = [at for at in range(count + 1) if not any(first < at <= last for first, last, _ in ties)]
    if len(borders) <= stages:
        where = ties[0][2] if ties else "model.layers"
        why = f"{count} layers for {stages} stages"
        if ties:
            why = f"it needs layer {ties[0][0]} on its own device, so that there are {len(borders) - 1} stages at most"
        raise IndivisibleError(where, why)
    loads, rooms = Loads(model, load), [max(1, size) for size in room or [1] * stages]
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, (0,))}
    for stage in range(stages):
        best = _further(best, borders, loads, rooms[stage])
    return best[count][2]


def _further(
    best: dict[int, tuple[float, float, tuple[int, ...]]], borders: Sequence[int], loads: Loads, room: int
) -> dict[int, tuple[float, float, tuple[int, ...]]]:
    """The best ways to end one more stage at each border: by the fullest one, then by the sum of squares."""
    found: dict[int, tuple[float, float, tuple[int, ...]]] = {}
    for start, (most, squares, way) in best.items():
        for stop in borders:
            if stop > start:
                full = loads.of(start, stop) / room
                new = (max(most, full), squares + full * full, (*way, stop))
                found[stop] = min(found.get(stop, new), new)
    return found


def tied(model: DecoderSpec) -> list[tuple[int, int, str]]:
    """Pairs of layers that must be on one device, and the part of the later one that needs the earlier one."""
    found = []
    for number, layer in enumerate(model.layers):
        for path, spec in layer.walk(f"model.layers.{number}"):
            earlier, borrowed = spec.needs(model.layers[:number]), spec.borrows()
            if earlier is not None:
                found.append((earlier, number, path))
            if borrowed is not None and lent(model, borrowed.layer) is None:
                found.append((borrowed.layer, number, path))
    return found
