"""Seconds of a model's steps on a measured machine, from its card alone."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import exp, log
from typing import Any

from zoo.components.ffn.spec import MoESpec
from zoo.costs.profile import Pace, Product, Profile, Speed
from zoo.costs.work import Matrix, Step, Work, chunk_tokens, prefill
from zoo.registry.errors import ZooError
from zoo.registry.spec import Spec

PLAIN = "plain"
"""Weights that are not quantised."""

FELT = 0.7
"""How much of memory's change is felt by a product that waits for nothing else, in the logarithm. With memory at 34 and
at 57 GB/s single rows took 1.2 (twelve bits, 8192 by 4096) to 1.45 times as long (a step of 1.1 billion weights), as
they also unpack; products that wait less feel it less."""

NO_PACE = Pace(call_s=0.0, item_s=0.0)


@dataclass(frozen=True)
class Seconds:
    """Of a step: its matrix products, reading caches and mixing tokens, small operations, calls and the engine."""

    products: float
    mixing: float
    elements: float
    calls: float

    @property
    def total(self) -> float:
        return self.products + self.mixing + self.elements + self.calls

    def to_dict(self) -> dict[str, float]:
        return asdict(self) | {"total": self.total}


def forecast(profile: Profile, work: Work, device: str = "cpu", memory: float | None = None) -> Forecast:
    """The forecast of a measured machine. Raises ZooError where it was not measured in the work's number format.

    memory: bytes per second at which main memory is read now, where that is known.
    """
    if work.dtype not in profile.speeds:
        raise ZooError(
            "this machine was not measured in this format",
            where="dtype",
            found=work.dtype,
            expected=" or ".join(profile.speeds),
        )
    speed = profile.speeds[work.dtype]
    if work.quantize and work.quantize not in speed.products:
        raise ZooError(
            "this machine was not measured with such weights",
            where="quantize",
            found=f"{work.quantize} beside {work.dtype}",
            expected=" or ".join(speed.products),
        )
    return Forecast(speed, work, device, memory)


@dataclass(frozen=True)
class Forecast:
    """What the steps of a model's `work` take at the speed of a kind of device.

    memory: bytes per second at which main memory is read now; None for as when the speed was measured. unknown: parts
    that were not measured, as far as steps had any: their pace is that of others, or nothing.
    """

    speed: Speed
    work: Work
    device: str = "cpu"
    memory: float | None = None
    unknown: set[str] = field(default_factory=set)

    def prefill(self, prompt: int) -> Seconds:
        """From a prompt to the first new token."""
        return _sum([self.step(step) for step in prefill(prompt, chunk_tokens(self.device))])

    def decode(self, batch: int, context: int) -> Seconds:
        """One step of `batch` sequences that each see `context` earlier tokens."""
        return self.step(Step.decode(batch, context))

    def step(self, step: Step) -> Seconds:
        """Any step."""
        speed = self.speed
        parts = [self._part(spec, count, step) for spec, count in self.work.parts.items()]
        return Seconds(
            products=sum(count * self._product(matrix, step) for matrix, count in self.work.matrices.items()),
            mixing=sum(mixing for mixing, _ in parts),
            elements=self.work.elements(step) / speed.elements,
            calls=speed.step_s + step.sequences * speed.sequence_s + sum(calls for _, calls in parts),
        )

    def _product(self, matrix: Matrix, step: Step) -> float:
        rows = matrix.rows(step)
        if not rows:
            return 0.0
        touched, curve = matrix.touched(rows), self._curves[matrix.kind or PLAIN]
        each = matrix.numel * curve.seconds(matrix.numel, rows * matrix.chosen / touched)
        return touched * each * self._slower(matrix, each)

    def _slower(self, matrix: Matrix, seconds: float) -> float:
        """How many times as long as when it was measured a product takes with memory as it is now."""
        then = self.speed.memory.get(matrix.kind or PLAIN)
        if then is None or self.memory is None:
            return 1.0
        share = min(1.0, self.work.nbytes(matrix) / then / seconds)
        return float((then / self.memory) ** (FELT * share**2))

    def _part(self, spec: Spec, count: int, step: Step) -> tuple[float, float]:
        """Seconds of mixing, and of calls."""
        pace, mixing = self._pace(spec), 0.0
        state = spec.state()
        if step.rows == 1 and state is not None and pace.read:
            mixing = step.sequences * state.nbytes(step.past, self.work.cache_itemsize) / pace.read
        elif step.rows > 1 and pace.multiply:
            each = self.work.mixing(spec, step.middle) / pace.multiply + self.work.channels(spec) * pace.channel_s
            mixing = step.tokens * each
        return count * mixing, count * (pace.call_s + items_of(spec, step) * pace.item_s)

    def _pace(self, spec: Spec) -> Pace:
        """The pace of the part, or of the most special one of its kind that was measured; others are taken for free."""
        words = (spec.pace() or "").split()
        for length in range(len(words), 0, -1):
            pace = self.speed.paces.get(" ".join(words[:length]))
            if pace is not None:
                if length < len(words):
                    self.unknown.add(" ".join(words))
                return pace
        self.unknown.add(spec.pace() or spec.kind)
        return NO_PACE

    @cached_property
    def _curves(self) -> dict[str, Curve]:
        return {kind: Curve(products) for kind, products in self.speed.products.items()}


class Curve:
    """Seconds of a product for each element, between what was measured and beyond: straight in the logarithms."""

    def __init__(self, products: tuple[Product, ...]) -> None:
        sizes: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for p in sorted(products, key=lambda p: (p.elements, p.rows)):
            sizes[p.elements].append((log(p.rows), log(p.seconds)))
        self._rows = [*sizes.values()]
        self._sizes = [log(size) for size in sizes]

    def seconds(self, elements: float, rows: float) -> float:
        """For each element of a matrix of so many; `rows` may be a mean."""
        at = log(max(1.0, rows))
        return exp(
            _between(
                [(s, _between(r, at, 1.0)) for s, r in zip(self._sizes, self._rows, strict=True)], log(elements), 0.0
            )
        )


def _between(points: list[tuple[float, float]], at: float, beyond: float) -> float:
    """The height at a place, straight between its neighbours; past the last it rises by `beyond`, before the first
    it stays."""
    place = bisect_right([x for x, _ in points], at)
    if place == 0:
        return points[0][1]
    (x, y) = points[place - 1]
    if place == len(points):
        return y + beyond * (at - x)
    right, high = points[place]
    return y + (high - y) * (at - x) / (right - x)


def items_of(spec: Spec, step: Step) -> float:
    """What a part does one by one: sequences, or the experts that the step touches."""
    if isinstance(spec, MoESpec):
        return Matrix(1, 1, spec.num_experts, spec.experts_per_token).touched(step.tokens)
    return step.sequences


def _sum(steps: list[Seconds]) -> Seconds:
    parts: dict[str, Any] = {}
    for step in steps:
        for name, value in asdict(step).items():
            parts[name] = parts.get(name, 0.0) + value
    return Seconds(**parts)
