"""Replicas behind one front: requests spread by load, replicas that end, and Ray itself where it is installed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from zoo.registry.errors import RankError, RequestError
from zoo.replicas import EndedError, Front, start


class Fake:
    """Answers with its number; ends at a chosen request."""

    def __init__(self, number: int, ends_at: int | None = None) -> None:
        self.number, self.ends_at, self.asked, self.most, self.now = number, ends_at, 0, 0, 0
        self.lock, self.together = threading.Lock(), threading.Barrier(1)
        self.closed = False

    def generate(self, prompt: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        with self.lock:
            self.asked, self.now = self.asked + 1, self.now + 1
            self.most = max(self.most, self.now)
            if self.asked == self.ends_at:
                raise EndedError("it was killed")
        self.together.wait(timeout=20)
        with self.lock:
            self.now -= 1
        if prompt == "bad":
            return {"error": {"kind": "RequestError", "message": "no", "where": "prompt", "found": "bad"}}
        return {"text": f"{prompt}!", "replica": self.number}

    def stream(self, prompt: Any, options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        for place in range(3):
            if self.ends_at == place:
                raise EndedError("it was killed")
            yield {"text": str(place), "error": None}

    def close(self) -> None:
        self.closed = True


def test_requests_are_spread_by_load() -> None:
    fakes, together = [Fake(0), Fake(1), Fake(2)], threading.Barrier(12)
    for fake in fakes:
        fake.together = together
    with Front(fakes) as front:
        answers = front.generate([str(i) for i in range(12)])
    assert [answer["text"] for answer in answers] == [f"{i}!" for i in range(12)]
    assert [fake.most for fake in fakes] == [4, 4, 4]
    assert all(fake.closed for fake in fakes)


def test_requests_of_a_dead_replica_run_elsewhere() -> None:
    fakes = [Fake(0, ends_at=2), Fake(1)]
    front = Front(fakes)
    answers = front.generate([str(i) for i in range(8)])
    assert [answer["text"] for answer in answers] == [f"{i}!" for i in range(8)]
    assert front.alive == [1]
    assert front.ended == {0: "it was killed"}


def test_no_replica_left_is_named() -> None:
    front = Front([Fake(0, ends_at=1), Fake(1, ends_at=1)])
    with pytest.raises(RankError, match="no replica is left; found replica 0: it was killed; replica 1: it was"):
        front.generate("a")


def test_a_stream_begins_again_but_does_not_go_on_elsewhere() -> None:
    front = Front([Fake(0, ends_at=0), Fake(1)])
    assert [chunk["text"] for chunk in front.stream("a")] == ["0", "1", "2"]
    front = Front([Fake(0, ends_at=1), Fake(1)])
    with pytest.raises(RankError, match="replica 0 has ended in the middle of an answer; found it was killed"):
        list(front.stream("a"))


def test_an_error_of_a_request_is_its_own() -> None:
    front = Front([Fake(0)])
    with pytest.raises(RequestError, match="replica 0, prompt: no; found bad"):
        front.generate(["bad"])
    assert front.alive == [0]


@pytest.mark.slow
def test_ray_runs_replicas() -> None:
    ray = pytest.importorskip("ray")
    try:
        with start("tiny", 2, device="cpu") as front:
            question = "How many experts does Mixtral 8x7B have?"
            answers = front.generate([question] * 4, max_tokens=20)
            assert all("8 experts" in answer["text"] for answer in answers)
            assert "8 experts" in "".join(chunk["text"] for chunk in front.stream(question, max_tokens=20))
            with pytest.raises(RequestError, match=r"replica 0, .*temperature"):
                front.generate(question, temperature=-1)
            os.kill(front.pids[0], signal.SIGKILL)
            assert "8 experts" in front.generate(question, max_tokens=20)[0]["text"]
            assert front.alive == [1]
    finally:
        ray.shutdown()
