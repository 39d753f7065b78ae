"""Measuring this machine, once, for the figures that `zoo inspect` gives before anything is loaded.

Products are timed as loaded models run them, on more matrices than caches hold, less what calling them takes. All
else is timed in the engine, on small models made of one kind of part with random weights: what their steps take beyond
their products is what the part takes.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from zoo.bench.limits import DTYPES, machine_limits, reading
from zoo.bench.measure import decode_steps, random_prompts
from zoo.bench.shapes import ATTENTION, FFNS, MIXERS, NARROW, Node, card
from zoo.bench.timing import fastest, typical
from zoo.components import linear
from zoo.components.ffn.gated import Gated
from zoo.components.ffn.spec import GatedSpec, MoESpec
from zoo.components.kinds import KINDS, Kind
from zoo.components.linear import Linear
from zoo.components.norm.rms import RMS
from zoo.components.norm.spec import RMSSpec
from zoo.components.quantised import Quantised
from zoo.costs.forecast import PLAIN, Forecast, items_of
from zoo.costs.profile import Key, Pace, Product, Profile, Speed
from zoo.costs.work import Step, Work, chunk_tokens, prefill

if TYPE_CHECKING:
    from zoo.model import Model

Found = TypeVar("Found")

Report = Callable[[str], None]

Rate = Callable[[], float]
"""At how many bytes per second memory is read now."""

SHAPES = ((512, 512), (2048, 2048), (8192, 4096))
"""Rows and columns of the matrices to time; times of others lie in between."""

LEAST = 64
"""Rows and columns of one that takes hardly longer than its call."""

ROWS = (1, 2, 4, 6, 8, 12, 16, 32, 64, 128, 256, 512)
WEIGHTS = 96 << 20
"""Elements of all matrices that are multiplied by turns: no processor's caches hold them."""

SLOW = 0.05
"""Seconds of one product that cannot be waiting for memory: it is timed alone."""

ENOUGH = 0.1
"""Seconds to time equal products for, three times at least."""

LAYERS = 8
"""Of a model of one part."""

FEW = 2
"""Of one with few layers: what does not grow with them is the engine's."""

SHORT, LONG = 32, 1024
"""Tokens of a short and of a long sequence."""

MANY, FAR = 16, 4
"""Short sequences that decode together, and long ones."""

CUT = 64
"""Tokens by which long sequences are shorter where they go on."""

CALLS = 20
"""Of one product in a row."""

STEPS = 24
"""Steps to time."""

STEADY = 0.15
"""By how much the rate of memory may differ and count as the same."""

TRIES = 3
"""Of a measurement, while memory changes: other machines share it."""

ROUNDS = 2
"""Turns of all runs of a small model, of which the faster ones count: others may use the machine for a moment."""

TINY = 1e-9
"""Seconds that stand for what was too short to see."""

DIM = 256
WIDE = (512, 1024, 4096)
"""Rows, stream and hidden size of a feed-forward whose small operations are timed."""

LIKE = {"mlp": "gated", "clamped": "gated"}
"""Feed-forwards that are called like another one and are not timed by themselves."""


def profile(device: torch.device, report: Report) -> Profile:
    """Measures the device. `report` is told what comes next."""
    start = time.perf_counter()
    report("the machine's limits: reading, multiplying, calling")
    limits = machine_limits(device)
    rate = reading(limits) if device.type == "cpu" else None
    speeds = {name: _speed(device, name, rate, report) for name in DTYPES}
    return Profile(
        key=Key.here(torch.cuda.get_device_name(device) if device.type == "cuda" else None),
        measured=datetime.now(UTC).isoformat(timespec="seconds"),
        limits=limits,
        speeds=speeds,
        seconds=time.perf_counter() - start,
    )


def steadily(rate: Rate, measure: Callable[[], Found]) -> tuple[Found, float, bool]:
    """What is measured, the bytes per second at which memory was read before and after, and whether that was about the
    same: up to TRIES times, until it is."""
    for _ in range(TRIES):
        before, found, after = rate(), measure(), rate()
        if steady := max(before, after) <= min(before, after) * (1 + STEADY):
            break
    return found, (before + after) / 2, steady


def _speed(device: torch.device, dtype: str, rate: Rate | None, report: Report) -> Speed:
    products, memory = {}, {}
    for name in (PLAIN, *(KINDS if dtype == "bfloat16" and device.type == "cpu" else ())):
        report(f"products in {dtype}" if name == PLAIN else f"products with {name} weights in {dtype}")
        times = partial(times_of_products, device, DTYPES[dtype], KINDS.get(name))
        if rate is None:
            products[name] = times()
        else:
            products[name], memory[name], _ = steadily(rate, times)
    report(f"the engine and its parts in {dtype}")
    return Parts(device, dtype, products).speed(report).model_copy(update={"memory": memory})


@torch.inference_mode()
def times_of_products(device: torch.device, dtype: torch.dtype, kind: Kind | None = None) -> tuple[Product, ...]:
    """Every shape with every number of rows, less what calling a product takes: what calls take in the engine, which
    records steps and calls without Python where it can, is in the paces of parts."""
    call, found = empty_seconds(device, dtype, kind), list[Product]()
    for outputs, inputs in SHAPES:
        numel = outputs * inputs
        layers = _linears(-(-WEIGHTS // numel), outputs, inputs, device, dtype, kind)
        taken = [_each(layers, torch.randn(count, inputs, device=device).to(dtype)) for count in ROWS]
        for at, count in enumerate(ROWS):
            # More rows take no less: where they seem to, memory was slower for fewer.
            least = max(TINY * TINY, min(taken[at:]) - call)
            found.append(Product(elements=numel, rows=count, seconds=least / numel))
    return tuple(found)


def _each(layers: Sequence[Linear], x_TI: Tensor) -> float:
    """Seconds of a product with one of equal matrices."""
    # Many rows do not wait for memory: some of the matrices are enough.
    some = layers[: max(2, len(layers) * 16 // max(16, len(x_TI)))]
    if (first := fastest(lambda: some[0](x_TI), 1)) > SLOW:
        return first
    repeats = max(3, min(20, round(ENOUGH / (first * len(some)))))
    return typical(lambda: [layer(x_TI) for layer in some], repeats) / len(some)


def _linears(
    count: int, outputs: int, inputs: int, device: torch.device, dtype: torch.dtype, kind: Kind | None
) -> list[Linear]:
    """Several as loaded models store them. Of quantised ones, the first is made and copied, which takes less time."""
    if kind is None:
        return [_linear(outputs, inputs, device, dtype) for _ in range(count)]
    layers = [_linear(outputs, inputs, device, dtype, pack=False) for _ in range(count)]
    first = Quantised.of(kind, layers[0].weight.detach())
    for layer in layers:
        layer.store("weight", lambda _: replace(first, codes=first.codes.clone(), scales=first.scales.clone()))
    return layers


@torch.inference_mode()
def empty_seconds(device: torch.device, dtype: torch.dtype, kind: Kind | None = None) -> float:
    """What a product takes whose matrix takes no time."""
    (layer,), x_TI = _linears(1, LEAST, LEAST, device, dtype, kind), torch.randn(1, LEAST).to(device, dtype)
    return fastest(lambda: [layer(x_TI) for _ in range(CALLS)], 20) / CALLS


@torch.inference_mode()
def elements_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Activations per second that stand between the products of a gated feed-forward: its norm, its gate, its sum."""
    rows, dim, hidden = WIDE
    norm, form = RMS(RMSSpec(dim=dim, eps=1e-5)).to(device, dtype), GatedSpec(dim=dim, hidden_dim=hidden)
    x_TD, y_T2F = (torch.randn(rows, size, device=device).to(dtype) for size in (dim, 2 * hidden))

    def work() -> None:
        for _ in range(LAYERS):
            norm(x_TD)
            Gated.between(form, y_T2F)
            x_TD.add(x_TD)

    return LAYERS * rows * (2 * dim + 3 * hidden) / fastest(work, 5)


def _linear(outputs: int, inputs: int, device: torch.device, dtype: torch.dtype, pack: bool = True) -> Linear:
    """As a loaded model stores it."""
    with torch.device(device):
        layer = Linear(inputs, outputs).to(dtype)
    layer.weight.requires_grad_(False)
    torch.nn.init.normal_(layer.weight, std=0.02)
    store = linear.fastest(layer.weight) if pack else None
    if store is not None:
        layer.store("weight", store)
    return layer


@dataclass(frozen=True)
class Run:
    """Seconds of a step, or of the steps of a prompt."""

    steps: tuple[Step, ...]
    seconds: float


@dataclass(frozen=True)
class Times:
    """A small model's runs, by name."""

    work: Work
    runs: dict[str, Run]
    hot: Hot

    def left(self, name: str, speed: Speed) -> float:
        """Seconds of a run that the speed does not explain. The small model's own products stand in caches."""
        run, known = self.runs[name], Forecast(speed, self.work)
        explained = (known.step(step) for step in run.steps)
        products = sum(self.hot.products(self.work, step) for step in run.steps)
        return run.seconds - products - sum(seconds.total - seconds.products for seconds in explained)

    def mixed(self, name: str) -> float:
        """Multiply-adds of mixing tokens."""
        work, steps = self.work, self.runs[name].steps
        return sum(n * s.tokens * work.mixing(spec, s.middle) for spec, n in work.parts.items() for s in steps)

    def channels(self, name: str) -> float:
        """Channels of states, each as often as a token moves it on."""
        tokens = sum(step.tokens for step in self.runs[name].steps)
        return sum(n * tokens * self.work.channels(spec) for spec, n in self.work.parts.items())


class Hot:
    """Seconds of products with the matrices of a small model, as many as it has, without their calls: they stay in
    caches, but not in the nearest."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype, self._known = device, dtype, dict[tuple[int, ...], float]()

    def products(self, work: Work, step: Step) -> float:
        """All of a step."""
        total = 0.0
        for matrix, count in work.matrices.items():
            if rows := matrix.rows(step):
                touched = matrix.touched(rows)
                each = max(1, round(rows * matrix.chosen / touched))
                total += count * touched * self._seconds(count * matrix.experts, matrix.outputs, matrix.inputs, each)
        return total

    @torch.inference_mode()
    def _seconds(self, count: int, outputs: int, inputs: int, rows: int) -> float:
        """Of a product with one of `count` matrices that take turns."""
        key = (count, outputs, inputs, rows)
        if key not in self._known:
            layers = _linears(count, outputs, inputs, self.device, self.dtype, None)
            x_TI, turns = torch.randn(rows, inputs).to(self.device, self.dtype), -(-CALLS // count)
            taken = fastest(lambda: [layer(x_TI) for _ in range(turns) for layer in layers], 5) / (turns * count)
            self._known[key] = max(0.0, taken - self._call)
        return self._known[key]

    @cached_property
    def _call(self) -> float:
        return empty_seconds(self.device, self.dtype)


class Parts:
    """What the engine's steps take beside the products with weights, part by part."""

    def __init__(self, device: torch.device, dtype: str, products: dict[str, tuple[Product, ...]]) -> None:
        self.device, self.dtype = device, dtype
        self.hot = Hot(device, DTYPES[dtype])
        self.nothing = Speed(products=products, elements=1e30, step_s=0.0, sequence_s=0.0, paces={})

    def speed(self, report: Report) -> Speed:
        """All figures of the number format."""
        plain, few = self.times(ATTENTION, None, ALL), self.times(ATTENTION, None, STEPPING, layers=FEW)
        speed = self.engine(few, plain)
        speed = speed.model_copy(update={"elements": elements_rate(self.device, DTYPES[self.dtype])})
        for name, node in MIXERS.items():
            report(f"{name} in {self.dtype}")
            times = plain if name == "attention" else self.times(node, None, ALL)
            narrow = self.times(NARROW[name], None, PROMPTS) if name in NARROW else None
            speed = _with(speed, name, _mixer(times, narrow, speed))
        for name, node in FFNS.items():
            report(f"{name} in {self.dtype}")
            times = self.times(ATTENTION, node, STEPPING)
            speed = _with(speed, name, _ffn(times, speed))
        return speed.model_copy(update={"paces": speed.paces | {n: speed.paces[other] for n, other in LIKE.items()}})

    def engine(self, few: Times, plain: Times) -> Speed:
        """What a step takes with no layers at all, by those with few and with more."""
        at_none = []
        for name in ("one", "many"):
            low, high = (t.left(name, self.nothing) for t in (few, plain))
            at_none.append(max(TINY, low - (high - low) / (LAYERS - FEW) * FEW))
        sequence = max(0.0, (at_none[1] - at_none[0]) / (MANY - 1))
        return self.nothing.model_copy(update={"step_s": max(0.0, at_none[0] - sequence), "sequence_s": sequence})

    def times(self, mixer: Node, ffn: Node | None, names: Sequence[str], layers: int = LAYERS) -> Times:
        """The named runs of a model of such layers."""
        with _model(mixer, ffn, layers, self.device, self.dtype) as model:
            work = Work(model.plan, self.dtype)
            rounds = [{name: RUNS[name](model) for name in names} for _ in range(ROUNDS)]
        runs = {name: min((each[name] for each in rounds), key=lambda run: run.seconds) for name in names}
        return Times(work, runs, self.hot)


def _mixer(times: Times, narrow: Times | None, speed: Speed) -> Pace:
    """A mixer's pace, from what its layers took that the rest of the speed does not explain. narrow: of states that are
    smaller, and else alike."""
    (spec,), speed = times.work.parts, speed.model_copy(update={"paces": {}})
    state, itemsize = spec.state(), times.work.cache_itemsize
    assert state is not None
    one, many = times.left("one", speed), times.left("many", speed)
    each = max(TINY, (many - one) / (MANY - 1)) / LAYERS
    if fixed := state.nbytes(0, itemsize):
        pace = Pace(call_s=max(0.0, one / LAYERS - each), item_s=0.0, read=fixed / each)
    else:
        pace = Pace(call_s=max(0.0, one / LAYERS - each), item_s=each)
        far = max(TINY, times.left("far", _with(speed, _name(times), pace)))
        past = times.runs["far"].steps[0].past
        pace = pace.model_copy(update={"read": LAYERS * FAR * state.nbytes(past, itemsize) / far})
    return pace.model_copy(update=_prompts(times, narrow, _with(speed, _name(times), pace)))


def _prompts(times: Times, narrow: Times | None, speed: Speed) -> dict[str, float]:
    """The paces of prompts: for each multiply-add and, told by states of two sizes, for each channel."""
    taken, mixed = sum(times.left(name, speed) for name in PROMPTS), sum(map(times.mixed, PROMPTS))
    if narrow is None:
        return {"multiply": mixed / max(TINY, taken)}
    less, fewer = sum(narrow.left(name, speed) for name in PROMPTS), sum(map(narrow.mixed, PROMPTS))
    rate = (mixed - fewer) / max(TINY, taken - less)
    return {"multiply": rate, "channel_s": max(0.0, taken - mixed / rate) / sum(map(times.channels, PROMPTS))}


def _ffn(times: Times, speed: Speed) -> Pace:
    """A feed-forward's pace: for each call, and of a mixture for each expert that it touches."""
    spec = next(spec for spec in times.work.parts if spec.state() is None)
    one, many = (max(0.0, times.left(name, speed)) / LAYERS for name in STEPPING)
    few, more = (items_of(spec, times.runs[name].steps[0]) for name in STEPPING)
    if not isinstance(spec, MoESpec):
        return Pace(call_s=one, item_s=0.0)
    each = max(0.0, (many - one) / (more - few))
    return Pace(call_s=max(0.0, one - few * each), item_s=each)


def _name(times: Times) -> str:
    (spec,) = times.work.parts
    return str(spec.pace())


def _with(speed: Speed, name: str, pace: Pace) -> Speed:
    return speed.model_copy(update={"paces": speed.paces | {name: pace}})


def _decode(model: Model, batch: int, context: int) -> Run:
    run = decode_steps(model, random_prompts(model, batch, context), STEPS)
    return Run((Step.decode(batch, round(run.context)),), sorted(run.steps)[len(run.steps) // 4])


def _prompt(model: Model, tokens: int) -> Run:
    def read() -> None:
        model.generate(random_prompts(model, 1, tokens), max_tokens=1, temperature=0.0, ignore_eos=True)

    chunk = chunk_tokens(model.placement.device.type)
    return Run(tuple(prefill(tokens, chunk)), fastest(read, 3))


RUNS: dict[str, Callable[[Model], Run]] = {
    "one": lambda model: _decode(model, 1, SHORT),
    "many": lambda model: _decode(model, MANY, SHORT),
    "far": lambda model: _decode(model, FAR, LONG - CUT),
    "prompt": lambda model: _prompt(model, model.engine.sizes.chunk_tokens),
    "long_prompt": lambda model: _prompt(model, 2 * model.engine.sizes.chunk_tokens),
}
"""Decode steps of one short sequence, of many, of some long ones; the prompt of one step, and of two."""

ALL, STEPPING, PROMPTS = tuple(RUNS), ("one", "many"), ("prompt", "long_prompt")


@contextmanager
def _model(mixer: Node, ffn: Node | None, layers: int, device: torch.device, dtype: str) -> Iterator[Model]:
    """A model of random weights, and nothing of it afterwards."""
    from zoo.api import load

    probe = card(
        "probe",
        dim=DIM,
        layers=[{"repeat": layers, "mixer": mixer, "ffn": ffn}],
        vocab_size=512,
        context_length=2 * chunk_tokens(device.type) + LONG,
        dtype=dtype,
    )
    with load(
        probe, weights="random", device=str(device), dtype=dtype, max_batch_size=MANY, prefix_cache=False
    ) as model:
        yield model
    gc.collect()
