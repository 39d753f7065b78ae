"""Mixed traffic: requests of many lengths that arrive while others run."""

import math
import random
import statistics
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from zoo.bench.measure import random_prompts
from zoo.engine.request import Request, SamplingParams

if TYPE_CHECKING:
    from zoo.model import Model


@dataclass(frozen=True)
class Arrival:
    """A request: seconds after the start, tokens of its prompt, tokens of its answer."""

    at: float
    prompt: int
    answer: int


@dataclass(frozen=True)
class Traffic:
    """What came of it. Latencies in seconds: median and the 95th of 100.

    first: from the arrival to the first token. between: between two tokens of an answer. in_flight: unfinished
    requests, on average over the steps, and at most.
    """

    requests: int
    prompt_tokens: int
    new_tokens: int
    seconds: float
    new_tokens_per_second: float
    tokens_per_second: float
    first_median: float
    first_95: float
    between_median: float
    between_95: float
    in_flight: float
    most_in_flight: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def arrivals(
    count: int, gap: float, prompts: tuple[int, int], answers: tuple[int, int], *, burst: int = 0, seed: int = 0
) -> list[Arrival]:
    """`burst` requests at once, then others with gaps of `gap` seconds on average, exponentially distributed; lengths
    from the first to the second of each pair, short ones more often than long ones. Equal for equal arguments."""
    draw, at, made = random.Random(seed), 0.0, []
    for number in range(count):
        at += 0.0 if number < burst else draw.expovariate(1 / gap) if gap else 0.0
        made.append(Arrival(at, _length(draw, prompts), _length(draw, answers)))
    return made


def _length(draw: random.Random, span: tuple[int, int]) -> int:
    low, high = span
    return round(low * math.exp(draw.random() * math.log(high / low)))


@dataclass
class _Times:
    """Of one request: when it came, and when each of its tokens did."""

    came: float
    tokens: list[float] = field(default_factory=list)


def measure_traffic(model: "Model", plan: list[Arrival], *, seed: int = 0) -> Traffic:
    """Sends the requests at their times, and steps while any is unfinished. Ends them all whatever happens."""
    prompts = [random_prompts(model, 1, a.prompt, seed=seed + i)[0] for i, a in enumerate(plan)]
    times: dict[str, _Times] = {}
    open_counts: list[int] = []
    engine, waiting, done = model.engine, [*zip(plan, prompts, strict=True)], 0
    engine.reset_prefix_cache()
    start = time.perf_counter()
    try:
        while waiting or done < len(times):
            now = time.perf_counter() - start
            while waiting and (waiting[0][0].at <= now):
                arrival, prompt = waiting.pop(0)
                params = SamplingParams(max_tokens=arrival.answer, ignore_eos=True)
                times[engine.submit(Request(prompt, params))] = _Times(arrival.at)
            if done == len(times):
                time.sleep(max(0.0, waiting[0][0].at - now))
                continue
            open_counts.append(len(times) - done)
            for chunk in engine.step():
                if chunk.error is not None:
                    raise chunk.error
                times[chunk.request_id].tokens += [time.perf_counter() - start] * len(chunk.tokens)
                done += chunk.last
    finally:
        for request_id in times:
            engine.cancel(request_id)
        engine.run()
    return _traffic(plan, [*times.values()], open_counts)


def _traffic(plan: list[Arrival], times: list[_Times], open_counts: list[int]) -> Traffic:
    first = sorted(t.tokens[0] - t.came for t in times)
    between = sorted(b - a for t in times for a, b in zip(t.tokens, t.tokens[1:], strict=False)) or [0.0]
    took = max(t.tokens[-1] for t in times)
    prompt, new = sum(a.prompt for a in plan), sum(len(t.tokens) for t in times)
    return Traffic(
        requests=len(plan),
        prompt_tokens=prompt,
        new_tokens=new,
        seconds=took,
        new_tokens_per_second=new / took,
        tokens_per_second=(prompt + new) / took,
        first_median=statistics.median(first),
        first_95=_of_100(first, 95),
        between_median=statistics.median(between),
        between_95=_of_100(between, 95),
        in_flight=statistics.mean(open_counts),
        most_in_flight=max(open_counts),
    )


def _of_100(values: list[float], which: int) -> float:
    return values[min(len(values) - 1, len(values) * which // 100)]
