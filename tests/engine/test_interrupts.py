"""Ctrl-C at any point: nothing is lost, nothing is left behind, and the answers are the same."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch

from tests.engine.test_prefixes import ask, check, ids, make, plain
from zoo.components.cache import slab
from zoo.engine import prefixes
from zoo.engine.engine import Engine
from zoo.engine.interrupts import interruptible, uninterrupted
from zoo.engine.pack import Batch
from zoo.engine.request import Completion, Request
from zoo.engine.runner import Runner

ENDINGS = [12, 9, 16, 5, 20]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Thousands of small products: threads that wait for each other would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _obeyed() -> Iterator[None]:
    """A shell has what it starts in the background ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    signal.raise_signal(signal.SIGINT)


# --- blocks -----------------------------------------------------------------------------------------------------


def test_ctrl_c_waits_for_the_end_of_a_block() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        press()
        press()
        done.append(1)
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_one_waits_only_where_it_is_to() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted(twice=True):
        press()
        done.append(1)
        with interruptible():
            done.append(2)
        press()
        done.append(3)
    assert done == [1, 2]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_it_is_obeyed_at_once_where_that_does_no_harm() -> None:
    done = []
    with uninterrupted():
        with pytest.raises(KeyboardInterrupt), interruptible():
            with interruptible():
                done.append(1)
            press()
            done.append(2)
        with uninterrupted():
            done.append(3)
        done.append(4)
    assert done == [1, 3, 4]


def test_one_that_waited_is_obeyed_before_what_may_be_interrupted() -> None:
    done = []
    with uninterrupted():
        press()
        with pytest.raises(KeyboardInterrupt), interruptible():
            done.append(1)
    assert done == []


def test_other_threads_and_foreign_handlers_are_let_alone() -> None:
    inside: list[object] = []

    def run() -> None:
        with uninterrupted(), interruptible():
            inside.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    with pytest.MonkeyPatch.context() as patch:
        # What a handler that is not Python's looks like.
        patch.setattr(signal, "getsignal", lambda number: None)
        run()
    assert inside == [signal.default_int_handler, None]


# --- engines ----------------------------------------------------------------------------------------------------


@contextmanager
def interrupted(line: int) -> Iterator[None]:
    """Ctrl-C before the line of that number that is run in the engine or in its caches."""
    left = line

    def enter(frame: FrameType, event: str, argument: object) -> Any:
        file = frame.f_code.co_filename
        return count if "/zoo/engine/" in file or "/components/cache/" in file else None

    def count(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        left -= event == "line"
        if left == 0:
            sys.settrace(None)
            press()
        return count

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


def requests() -> list[Request]:
    """More than run together, some of which begin alike and some of which repeat themselves."""
    words = ids(6, 3) * 5
    prompts = [[*ids(30), *ids(9, 1)], [*ids(30), *ids(4, 2)], words, ids(47, 4), [*words, 1]]
    return [ask(prompt, max_tokens=count) for prompt, count in zip(prompts, ENDINGS, strict=True)]


def carried_on(engine: Engine, line: int) -> tuple[bool, dict[str, Completion]]:
    """Whether it was interrupted, and what came in the end all the same."""
    order, done, hit = [engine.submit(request) for request in requests()], dict[str, Completion](), False
    try:
        with interrupted(line):
            while engine.busy:
                for chunk in engine.step():
                    done |= {chunk.request_id: chunk.completion} if chunk.completion else {}
    except KeyboardInterrupt:
        hit = True
    while engine.busy:
        for chunk in engine.step():
            done |= {chunk.request_id: chunk.completion} if chunk.completion else {}
    done |= {chunk.request_id: chunk.completion for chunk in engine.step() if chunk.completion}
    return hit, {request_id: done[request_id] for request_id in order}


@pytest.mark.parametrize(
    ("name", "storage", "draft"),
    [("full", "pages", None), ("window", "slab", "lookup"), ("recurrent and full", "pages", "lookup")],
)
@pytest.mark.usefixtures("always_guess")
def test_ctrl_c_at_any_line(name: str, storage: Any, draft: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for constant, value in (("FEWEST", 3), ("WORTH", 6), ("LONG", 12)):
        monkeypatch.setattr(prefixes, constant, value)
    monkeypatch.setattr(slab, "STEP", 16)
    expected, line, hits = plain(name, requests()), 3, 0
    while True:
        engine = make(name, 2.1, storage=storage, draft=draft, chunk_tokens=16, max_batch_size=3)
        hit, done = carried_on(engine, line)
        if not hit:
            break
        hits, line = hits + 1, line + 1 + line // 4
        assert [completion.tokens for completion in done.values()] == expected, line
        check(engine)
        assert not marked(engine)
        assert engine.memory["cache_used"] == 0
    assert hits > 15


@pytest.mark.parametrize("name", ["window", "recurrent and full"])
@pytest.mark.usefixtures("always_guess")
def test_rows_of_an_interrupted_step_are_taken_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, run, found = make(name, draft="lookup"), Runner.run, list[bool]()

    def interrupted(self: Runner, batch: Batch) -> torch.Tensor:
        logits_RV = run(self, batch)
        if len({*batch.seqs}) < len(batch.seqs) and not found:
            found.append(marked(engine))
            raise KeyboardInterrupt
        return logits_RV

    order = [engine.submit(request) for request in requests()]
    monkeypatch.setattr(Runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    assert found == [True]
    assert not marked(engine)
    for request_id in order:
        engine.cancel(request_id)
    check(engine)


def test_an_interrupted_run_keeps_what_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, run, steps = make("full"), Runner.run, list[int]()

    def interrupted(self: Runner, batch: Batch) -> torch.Tensor:
        steps.append(len(batch.rows))
        if len(steps) == 6:
            raise KeyboardInterrupt
        return run(self, batch)

    order = [engine.submit(ask(ids(5), max_tokens=count)) for count in (2, 12)]
    monkeypatch.setattr(Runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    found = {completion.request_id: len(completion.tokens) for completion in engine.run()}
    assert found == dict(zip(order, (2, 12), strict=True))
    assert engine.run() == []


def marked(engine: Engine) -> bool:
    """Whether rows of any sequence may still be taken back."""
    stores = [group.store for group in engine._memory._groups]
    return any(getattr(store, "_covered", None) or getattr(store, "_trails", None) for store in stores)


def test_a_request_is_not_entered_by_an_interrupted_call() -> None:
    """Nobody would know its name."""
    engine, hits = make("full"), 0
    for line in range(1, 200, 3):
        try:
            with interrupted(line):
                request_id = engine.submit(ask(ids(30), max_tokens=3))
        except KeyboardInterrupt:
            hits += 1
            assert not engine.busy and not engine._scheduler.waiting
        else:
            assert engine.cancel(request_id)
            break
    engine.step()
    assert 5 < hits < 66


def test_streams_that_are_interrupted_leave_nothing() -> None:
    engine, hits = make("full", storage="pages"), 0
    for line in range(1, 2000, 61):
        try:
            with interrupted(line), engine.stream(ask(ids(30), max_tokens=4)) as stream:
                assert [token for chunk in stream for token in chunk.tokens]
        except KeyboardInterrupt:
            hits += 1
        engine.discard()
        assert not engine.busy and not engine._mail
        check(engine)
    assert hits > 8
    assert engine.memory["cache_used"] == 0
