"""Whatever changes the cache reaches the other ranks: a run that leaves one kind of change out is seen to be wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

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
from zoo.engine.request import Completion, Request, SamplingParams
from zoo.registry.plan import Plan
from zoo.testing import Rank, ranks_of

WINDOW = {**ATTENTION, "window": 7}
MODELS: dict[str, list[dict[str, Any]]] = {
    "full": [{"repeat": 2, "mixer": ATTENTION, "ffn": GATED}],
    "moving": [{"mixer": mixer, "ffn": GATED} for mixer in (WINDOW, MAMBA1, ATTENTION, {**MAMBA2, "num_groups": 1})],
    "unlike": [{"mixer": mixer, "ffn": GATED} for mixer in (ATTENTION, ATTENTION, MAMBA1, WINDOW)],
}
STORAGE = {"full": "pages", "moving": "slab", "unlike": "slab"}
SHARED_OUT, STAGES = Mesh(2), Mesh(1, 2)

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


def completions(engine: Engine) -> list[Completion]:
    return [completion for asked in requests() for completion in engine.generate(asked)]


def answers(engine: Engine) -> list[list[int]]:
    return [completion.tokens for completion in completions(engine)]


def sizes(name: str, module: Decoder, plan: Plan) -> dict[str, Any]:
    """Of an engine with a small cache."""
    with Engine(module, plan) as engine:
        whole = engine.memory["cache_budget"] // 64
    return {
        "chunk_tokens": 48,
        "max_batch_size": 3,
        "storage": STORAGE[name],
        "memory_bytes": int(CONTEXTS * whole),
    }


@contextmanager
def led(
    name: str,
    mesh: Mesh = SHARED_OUT,
    spare: tuple[int, int] = (1, 1),
    draft: Literal["lookup"] | None = "lookup",
    batch: int = 3,
) -> Iterator[Engine]:
    """An engine over two ranks: this thread's, and one in another thread that follows it.

    spare: how many times as large as small caches theirs are. batch: sequences that run together.
    """
    module, plan = built(name)
    first, second = ranks_of(plan, module, mesh)
    own, others = (sizes(name, rank.module, rank.part.local) for rank in (first, second))
    for size, times in zip((own, others), spare, strict=True):
        size["memory_bytes"] *= times
        size["max_batch_size"] = batch
    near, far = channels()
    follower = threading.Thread(target=followed, args=(second, far, others), daemon=True)
    follower.start()
    ranks = Ranks({1: near}, {}, 20.0)
    if mesh.pp > 1:
        ranks.elsewhere = [(second.part.states, others["memory_bytes"])]
    try:
        with Engine(first.module, first.part.fronted, draft=draft, others=ranks, **own) as engine:
            yield engine
    finally:
        first.abort()
        ranks.close()
        follower.join(20.0)


def followed(rank: Rank, channel: Channel, budget: dict[str, Any]) -> None:
    """What the other rank does; whatever ends it early ends the first one too."""
    try:
        with Engine(rank.module, rank.part.local, follows=True, **budget) as engine:
            follow_to_the_end(Peer(0, channel), engine, rank.world, unasked, unasked)
    except (Exception, ClosedError):
        rank.abort()
        channel.close()


def unasked(what: Any) -> Any:
    raise AssertionError(what)


@cache
def expected(name: str) -> list[list[int]]:
    with Engine(*built(name), draft="lookup", **sizes(name, *built(name))) as engine:
        return answers(engine)


@pytest.mark.parametrize("name", ["full", "moving"])
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


@pytest.mark.parametrize("spare", [(1, 100), (100, 1)])
@pytest.mark.usefixtures("always_guess")
def test_unlike_stages_reuse_prefixes_and_check_guesses(spare: tuple[int, int]) -> None:
    """Whichever stage has a small cache: rows of the first one fill it, states of the second one from the start."""
    with led("unlike", STAGES, spare) as engine:
        found = completions(engine)
        assert (engine._scheduler.preemptions > 0) == (spare[0] == 1)
    assert [completion.tokens for completion in found] == expected("unlike")
    assert sum(completion.usage.cached_tokens > 0 for completion in found) > 1
    assert sum(completion.usage.drafted_tokens for completion in found) > 0


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
