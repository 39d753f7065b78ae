"""Who runs when, seen through the rows of each step."""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

Make = Callable[..., Any]


def test_decodes_go_first_and_prompts_fill_the_rest(make_engine: Make, ask: Make, fake_decoder: Make) -> None:
    decoder = fake_decoder()
    engine = make_engine(decoder, chunk_tokens=8)
    engine.submit(ask([1] * 3, max_tokens=6))
    engine.step()
    engine.submit(ask([2] * 12, max_tokens=2))
    engine.submit(ask([3] * 4, max_tokens=2))
    engine.run()
    # 3 | 1 + 7 of 12 | 1 + 5 of 12 + 2 of 4 | 1 + 1 + 2 of 4 | ...
    assert decoder.steps == [[3], [1, 7], [1, 5, 2], [1, 1, 2], [1, 1], [1]]


def test_no_step_has_more_rows_than_allowed(make_engine: Make, ask: Make, fake_decoder: Make) -> None:
    decoder = fake_decoder()
    engine = make_engine(decoder, chunk_tokens=3)
    done = engine.generate([ask([i + 1] * (i + 1), max_tokens=4) for i in range(6)])
    assert max(map(sum, decoder.steps)) == 3
    assert [len(c.tokens) for c in done] == [4] * 6


def test_no_more_sequences_run_together_than_allowed(make_engine: Make, ask: Make, fake_decoder: Make) -> None:
    decoder = fake_decoder()
    make_engine(decoder, max_batch_size=2).generate([ask([i + 1], max_tokens=3) for i in range(5)])
    assert [len(rows) for rows in decoder.steps] == [2] * 6 + [1] * 3


def test_a_place_that_falls_free_is_taken_at_once(make_engine: Make, ask: Make, fake_decoder: Make) -> None:
    decoder = fake_decoder()
    lengths = [5, 2, 2, 1]
    make_engine(decoder, max_batch_size=2).generate([ask([1], max_tokens=n) for n in lengths])
    assert [len(rows) for rows in decoder.steps] == [2, 2, 2, 2, 2]


def test_requests_end_in_the_order_they_came(make_engine: Make, ask: Make) -> None:
    engine = make_engine(max_batch_size=2, chunk_tokens=4)
    names = [engine.submit(ask([1] * 9, max_tokens=3)) for _ in range(5)]
    assert [c.request_id for c in engine.run()] == names


def test_the_youngest_makes_room_and_comes_back(make_engine: Make, ask: Make, fake_decoder: Make) -> None:
    decoder = fake_decoder()
    engine = make_engine(decoder, memory_bytes=48)
    old, young = ask([1] * 14, max_tokens=12), ask([2] * 14, max_tokens=12)
    done = engine.generate([old, young])
    assert engine._scheduler.preemptions == 1
    # Both reach 16 tokens; the old one takes the room for its 17th, and the young one, when it comes to its own,
    # finds none, waits for the old one's end, and is computed again with the 3 tokens that it had.
    assert decoder.steps == [[14, 14], [1, 1], [1, 1], *[[1]] * 9, [17], *[[1]] * 8]
    assert [len(c.tokens) for c in done] == [12, 12]


def test_after_a_preemption_nobody_comes_back_until_somebody_ends(make_engine: Make, ask: Make) -> None:
    engine = make_engine(memory_bytes=96)
    for i in range(6):
        engine.submit(ask([i + 1] * 10, max_tokens=60))
    scheduler, full = engine._scheduler, 0
    while engine.busy:
        before, preemptions = len(scheduler.running), scheduler.preemptions
        ended = any(chunk.last for chunk in engine.step())
        if full and not ended:
            assert len(scheduler.running) <= before
            full += 1
        if ended:
            full = 0
        elif scheduler.preemptions > preemptions:
            full = 1
    assert 5 <= scheduler.preemptions < 20


def test_the_preempted_come_back_before_the_later(make_engine: Make, ask: Make) -> None:
    engine = make_engine(memory_bytes=48)
    names = [engine.submit(ask([i + 1] * 14, max_tokens=12)) for i in range(4)]
    assert [c.request_id for c in engine.run()] == names
    assert engine._scheduler.preemptions > 1


def test_a_prompt_thrown_out_half_read_is_not_scored_twice(make_engine: Make, ask: Make, fake_decoder: Make) -> None:
    requests = [ask([1] * 14, max_tokens=10), ask([2, 3] * 15, max_tokens=2, prompt_logprobs=True)]
    expected = make_engine().generate(requests)[1].prompt_logprobs
    decoder = fake_decoder()
    engine = make_engine(decoder, memory_bytes=48, chunk_tokens=5)
    found = engine.generate(requests)[1].prompt_logprobs
    assert engine._scheduler.preemptions == 1
    assert found == expected
    # 29 scored rows and 12 sampled ones, none computed twice.
    assert sum(decoder.logit_rows) == 29 + 12


def test_prompts_are_admitted_only_when_they_fit_whole(make_engine: Make, ask: Make, fake_decoder: Make) -> None:
    decoder = fake_decoder()
    engine = make_engine(decoder, memory_bytes=64, chunk_tokens=8)
    engine.submit(ask([1] * 30, max_tokens=3))
    engine.submit(ask([2] * 40, max_tokens=3))
    engine.submit(ask([3] * 4, max_tokens=3))
    engine.step()
    assert len(engine._scheduler.running) == 1
    assert engine.memory["cache_used"] == 32
    engine.run()
    # The small one does not overtake: order of arrival.
    assert decoder.steps[:7] == [[8], [8], [8], [6], [1], [1], [8]]


def steps_counted(engine: Any, steps: int) -> Counter[str]:
    """How often each function, Python's or C's, is called by so many steps."""
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            calls[argument.__name__ if event == "c_call" else frame.f_code.co_qualname] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        for _ in range(steps):
            engine.step()
    finally:
        sys.setprofile(before)
    return calls


class Line(deque[Any]):
    """Those that wait, of whom a step may see the ends only."""

    def _scan(self, *arguments: object) -> NoReturn:
        raise AssertionError("a step looked at everyone that waits")

    __iter__ = __contains__ = __reversed__ = insert = index = count = copy = _scan


def test_a_step_costs_the_same_however_many_wait(make_engine: Make, ask: Make) -> None:
    def calls(requests: int) -> Counter[str]:
        engine = make_engine(max_batch_size=4)
        for i in range(requests):
            engine.submit(ask([1 + i % 7] * 5, max_tokens=2 + i % 4, seed=1))
        engine._scheduler.waiting = Line(engine._scheduler.waiting)
        found = steps_counted(engine, 6)
        engine.close()
        return found

    few, many = calls(20), calls(2000)
    assert few == many
    assert few["Scheduler.drop"] > 3
