"""Whatever changes the cache reaches the other ranks: a run that leaves one kind of change out is seen to be wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch

from tests.devices.likes import ATTENTION, GATED, MAMBA1, MAMBA2, filled, make_plan
from tests.devices.machines import channels
from zoo.components.cache import slab
from zoo.components.decoder.model import Decoder
from zoo.devices import lead
from zoo.devices.channel import Channel, ClosedError
from zoo.devices.lead import Ranks
from zoo.devices.mesh import Mesh
from zoo.devices.peer import Peer
from zoo.devices.worker import follow_to_the_end
from zoo.engine.engine import Engine
from zoo.engine.memory import MIRRORED
from zoo.engine.request import Request, SamplingParams
from zoo.registry.plan import Plan
from zoo.testing import Rank, ranks_of

WINDOW = {**ATTENTION, "window": 7}
MODELS: dict[str, list[dict[str, Any]]] = {
    "full": [{"repeat": 2, "mixer": ATTENTION, "ffn": GATED}],
    "moving": [{"mixer": mixer, "ffn": GATED} for mixer in (WINDOW, MAMBA1, ATTENTION, {**MAMBA2, "num_groups": 1})],
}
STORAGE = {"full": "pages", "moving": "slab"}
CONTEXTS = 2.1
"""How many whole sequences a cache has room for."""

SHOWN_BY = {name: "full" if name == "trim" else "moving" for name in MIRRORED}
"""Tails are given back only where nothing moves."""


@pytest.fixture(autouse=True, scope="module")
def _small_steps() -> Iterator[None]:
    """Sequences grow by little, so that few tokens fill a cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slab, "STEP", 16)
        yield


@cache
def built(name: str) -> tuple[Decoder, Plan]:
    plan = make_plan(layers=MODELS[name], context=128)
    return filled(plan, 0.3), plan


def requests() -> list[list[Request]]:
    """Rounds of requests that begin alike and repeat themselves, more than a small cache has room for."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randint(67, (66,), generator=generator).tolist()
    words = [torch.randint(67, (n,), generator=generator).tolist() for n in (9, 4, 2, 1)]
    prompts = [[*start, *word, *word] for word in words] + [start, words[0] * 2]
    several = [
        Request(p, SamplingParams(max_tokens=20, temperature=t, seed=5, ignore_eos=True))
        for p, t in zip(prompts, (0.0, 1.0, 0.0, 1.0, 0.0, 0.0), strict=True)
    ]
    other = torch.randint(67, (105,), generator=generator).tolist()
    short = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    return [[Request(p, short)] for p in (other, start, [*start, 3])] + [several, several[::-1]]


def answers(engine: Engine) -> list[list[int]]:
    return [completion.tokens for asked in requests() for completion in engine.generate(asked)]


def sizes(name: str) -> dict[str, Any]:
    """Of an engine with a small cache."""
    module, plan = built(name)
    with Engine(module, plan) as engine:
        whole = engine.memory["cache_budget"] // 64
    own = {"chunk_tokens": 48, "max_batch_size": 3, "storage": STORAGE[name]}
    return {**own, "draft": "lookup", "memory_bytes": int(CONTEXTS * whole)}


@contextmanager
def led(name: str) -> Iterator[Engine]:
    """An engine over two ranks: this thread's, and one in another thread that follows it."""
    module, plan = built(name)
    first, second = ranks_of(plan, module, Mesh(2))
    near, far = channels()
    # Each rank holds half of the heads, and of the channels.
    budget = {**sizes(name), "memory_bytes": sizes(name)["memory_bytes"] // 2}
    follower = threading.Thread(target=followed, args=(second, far, budget), daemon=True)
    follower.start()
    ranks = Ranks({1: near}, {}, 20.0)
    try:
        with Engine(first.module, first.part.fronted, others=ranks, **budget) as engine:
            yield engine
    finally:
        first.abort()
        ranks.close()
        follower.join(20.0)


def followed(rank: Rank, channel: Channel, budget: dict[str, Any]) -> None:
    """What the other rank does; whatever ends it early ends the first one too."""
    own = {name: value for name, value in budget.items() if name != "draft"}
    try:
        with Engine(rank.module, rank.part.local, follows=True, **own) as engine:
            follow_to_the_end(Peer(0, channel), engine, rank.world, no_adapter)
    except (Exception, ClosedError):
        rank.abort()
        channel.close()


def no_adapter(ref: str) -> Any:
    raise AssertionError(ref)


@cache
def expected(name: str) -> list[list[int]]:
    with Engine(*built(name), **sizes(name)) as engine:
        return answers(engine)


@pytest.mark.parametrize("name", MODELS)
def test_ranks_change_their_caches_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = set[str]()
    noted = lead.Ranks._noted

    def watched(self: Ranks, method: str, call: Any) -> Any:
        own = noted(self, method, call)

        def noting(*arguments: Any) -> Any:
            told.add(method)
            return own(*arguments)

        return noting

    monkeypatch.setattr(lead.Ranks, "_noted", watched)
    with led(name) as engine:
        assert answers(engine) == expected(name)
        assert engine._scheduler.preemptions > 0 or name == "full"
    assert told >= {method for method, shown in SHOWN_BY.items() if shown == name}


@pytest.mark.parametrize("method", MIRRORED)
def test_a_change_that_is_not_repeated_is_seen(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = SHOWN_BY[method]
    expected(name)
    monkeypatch.setattr(lead, "MIRRORED", tuple(other for other in MIRRORED if other != method))
    try:
        with led(name) as engine:
            found = answers(engine)
    except Exception:
        return
    assert found != expected(name)
