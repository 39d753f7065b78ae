"""Measuring a loaded model's steps beside what the machine can do at most."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from zoo.bench.timing import seconds
from zoo.components.matrix import Holder
from zoo.components.native.panels import PackedPanels
from zoo.costs.profile import Limits
from zoo.costs.work import Step, Work, prefill
from zoo.engine.request import Request, SamplingParams
from zoo.loading.quantising import quantised_parts

if TYPE_CHECKING:
    from zoo.model import Model

TOLERANCE = 0.25
"""How far a prediction may be off."""

WARM = 3
"""Steps of single rows that do not count."""


@dataclass(frozen=True)
class Measurement:
    """A figure: what was asked for, how long it took, and what of the machine's limits it reached.

    kind: prefill, or decode. context: tokens that a row saw, on average. tokens_per_second: of all sequences together.
    seconds: of the prompts, or of one step: the median; fastest, slowest: the others. read_bytes, multiply_adds: what
    the work needs at least. of_read, of_multiply: these per second, over the limits; of_limit: the time that the
    nearer of both limits would allow, over the time that was taken. predicted: tokens per second that `zoo inspect`
    reckons from the stored measurements of the machine; None without them.
    """

    kind: str
    batch: int
    context: int
    tokens: int
    tokens_per_second: float
    seconds: float
    fastest: float
    slowest: float
    read_bytes: float
    multiply_adds: float
    of_read: float
    of_multiply: float
    of_limit: float
    predicted: float | None = None

    @property
    def ratio(self) -> float | None:
        """Predicted over measured time; None without a prediction."""
        return None if self.predicted is None else self.tokens_per_second / self.predicted

    @property
    def holds(self) -> bool | None:
        """Whether predicted and measured time differ by no more than a quarter of the smaller; None without one."""
        return None if self.ratio is None else 1 / (1 + TOLERANCE) <= self.ratio <= 1 + TOLERANCE

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"prediction_holds": self.holds}


def work_of(model: "Model") -> Work:
    """The arithmetic of a loaded model."""
    kinds = {matrix.kind.name for _, matrix in quantised_parts(model.module)}
    # Where blocks have four bits the head still has eight.
    quantize = next((name for name in ("int4", "int8") if name in kinds), None)
    holders = (part for part in model.module.modules() if isinstance(part, Holder))
    packed = any(isinstance(matrix, PackedPanels) for holder in holders for [matrix, *_] in holder.stored.values())
    return Work(model.plan, model.placement.dtype_name, quantize, packed=packed)


def bytes_per_step(model: "Model", batch: int, context: int) -> float:
    """Bytes that one decode step of `batch` sequences with `context` cached tokens must read."""
    return work_of(model).read_bytes(Step.decode(batch, context))


def multiply_adds_of_prompt(model: "Model", tokens: int) -> float:
    """Multiply-adds that reading a prompt of one sequence needs, up to the logits of its last token."""
    return sum(work_of(model).multiply_adds(step) for step in prefill(tokens, chunk_of(model)))


def chunk_of(model: "Model") -> int:
    """Rows of a step of its engine."""
    return model.engine.sizes.chunk_tokens


def random_prompts(model: "Model", batch: int, tokens: int, seed: int = 0) -> list[list[int]]:
    """Prompts of random token ids, each different: no two share a beginning."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(3, model.module.spec.vocab_size, (batch, tokens), generator=generator)
    rows: list[list[int]] = drawn.tolist()
    return rows


def measure_prefill(model: "Model", limits: Limits, *, tokens: int, batch: int = 1, repeats: int = 3) -> Measurement:
    """The time from prompts of random tokens to the first new token of each."""
    times = []
    for count in range(repeats + 1):
        prompts = random_prompts(model, batch, tokens, seed=count)
        times.append(seconds(lambda prompts=prompts: _answer(model, prompts, 1)))  # type: ignore[misc]
    work, steps = work_of(model), [*prefill(tokens, chunk_of(model))]
    read = sum(work.read_bytes(step) for step in steps) * (batch if tokens >= chunk_of(model) else 1)
    adds = batch * multiply_adds_of_prompt(model, tokens)
    return _measurement("prefill", (batch, tokens // 2, batch * tokens), times[1:], (read, adds), work, limits)


def measure_decode(
    model: "Model", limits: Limits, *, batch: int, context: int, new_tokens: int = 16, repeats: int = 1
) -> Measurement:
    """The time of steps in which each of `batch` sequences of some `context` tokens gets one token more.

    Their prompts are read first, and do not count. Greedy, end tokens ignored.
    """
    times: list[float] = []
    seen: list[float] = []
    for count in range(repeats):
        run = decode_steps(model, random_prompts(model, batch, context, seed=1000 + count), new_tokens)
        times += run.steps
        seen.append(run.context)
    work, step = work_of(model), Step.decode(batch, round(statistics.mean(seen)))
    cost = (work.read_bytes(step), work.multiply_adds(step))
    return _measurement("decode", (batch, step.past, batch), times, cost, work, limits)


@dataclass(frozen=True)
class DecodeRun:
    """steps: seconds of each step of single rows. context: tokens cached before one, on average."""

    steps: list[float]
    context: float


def decode_steps(model: "Model", prompts: Sequence[Sequence[int]], new_tokens: int) -> DecodeRun:
    """Reads the prompts, then times `new_tokens` steps in which all sequences decode. Ends them whatever happens."""
    engine = model.engine
    engine.reset_prefix_cache()
    most = answer_tokens(model, len(prompts), max(map(len, prompts)), new_tokens)
    params = SamplingParams(max_tokens=most, ignore_eos=True, drafts=0)
    ids = [engine.submit(Request(prompt, params)) for prompt in prompts]
    made = dict.fromkeys(ids, 0)
    try:
        while not all(made.values()):
            _step(model, made)
        for _ in range(WARM):
            _step(model, made)
        before = sum(map(len, prompts)) + sum(made.values())
        steps = [_step(model, made) for _ in range(new_tokens)]
        after = sum(map(len, prompts)) + sum(made.values())
        # Of a sequence's tokens the newest is not cached before the step that feeds it back.
        return DecodeRun(steps, (before + after) / 2 / len(prompts) - 1)
    finally:
        for request_id in ids:
            engine.cancel(request_id)
        engine.run()


def answer_tokens(model: "Model", batch: int, context: int, new_tokens: int) -> int:
    """The most tokens that a sequence gets in `decode_steps`: the first goes on while the others' prompts are read."""
    reading = batch * context // max(1, chunk_of(model) - batch) + batch + 2
    return reading + WARM + new_tokens


def _step(model: "Model", made: dict[str, int]) -> float:
    """Seconds of a step of the engine; what it made is counted."""
    start = time.perf_counter()
    chunks = model.engine.step()
    took = time.perf_counter() - start
    for chunk in chunks:
        if chunk.error is not None:
            raise chunk.error
        made[chunk.request_id] += len(chunk.tokens)
    return took


def _answer(model: "Model", prompts: list[list[int]], count: int) -> None:
    model.engine.reset_prefix_cache()
    model.generate(prompts, max_tokens=count, temperature=0.0, ignore_eos=True)


def _measurement(
    kind: str,
    sizes: tuple[int, int, int],
    times: Sequence[float],
    cost: tuple[float, float],
    work: Work,
    limits: Limits,
) -> Measurement:
    """sizes: batch, context, tokens. cost: bytes read, multiply-adds."""
    (batch, context, tokens), (read, adds), taken = sizes, cost, statistics.median(times)
    rate = limits.multiply[work.dtype if work.dtype in limits.multiply else "bfloat16"]
    of_read, of_multiply = read / taken / limits.bytes_per_second, adds / taken / rate
    return Measurement(
        kind=kind,
        batch=batch,
        context=context,
        tokens=tokens,
        tokens_per_second=tokens / taken,
        seconds=taken,
        fastest=min(times),
        slowest=max(times),
        read_bytes=read,
        multiply_adds=adds,
        of_read=of_read,
        of_multiply=of_multiply,
        of_limit=max(of_read, of_multiply),
    )
