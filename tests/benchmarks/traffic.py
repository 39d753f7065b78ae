"""Requests of mixed lengths that arrive while others run, and how transformers serves what `zoo.bench` sends to zoo."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tests.benchmarks.sides import Transformers
from zoo.bench import Arrival

Prompts = Sequence[Sequence[int]]


def served(plan: Sequence[Arrival], firsts: Sequence[float], ends: Sequence[float]) -> dict[str, float]:
    """The figures of zoo.bench.Traffic that a comparison needs, from the seconds of first and last tokens."""
    waits = [first - one.at for one, first in zip(plan, firsts, strict=True)]
    return {
        "seconds": max(ends),
        "new_tokens_per_second": sum(one.answer for one in plan) / max(ends),
        "in_flight": sum(end - one.at for one, end in zip(plan, ends, strict=True)) / max(ends),
        "first_median": statistics.median(waits),
    }


def by_static_batches(side: Transformers, plan: Sequence[Arrival], prompts: Prompts, size: int) -> dict[str, float]:
    """Batches of whoever has arrived, up to `size`, padded on the left; each runs until its longest answer ends."""
    start = time.perf_counter()
    left = deque(zip(plan, prompts, strict=True))
    firsts: list[float] = []
    ends: list[float] = []
    while left:
        time.sleep(max(0.0, left[0][0].at - (time.perf_counter() - start)))
        now = time.perf_counter() - start
        batch = [left.popleft() for _ in range(min(size, sum(one.at <= now for one, _ in left)))]
        times: list[float] = []
        ids, mask = _padded([prompt for _, prompt in batch])
        longest = max(one.answer for one, _ in batch)
        side.generate(ids, mask, longest, stopping_criteria=[_clock(times, start)])
        firsts += [times[0]] * len(batch)
        ends += [times[one.answer - 1] for one, _ in batch]
    return served(plan, firsts, ends)


def by_continuous_batching(side: Transformers, plan: Sequence[Arrival], prompts: Prompts) -> dict[str, float]:
    """transformers' own continuous batching, which serves from a thread of its own."""
    import transformers

    config = transformers.GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=-1, max_new_tokens=512)
    firsts, ends, counts = [0.0] * len(plan), [0.0] * len(plan), [0] * len(plan)
    with side.model.continuous_batching_context_manager(generation_config=config) as manager:
        # A first request, so that nothing is made ready within the time.
        manager.add_request([5, 6, 7], max_new_tokens=2)
        while manager.get_result(timeout=1) is None:
            pass
        start, left = time.perf_counter(), deque(enumerate(plan))
        while left or not all(ends):
            while left and left[0][1].at <= time.perf_counter() - start:
                number, one = left.popleft()
                ids = [*prompts[number]]
                manager.add_request(ids, request_id=str(number), max_new_tokens=one.answer, streaming=True)
            found = manager.get_result(timeout=0.01)
            if found is None:
                continue
            number, now = int(found.request_id), time.perf_counter() - start
            counts[number] = len(found.generated_tokens)
            firsts[number] = firsts[number] or now
            if counts[number] >= plan[number].answer:
                ends[number] = now
    return served(plan, firsts, ends)


def _padded(prompts: Prompts) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor([*prompt])
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def _clock(times: list[float], start: float) -> Callable[..., torch.Tensor]:
    def clock(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        times.append(time.perf_counter() - start)
        return torch.zeros(len(ids), dtype=torch.bool)

    return clock
