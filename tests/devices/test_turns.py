"""Sequences that take turns in stages get what they get in one process, whatever happens while steps are under way."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import torch

import zoo
from tests.devices import test_mirrored
from tests.devices.likes import ATTENTION, GATED, MAMBA1, make_card
from tests.devices.test_deaths import SOON, children, impatient, linux
from tests.devices.test_mirrored import STAGES, built, led
from tests.saving.test_save import same_files
from zoo.components.cache import slab
from zoo.devices import stage
from zoo.engine.engine import Engine
from zoo.engine.prefixes import Prefixes
from zoo.engine.request import Request, SamplingParams
from zoo.engine.sequence import Sequence as Running
from zoo.engine.turns import Turns
from zoo.model import Model
from zoo.registry.errors import RankError
from zoo.testing import TOLERANCE, relative_error

OPTIONS: dict[str, Any] = {"weights": "random", "dtype": "float32", "device": "cpu", "max_batch_size": 6}
LAYERS = [{"mixer": mixer, "ffn": GATED} for mixer in (ATTENTION, MAMBA1, {**ATTENTION, "window": 7}, ATTENTION)]
CARD = make_card("turning", LAYERS, embedding_scale=40.0)


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "PIECE", {"cpu": 1})


def begun(engine: Engine) -> int:
    """Groups whose step is under way."""
    assert isinstance(engine._steps, Turns)
    return len(engine._steps._begun)


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sequences of each step that was begun before it was planned."""
    found, begin = list[int](), Turns._begin

    def noted(self: Turns, runner: Any, work: Any, **how: Any) -> None:
        begin(self, runner, work, **how)
        if how.get("ahead"):
            found.append(len(work))

    monkeypatch.setattr(Turns, "_begin", noted)
    return found


def asked(number: int, tokens: int, **options: Any) -> Request:
    prompt = torch.randint(67, (20 + number,), generator=torch.Generator().manual_seed(number)).tolist()
    return Request(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True, **({"temperature": 0.0} | options)))


@pytest.mark.parametrize(
    ("name", "spare", "contexts"), [("full", (1, 1), 3.1), ("moving", (100, 1), 2.1), ("unlike", (1, 100), 3.1)]
)
def test_caches_that_are_too_small(
    name: str, spare: tuple[int, int], contexts: float, ahead: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences lose their places while their steps are under way, and go on later from what can be trusted."""
    kept, keep = list[bool](), Prefixes.keep

    def noted(self: Prefixes, seq: Running, *, whole: bool = True) -> None:
        kept.append(whole)
        keep(self, seq, whole=whole)

    requests = [asked(n, 50 + n, temperature=n % 2, seed=n) for n in range(7)]
    with Engine(*built(name)) as engine:
        expected = [c.tokens for c in engine.generate(requests)]
    monkeypatch.setattr(Prefixes, "keep", noted)
    monkeypatch.setattr(slab, "STEP", 16)
    monkeypatch.setattr(test_mirrored, "CONTEXTS", contexts)
    with led(name, STAGES, spare, draft=None, batch=5) as engine:
        assert [c.tokens for c in engine.generate(requests)] == expected
        assert engine._scheduler.preemptions > 0
        assert engine.memory["cache_used"] == 0
    assert False in kept
    assert {1, 2, 3} <= {*ahead}


def test_a_state_that_has_gone_on_is_no_prefix(ahead: list[int]) -> None:
    """A request begins as one whose next step is under way: its states are one token further than is known."""
    first = asked(60, 1)
    two = [Request((*first.prompt, token), asked(0, 9).params) for token in (5, 6)]
    third = Request((*two[0].prompt, 7), asked(0, 9).params)
    with Engine(*built("moving")) as engine:
        expected = [engine.generate([request])[0].tokens for request in (*two, third)]
    with led("moving", STAGES, (100, 100), draft=None) as engine:
        engine.generate([first])
        order = [engine.submit(request) for request in two]
        chunks = engine.step()
        assert ahead == [1, 1]
        order.append(engine.submit(third))
        while engine.busy:
            chunks += engine.step()
    found = {chunk.request_id: chunk.completion.tokens for chunk in chunks if chunk.completion}
    assert [found[request_id] for request_id in order] == expected


@pytest.fixture(scope="module")
def alone() -> Iterator[Model]:
    with zoo.load(CARD, **OPTIONS) as model:
        yield model


@pytest.fixture(scope="module", params=["pp=2", "tp=2,pp=2", "pp=3"])
def spread(request: pytest.FixtureRequest) -> Iterator[Model]:
    with zoo.load(CARD, devices=request.param, **OPTIONS) as model:
        yield model


def test_others_come_and_go(alone: Model, spread: Model, tmp_path: Path) -> None:
    """While steps are under way: requests begin, end and are cancelled, whole texts are read and weights written."""
    requests = [asked(n, 12 + n, temperature=n % 2, seed=n, logprobs=1) for n in range(6)]
    expected = alone.engine.generate(requests)
    engine, found = spread.engine, dict[str, Any]()
    order = [engine.submit(request) for request in requests[:4]]
    alone.save(tmp_path / "alone", layout="zoo")
    under_way = [0]
    for number in range(60):
        for chunk in engine.step():
            if chunk.completion is not None:
                found[chunk.request_id] = chunk.completion
        under_way.append(begun(engine))
        if number == 5:
            assert under_way[-1] > 1
            assert relative_error(spread.logits([5, 66, 0]), alone.logits([5, 66, 0])) < TOLERANCE
            assert relative_error(engine.hidden([5, 66, 0]), alone.engine.hidden([5, 66, 0])) < TOLERANCE
            spread.save(tmp_path / "spread", layout="zoo")
            assert same_files(tmp_path / "alone", tmp_path / "spread")
        if number == 7:
            assert under_way[-1] > 1
            order += [engine.submit(request) for request in requests[4:]]
        if number == 10:
            assert under_way[-1] > 1
            assert engine.cancel(order[1])
    assert not engine.busy and begun(engine) == 0
    for number, request_id in enumerate(order):
        tokens = found[request_id].tokens
        assert tokens == expected[number].tokens[: len(tokens)]
        assert (found[request_id].finish_reason == "cancelled") == (number == 1) == (len(tokens) < 12 + number)
        assert found[request_id].logprobs == pytest.approx((expected[number].logprobs or [])[: len(tokens)], abs=1e-3)
    # What the cancelled one left is gone on from, as far as it can be trusted.
    again = Request([*requests[1].prompt, *found[order[1]].tokens], SamplingParams(max_tokens=5, temperature=0.0))
    assert engine.generate([again])[0].tokens == alone.engine.generate([again])[0].tokens


def test_an_interrupted_step_is_done_again(alone: Model, spread: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [asked(n, 12) for n in range(4)]
    expected = [c.tokens for c in alone.engine.generate(requests)]
    engine, tokens = spread.engine, dict[str, list[int]]()
    order = [engine.submit(request) for request in requests]
    apply, calls = Engine._apply, 0

    def interrupted(self: Engine, item: Any, outcome: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        apply(self, item, outcome)

    for number in range(40):
        if number == 6:
            assert begun(engine) > 1
            monkeypatch.setattr(Engine, "_apply", interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.step()
            monkeypatch.setattr(Engine, "_apply", apply)
            assert begun(engine) == 0
        for chunk in engine.step():
            tokens.setdefault(chunk.request_id, []).extend(chunk.tokens)
    assert [tokens[request_id] for request_id in order] == expected


@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_stands_still_is_named(number: signal.Signals) -> None:
    with zoo.load(CARD, devices="pp=2", **OPTIONS) as model:
        impatient(model, 2)
        worker = max(children(os.getpid()))
        for request in range(4):
            model.engine.submit(asked(request, 40))
        for _ in range(6):
            model.engine.step()
        assert begun(model.engine) == 2
        os.kill(worker, number)
        start = monotonic()
        words = "has ended; found signal" if number == signal.SIGKILL else "gives no sign of life; found none for 2 s"
        with pytest.raises(RankError, match=f"rank 1 of 2 {words}"):
            model.engine.run()
        assert monotonic() - start < SOON
