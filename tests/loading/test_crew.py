"""Jobs of several threads: in order, all of them, not far ahead, and none after a fault."""

from __future__ import annotations

import threading
import time

import pytest

from zoo.loading import crew
from zoo.loading.crew import in_order


def test_jobs_are_done_together_and_told_in_order() -> None:
    together = threading.Barrier(crew.WORKERS, timeout=20)

    def work(job: int) -> None:
        together.wait()
        time.sleep(0.002 * (crew.WORKERS - job % crew.WORKERS))

    assert [*in_order(work, range(2 * crew.WORKERS))] == [*range(2 * crew.WORKERS)]


def test_jobs_are_not_begun_far_ahead() -> None:
    begun: list[int] = []
    for done in in_order(begun.append, iter(range(200))):
        assert max(begun) < done + crew.AHEAD * crew.WORKERS
    assert sorted(begun) == [*range(200)]


def test_the_first_fault_ends_it() -> None:
    begun: list[int] = []

    def work(job: int) -> None:
        begun.append(job)
        if job == 5:
            raise ValueError(job)

    found = in_order(work, range(1000))
    assert [next(found) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="5"):
        next(found)
    assert len(begun) <= 5 + crew.AHEAD * crew.WORKERS
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("zoo-loading")]


def test_a_caller_who_leaves_ends_it() -> None:
    begun: list[int] = []
    for done in in_order(begun.append, range(1000)):
        if done == 3:
            break
    assert len(begun) <= 5 + crew.AHEAD * crew.WORKERS
