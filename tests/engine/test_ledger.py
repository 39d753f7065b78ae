"""How many guesses are made follows what they cost and give, by a clock that the test moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from zoo.engine.drafting import LONGEST_PAUSE, MOST, TRIES, Asked, Pace
from zoo.engine.engine import Engine
from zoo.engine.ledger import DEEPEST, LEAST, READING, STALE, Ledger
from zoo.engine.ledger import MOST as MOST_BALANCE
from zoo.engine.lookup import Lookup

Make = Callable[..., Any]
COUNT = 400
RICH, POOR = Ledger(), Ledger()
POOR.balance = LEAST


def test_the_pace_follows_what_is_accepted() -> None:
    pace = Pace()
    for _ in range(3):
        pace.learn(pace.ask(RICH), MOST // 2, True)
    for _ in range(5):
        size = pace.ask(POOR)
        pace.learn(size, size, True)
    assert pace.ask(POOR) == MOST
    pace.learn(MOST, 3, True)
    assert pace.ask(POOR) == 4
    tries = 0
    for _ in range(2000):
        size = pace.ask(RICH)
        tries += size
        if size:
            pace.learn(size, 0, False)
    assert tries < 35, "hopeless sequences cost next to nothing"
    while not (size := pace.ask(RICH)):
        assert not pace.proven
    pace.learn(size, size, True)
    assert pace.ask(POOR), "and come back when they are right"
    assert pace.pause == LONGEST_PAUSE // 4


def test_a_sequence_that_has_begun_gets_its_tries() -> None:
    pace = Pace()
    assert [pace.ask(POOR), pace.ask(RICH), pace.ask(POOR)] == [0, MOST // 2, MOST // 2]
    for _ in range(TRIES):
        while not (size := pace.ask(POOR)):
            pass
        pace.learn(size, 0, False)
    assert not any(pace.ask(POOR) for _ in range(50))


class Half(Lookup):
    """Guesses that all say 1; what it takes to make them moves the clock."""

    def __init__(self, clock: list[float], seconds: float, read: float) -> None:
        super().__init__()
        self.clock, self.seconds, self.read, self.known = clock, seconds, read, set[int]()

    def drafts(self, asked: Asked) -> list[list[int]]:
        if self.read and not {seq.number for seq, _ in asked} <= self.known:
            self.clock[0] += self.read
            self.known |= {seq.number for seq, _ in asked}
            return [[] for _ in asked]
        self.clock[0] += self.seconds * sum(count for _, count in asked)
        return [[1] * count for _, count in asked]


@pytest.fixture
def timed(make_engine: Make, ask: Make, fake_decoder: Make) -> Callable[..., tuple[float, Any]]:
    """Runs answers of COUNT tokens of which each `right`-th is 1, one after the other; returns what that took, and the
    last answer. A step takes 1, and `row` more for each further row; a guess `draft`, reading a prompt for them `read`.
    """

    def run(*, right: int, row: float, draft: float = 0.0, read: float = 0.0, answers: int = 1) -> tuple[float, Any]:
        clock = [0.0]
        script = [1 if right and place % right == 0 else 2 + place % 50 for place in range(COUNT)]
        decoder = fake_decoder({1: script})

        def step(given: Any) -> None:
            clock[0] += 1 + row * (len(given.rows) - 1)

        decoder.fault = step
        engine: Engine = make_engine(decoder, context=COUNT + 2, draft="lookup", prefix_cache=False)
        drafting = engine._scheduler.drafting
        assert drafting is not None
        drafting.source, drafting.clock = Half(clock, draft, read), lambda: clock[0]
        done = [engine.generate([ask([1], max_tokens=COUNT)])[0] for _ in range(answers)]
        assert all(one.tokens == script for one in done)
        return clock[0], done[-1]

    return run


@pytest.mark.parametrize("draft", [0.0, 0.3])
@pytest.mark.parametrize("row", [0.02, 0.4, 1.0])
@pytest.mark.parametrize("right", [0, 2, 9])
def test_guesses_that_do_not_pay_cost_little(right: int, row: float, draft: float, timed: Make) -> None:
    seconds, done = timed(right=right, row=row, draft=draft, answers=3)
    assert seconds < 3 * COUNT * 1.03 + MOST, "beside the first tries of all"
    assert done.usage.drafted_tokens > 0, "another try is made now and then"


def test_prompts_are_not_read_for_guesses_that_never_pay(timed: Make) -> None:
    seconds, _ = timed(right=0, row=0.1, draft=0.1, read=12.0, answers=5)
    assert seconds < 12 + 5 * COUNT * 1.03
    without, _ = timed(right=0, row=0.1, draft=0.1, answers=5)
    assert seconds > without + 12, "the next one is read for in its time"
    assert timed(right=1, row=0.1, draft=0.1, read=12.0, answers=5)[0] < 0.4 * 5 * COUNT


@pytest.mark.parametrize(("row", "least"), [(0.02, 5.0), (0.3, 2.2)])
def test_guesses_that_pay_are_made(row: float, least: float, timed: Make) -> None:
    seconds, done = timed(right=1, row=row)
    assert COUNT / seconds > least
    assert done.usage.accepted_tokens > 0.8 * COUNT


def test_one_slow_step_decides_nothing() -> None:
    ledger = Ledger()
    assert not ledger.knows(1)
    for seconds in (1.0, 1.1, 50.0, 0.9):
        ledger.step(1, 0, seconds, 0.0)
    for seconds, price in ((1.5, 1.5), (90.0, 1.5), (1.6, 1.6)):
        ledger.step(1, 3, seconds, 0.0)
        assert ledger.price == pytest.approx(price)
    ledger.step(2, 1, 2.0, 0.0)
    assert ledger.price is None, "how long two rows take by themselves is not known"


def test_what_a_step_takes_without_guesses_is_looked_at_again() -> None:
    ledger = Ledger()
    ledger.step(1, 0, 1.0, 0.0)
    known = 0
    while ledger.knows(1):
        ledger.step(1, 7, 1.2, 0.0)
        known += 1
    assert known == STALE
    ledger.step(1, 0, 1.0, 0.0)
    assert ledger.knows(1)


def test_the_balance_stays_between_its_ends() -> None:
    ledger = Ledger()
    ledger.step(1, 0, 1.0, 0.0)
    ledger.step(1, 3, 101.0, 0.0)
    assert ledger.balance == LEAST
    for _ in range(1000):
        ledger.gain(1.0)
    ledger.step(1, 2, 1.5, 0.25)
    assert ledger.balance == pytest.approx(MOST_BALANCE - 0.75)
    ledger.step(1, 0, 1.0, 3.0)
    assert not ledger.may_begin, "what was read is to be paid"
    ledger.gain(3.0)
    assert ledger.may_begin


def test_what_looking_costs_is_not_what_reading_costs() -> None:
    ledger = Ledger()
    ledger.step(1, 0, 1.0, 0.0)
    for _ in range(60):
        ledger.step(1, 0, 1.0, 0.014)
    assert ledger.may_begin
    for _ in range(9):
        ledger.step(1, 0, 1.0, 5.0)
    assert not ledger.may_begin
    for _ in range(int(DEEPEST / READING) + 1):
        ledger.step(1, 0, 1.0, 0.0)
    assert ledger.may_begin, "and reading is not remembered for ever"
