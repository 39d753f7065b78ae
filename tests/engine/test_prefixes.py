"""Prompts that begin as earlier ones: the same answers, fewer computed tokens, for every kind of cache."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import pytest
import torch

from zoo.assemble import assemble
from zoo.components.adapter import LowRank
from zoo.components.cache import slab
from zoo.components.cache.pages import Pages
from zoo.components.cache.store import Reusable
from zoo.components.decoder.model import Decoder
from zoo.engine import prefixes
from zoo.engine.ahead import Steps
from zoo.engine.engine import Engine
from zoo.engine.pack import Batch
from zoo.engine.prefixes import Match, Prefixes
from zoo.engine.request import Chunk, Completion, Request, SamplingParams
from zoo.engine.runner import Runner
from zoo.engine.sequence import Sequence as Running
from zoo.loading.adapters.read import Adapter
from zoo.registry.card import Card
from zoo.registry.errors import CapacityError, ZooError
from zoo.registry.plan import Plan
from zoo.registry.resolve import resolve

CONTEXT, VOCABULARY, WINDOW = 150, 83, 21
Layout = Literal["slab", "pages"]
Ids = list[int]

ATTENTION: dict[str, Any] = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
FULL = ATTENTION | {"rope": {"theta": 50.0}}
RING = FULL | {"window": WINDOW}
LATENT: dict[str, Any] = {"kind": "latent_attention", "num_heads": 3, "q_lora_rank": 10, "kv_lora_rank": 14}
LATENT |= {"nope_head_dim": 6, "rope_head_dim": 4, "v_head_dim": 5, "rope": {"theta": 50.0}}
INDEXED = LATENT | {"indexer": {"kind": "lightning", "num_heads": 4, "head_dim": 6, "top_k": 20, "norm_eps": 1e-6}}
READING = INDEXED | {"cache": {"kind": "shared", "layer": 0}}
MAMBA1: dict[str, Any] = {"kind": "mamba1", "inner_dim": 32, "state_size": 6, "dt_rank": 3, "conv_size": 4}
MAMBA2: dict[str, Any] = {"kind": "mamba2", "num_heads": 4, "head_dim": 8, "num_groups": 2, "state_size": 6}
MAMBA2 |= {"conv_size": 4, "norm_eps": 1e-5}
MIXERS: dict[str, list[dict[str, Any]]] = {
    "full": [FULL, FULL],
    "window": [RING, RING],
    "windowed and full": [RING, FULL],
    "latent and indexed": [INDEXED, READING],
    "recurrent": [MAMBA2, MAMBA2],
    "recurrent and full": [MAMBA1, FULL],
    "all": [RING, LATENT, MAMBA2, FULL],
}
EXACT = ("full", "latent and indexed")
"""Those that can be gone on from at any token."""

STORED = [("slab", "off"), ("pages", "off"), ("pages", "on")]


@cache
def built(name: str) -> tuple[Decoder, Plan]:
    layers = [{"mixer": mixer, "ffn": {"kind": "gated", "hidden_dim": 20}} for mixer in MIXERS[name]]
    model = {"dim": 16, "vocab_size": VOCABULARY, "norm": {"kind": "rms", "eps": 1e-5}, "layers": layers}
    plan = resolve(Card.from_dict({"name": "prefixes", "context_length": CONTEXT, "model": model}))
    module = assemble(plan, torch.float32).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(7)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return module, plan


@pytest.fixture(autouse=True)
def small_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thresholds of long prompts, for short ones; slabs grow as often as with long ones."""
    for name, value in (("FEWEST", 3), ("WORTH", 6), ("LONG", 12)):
        monkeypatch.setattr(prefixes, name, value)
    monkeypatch.setattr(slab, "STEP", 16)


def make(name: str, contexts: float | None = None, **sizes: Any) -> Engine:
    """contexts: how many whole contexts fit in the cache."""
    module, plan = built(name)
    whole = Engine(module, plan, **sizes)._memory.cost(CONTEXT)
    return Engine(module, plan, memory_bytes=None if contexts is None else int(contexts * whole), **sizes)


def ids(length: int, seed: int = 0) -> Ids:
    return random.Random(1000 * seed + length).choices(range(VOCABULARY), k=length)


def ask(prompt: Ids, **options: Any) -> Request:
    return Request(prompt, SamplingParams(**({"max_tokens": 8} | options)))


def plain(name: str, requests: list[Request]) -> list[Ids]:
    return [done.tokens for done in make(name, prefix_cache=False).generate(requests)]


def check(engine: Engine) -> None:
    """What is counted is what is there, and every page belongs to somebody or to nobody."""
    memory = engine._memory
    assert memory.used == memory.holds(memory.numbers) <= memory.budget
    found = engine._scheduler.prefixes
    assert {*memory.numbers} == {*found._of} | {*found._kept}
    for group in memory._groups:
        storage = getattr(group.store, "storage", None)
        if isinstance(storage, Pages):
            users = [page for table in storage._tables.values() for page in table]
            assert [users.count(page) for page in range(len(storage._users))] == storage._users
            assert sorted({*users, *storage._unused}) == [*range(1, len(storage._users))]
            assert not {*users} & {*storage._unused}


@pytest.fixture(params=MIXERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=STORED, ids="-".join)
def storage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Layout:
    layout: Layout
    layout, capture = request.param
    monkeypatch.setenv("ZOO_CAPTURE", capture)
    return layout


# --- one after another ------------------------------------------------------------------------------------------


def test_a_conversation_goes_on_where_it_stood(name: str, storage: Layout) -> None:
    engine, prompt, computed = make(name, storage=storage, chunk_tokens=16), ids(30), []
    for turn in range(4):
        request = ask(prompt, temperature=turn % 2, seed=turn)
        [done] = engine.generate([request])
        assert [done.tokens] == plain(name, [request])
        computed.append(len(prompt) - done.usage.cached_tokens)
        prompt = [*prompt, *done.tokens, *ids(5, turn)]
        check(engine)
    # The last token of each answer was never computed, and five are new.
    assert computed == [30, 6, 6, 6]


def test_the_same_prompt_again(name: str, storage: Layout) -> None:
    engine, request = make(name, storage=storage, chunk_tokens=64), ask(ids(47))
    answers, cached = [], []
    for _ in range(3):
        [done] = engine.generate([request])
        answers.append(done.tokens)
        cached.append(done.usage.cached_tokens)
    assert answers == plain(name, [request]) * 3
    # Where states move on, from the snapshot at the last sixteenth token; then from one just before the end.
    assert cached == [0, 46 if name in EXACT else 32, 46]


def test_prompts_that_part(name: str, storage: Layout) -> None:
    common = ids(50)
    requests = [ask([*common, seed, *ids(9, seed)]) for seed in range(4)]
    engine = make(name, storage=storage, chunk_tokens=64)
    done = [engine.generate([request])[0] for request in requests]
    assert [each.tokens for each in done] == plain(name, requests)
    # The second one shows where prompts part; the snapshot that it leaves there serves the third.
    assert [each.usage.cached_tokens for each in done] == [0, *[50] * 3] if name in EXACT else [0, 48, 50, 50]


def test_a_common_beginning_of_requests_that_come_together(name: str, storage: Layout) -> None:
    common = ids(40)
    requests = [ask([*common, seed, *ids(9, seed)]) for seed in range(5)]
    engine = make(name, storage=storage)
    done = engine.generate(requests)
    assert [each.tokens for each in done] == plain(name, requests)
    assert [each.usage.cached_tokens for each in done] == [0, 40, 40, 40, 40]


def test_whole_slabs_are_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make("full", storage="slab")
    [done] = engine.generate([ask(ids(20))])
    group = engine._memory._groups[0]
    storage = group.store.storage  # type: ignore[attr-defined]
    [before] = storage._slabs.values()
    places = [each.data_ptr() for each in before]
    stream = engine.stream(ask([*ids(20), *done.tokens, 1]))
    next(stream)
    [after] = storage._slabs.values()
    assert [each.data_ptr() for each in after] == places
    stream.close()


def test_pages_are_shared() -> None:
    engine, common = make("full", storage="pages"), ids(64)
    for seed in range(4):
        engine.submit(ask([*common, *ids(3, seed)], max_tokens=30))
    engine.step()
    engine.step()
    memory = engine._memory
    alone = memory.cost(67)
    # Four pages that all of them use, and one of each.
    assert memory.used == alone // 5 * (4 + 4)
    assert engine.memory["cache_used"] == memory.used
    engine.run()
    check(engine)
    assert engine.memory["cache_used"] == 0 < engine.memory["cache_kept"]


# --- what must not be taken over --------------------------------------------------------------------------------


def cached(engine: Engine, request: Request) -> int:
    return engine.generate([request])[0].usage.cached_tokens


def test_turned_off_nothing_is_kept(name: str) -> None:
    engine = make(name, prefix_cache=False)
    assert [cached(engine, ask(ids(30))) for _ in range(2)] == [0, 0]
    assert engine.memory["cache_kept"] == engine._memory.used == 0


def test_scored_prompts_are_computed() -> None:
    engine = make("full")
    expected = make("full", prefix_cache=False).generate([ask(ids(30), prompt_logprobs=True)])[0].prompt_logprobs
    for _ in range(2):
        [done] = engine.generate([ask(ids(30), prompt_logprobs=True)])
        assert done.usage.cached_tokens == 0
        assert done.prompt_logprobs == pytest.approx(expected, abs=1e-5)
    assert cached(engine, ask(ids(30))) == 29


def adapter(module: Decoder, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    path = "layers.0.ffn.down"
    rows, columns = module.get_submodule(path).weight.shape  # type: ignore[misc]
    shapes = ((2, columns), (rows, 2))
    return Adapter({path: LowRank(*(torch.randn(shape, generator=generator) for shape in shapes))}, [], "")


def test_adapters_have_prefixes_of_their_own() -> None:
    built.cache_clear()
    engine, prompt = make("full"), ids(30)
    module = engine._runner.decoder  # type: ignore[union-attr]
    with engine.between_steps() as (adapters, _):
        adapters.add("a", adapter(module, 1))
    assert [cached(engine, ask(prompt, adapter=choice)) for choice in (None, "a", None, "a")] == [0, 0, 29, 29]
    kept = engine.memory["cache_kept"]
    # Another one of the same name is another one, and what belongs to the old one goes with it.
    with engine.between_steps() as (adapters, _):
        adapters.remove("a")
        adapters.add("a", adapter(module, 2))
    assert engine.memory["cache_kept"] == kept / 2
    assert [cached(engine, ask(prompt, adapter=choice)) for choice in ("a", None)] == [0, 29]
    with engine.between_steps() as (adapters, users):
        adapters.merge("a", users)
    assert engine.memory["cache_kept"] == 0
    assert cached(engine, ask(prompt)) == 0
    built.cache_clear()


def test_what_is_not_finite_is_not_kept() -> None:
    engine = make("full")
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(Decoder, "logits", lambda self, x_RD: torch.full((len(x_RD), VOCABULARY), torch.nan))
        with pytest.raises(ZooError, match="not finite"):
            engine.generate([ask(ids(30))])
    assert engine.memory["cache_kept"] == 0
    assert cached(engine, ask(ids(30))) == 0


def test_memory_that_runs_out_while_computing_takes_all() -> None:
    engine = make("full")
    assert cached(engine, ask(ids(30))) == 0 < engine.memory["cache_kept"]
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(Runner, "run", lambda self, batch: torch.empty(1 << 60))
        with pytest.raises(CapacityError):
            engine.generate([ask(ids(30))])
    assert engine.memory["cache_kept"] == engine._memory.used == 0


@contextmanager
def counted_rows() -> Iterator[list[list[int]]]:
    """The rows of each step that is run within."""
    found: list[list[int]] = []
    run = Runner.run

    def counted(self: Runner, batch: Batch) -> torch.Tensor:
        found.append(batch.rows)
        return run(self, batch)

    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(Runner, "run", counted)
        yield found


# --- room ---------------------------------------------------------------------------------------------------------


def test_what_is_kept_gives_way(name: str, storage: Layout) -> None:
    """With room for one context, whatever was kept before, and the least recently used goes first."""
    engine = make(name, 1, storage=storage)
    for seed in range(4):
        [done] = engine.generate([ask(ids(100, seed), max_tokens=40)])
        assert len(done.tokens) == 40
        check(engine)
    assert engine._scheduler.preemptions == 0


def test_the_least_recently_used_goes_first() -> None:
    engine = make("full", 3, storage="pages")
    for seed in (0, 1, 0, 2):
        cached(engine, ask(ids(100, seed), max_tokens=1))
    assert cached(engine, ask(ids(148, 3), max_tokens=1)) == 0
    assert [cached(engine, ask(ids(100, seed), max_tokens=1)) for seed in (0, 1)] == [99, 80]


def test_who_goes_on_from_a_line_has_used_it() -> None:
    engine = make("full", 3, storage="pages")
    for seed in (0, 1):
        cached(engine, ask(ids(100, seed), max_tokens=1))
    assert cached(engine, ask([*ids(100, 0)[:64], *ids(40, 2)], max_tokens=1)) == 64
    for seed in (3, 4):
        assert cached(engine, ask(ids(148, seed), max_tokens=1)) == 0
    found = [cached(engine, ask(ids(100, seed), max_tokens=1)) for seed in (0, 1)]
    assert found[0] == 99 > found[1]


def test_a_line_is_handed_over_where_a_copy_has_no_room() -> None:
    engine = make("full", 1, storage="pages")
    cached(engine, ask(ids(100), max_tokens=1))
    request = ask([*ids(100)[:60], *ids(80, 1)])
    [done] = engine.generate([request])
    assert (done.tokens, done.usage.cached_tokens) == (plain("full", [request])[0], 60)
    check(engine)


def test_lines_in_pages_lose_their_tails_first() -> None:
    engine = make("full", 2, storage="pages")
    for length in (120, 100, 140):
        cached(engine, ask(ids(length), max_tokens=1))
        check(engine)
    # Of twenty pages, fifteen were kept when nine were asked for.
    assert [cached(engine, ask(ids(length), max_tokens=1)) for length in (100, 140, 120)] == [99, 139, 64]


def test_who_makes_room_keeps_what_is_not_needed() -> None:
    requests = [ask(ids(50, seed), max_tokens=70, temperature=1.0, seed=seed) for seed in range(3)]
    rows: dict[bool, int] = {}
    for on in (True, False):
        engine = make("full", 2, storage="pages", prefix_cache=on, chunk_tokens=32)
        with counted_rows() as computed:
            assert [done.tokens for done in engine.generate(requests)] == plain("full", requests)
        assert engine._scheduler.preemptions > 0
        rows[on] = sum(map(sum, computed))
    assert rows[True] < rows[False] - 60


def test_no_more_than_a_quarter_is_kept_where_memory_is_no_pool() -> None:
    engine = make("full", 12, storage="slab")
    for seed in range(9):
        cached(engine, ask(ids(140, seed), max_tokens=2))
        assert engine.memory["cache_kept"] <= engine.memory["cache_budget"] / 4
    assert engine.memory["cache_kept"] == engine.memory["cache_budget"] // 12 * 3 // 160 * 144
    engine.reset_prefix_cache()
    assert engine.memory["cache_kept"] == 0


# --- whatever happens -------------------------------------------------------------------------------------------


class Crowd:
    """Requests that share beginnings, come at any time, and are cancelled at any time."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine, self.chance = engine, random.Random(seed)
        self.roots = [ids(self.chance.randint(5, 60), seed) for seed in range(3)]
        self.asked: dict[str, Request] = {}
        self.done: dict[str, Completion] = {}
        self.shown: dict[str, Ids] = {}

    def prompt(self) -> Ids:
        chance = self.chance
        ended = [done for done in self.done.values() if len(done.prompt_ids) < 90]
        if ended and chance.random() < 0.6:
            one = chance.choice(ended)
            start = [*one.prompt_ids, *one.tokens] if chance.random() < 0.7 else one.prompt_ids
        else:
            start = chance.choice(self.roots)
        cut = len(start) if chance.random() < 0.7 else chance.randint(1, len(start))
        return [*start[:cut], *chance.choices(range(VOCABULARY), k=chance.randint(1, 12))]

    def submit(self) -> None:
        chance = self.chance
        options = {"max_tokens": chance.randint(1, 14), "temperature": chance.choice((0.0, 1.0))}
        options |= {"seed": len(self.asked), "prompt_logprobs": chance.random() < 0.15}
        request = ask(self.prompt(), **options)
        self.asked[self.engine.submit(request)] = request

    def run(self, count: int) -> None:
        while len(self.asked) < count or self.engine.busy:
            while len(self.asked) < count and self.chance.random() < 0.15:
                self.submit()
            for chunk in self.engine.step():
                assert chunk.error is None
                self.shown.setdefault(chunk.request_id, []).extend(chunk.tokens)
                if chunk.completion is not None:
                    self.done[chunk.request_id] = chunk.completion
            if self.chance.random() < 0.04 and self.engine.busy:
                self.engine.cancel(self.chance.choice([*self.engine._live]))
            check(self.engine)
        self.done |= {chunk.request_id: chunk.completion for chunk in self.engine.step() if chunk.completion}


@pytest.mark.parametrize(("contexts", "chunk", "draft"), [(None, 64, "lookup"), (2.2, 13, None)])
def test_nobody_notices(name: str, storage: Layout, contexts: float | None, chunk: int, draft: str | None) -> None:
    engine = make(name, contexts, storage=storage, chunk_tokens=chunk, max_batch_size=12, draft=draft)
    crowd = Crowd(engine, chunk)
    crowd.run(30)
    assert len(crowd.done) == 30
    alone = make(name, prefix_cache=False, max_batch_size=16).generate(crowd.asked.values())
    for (request_id, request), expected in zip(crowd.asked.items(), alone, strict=True):
        found = crowd.done[request_id]
        if found.finish_reason == "cancelled":
            assert found.tokens == expected.tokens[: len(found.tokens)]
        else:
            assert found.tokens == expected.tokens, request_id
            scores = [(done.prompt_logprobs or [None])[1:] for done in (found, expected)]
            assert scores[0] == pytest.approx(scores[1], rel=1e-4, abs=1e-5)
        if request.params.prompt_logprobs:
            assert found.usage.cached_tokens == 0
    assert contexts or sum(done.usage.cached_tokens for done in crowd.done.values()) > 100
    assert engine.memory["cache_used"] == 0
    engine.close()
    assert all(group.store.nbytes == 0 for group in engine._memory._groups)


def test_an_interrupted_hand_over_is_nobodys(name: str, storage: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while an earlier request's memory goes to the next one, which had been asked for before."""
    engine = make(name, storage=storage)
    [before] = engine.generate([ask(ids(30))])
    longer = [ask([*ids(30), *before.tokens, *ids(20, seed)]) for seed in (1, 2)]
    first, moved = engine._memory._groups[0].store, list[bool]()
    assert isinstance(first, Reusable)
    adopt = first.adopt

    def interrupted(base: int, seq: int, tokens: int, room: int, move: bool) -> None:
        adopt(base, seq, tokens, room, move)
        moved.append(move)
        if len(moved) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(first, "adopt", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([longer[0]])
    check(engine)
    assert [engine.generate([request])[0].tokens for request in longer] == plain(name, longer)
    assert moved[0], "memory is handed over where nothing of it is lost"
    check(engine)


def test_a_hand_over_that_nobody_noted_down_is_nobodys(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error when an earlier request's memory has gone over, but is not known to have."""
    engine = make(name, storage="slab")
    [before] = engine.generate([ask(ids(30))])
    longer = ask([*ids(30), *before.tokens, *ids(20, 1)])
    begin, moved = Prefixes._begin, list[bool]()

    def fails(self: Prefixes, number: int, seq: Running, match: Match | None) -> None:
        if not moved and match is not None:
            moved.append(match.move)
            raise RuntimeError("in between")
        begin(self, number, seq, match)

    monkeypatch.setattr(Prefixes, "_begin", fails)
    with pytest.raises(RuntimeError, match="in between"):
        engine.generate([longer])
    assert moved == [True], "memory is handed over where nothing of it is lost"
    check(engine)
    assert engine.memory["cache_used"] == 0
    assert [engine.generate([longer])[0].tokens] == plain(name, [longer])
    check(engine)


def test_nobody_waits_for_what_a_line_has_left_behind(name: str) -> None:
    """One that runs is past the tokens that another shares with it, and may have no state of them any more."""
    engine = make(name, chunk_tokens=64)
    engine.submit(ask(ids(47), max_tokens=20))
    engine.step()
    other = ask([*ids(47)[:20], *ids(9, 1)])
    engine.submit(other)
    engine.step()
    assert len(engine._scheduler.running) == 2
    tokens = {chunk.request_id: chunk.completion.tokens for chunk in drained(engine) if chunk.completion}
    assert tokens["request-1"] == plain(name, [other])[0]


@pytest.mark.parametrize(("shared", "together"), [(5, True), (6, False)])
def test_others_are_waited_for_where_that_saves_enough(shared: int, together: bool, name: str) -> None:
    engine = make(name, chunk_tokens=64)
    for seed in (1, 2):
        engine.submit(ask([*ids(shared), *ids(20, seed)]))
    engine.step()
    assert (len(engine._scheduler.running) == 2) == together
    drained(engine)


def drained(engine: Engine) -> list[Chunk]:
    """What is still to come."""
    chunks = list[Chunk]()
    while engine.busy:
        chunks += engine.step()
    return chunks


@pytest.mark.parametrize("steps", [0, 2, 5])
def test_an_interrupted_step_loses_what_it_touched(name: str, storage: Layout, steps: int) -> None:
    """Ctrl-C after the last layer wrote: nothing that was half written is used, what stood before it is."""
    engine = make(name, storage=storage, chunk_tokens=16)
    assert isinstance(engine._steps, Steps)
    engine._steps.ahead = (
        False  # each step is one run, which can be interrupted; tests/engine/test_capture.py has those
    )
    [before] = engine.generate([ask(ids(30))])
    requests = [ask([*ids(30), *before.tokens, *ids(20, 1)]), ask(ids(25, 2)), ask([*ids(30), *ids(7, 3)])]
    order = [engine.submit(request) for request in requests]
    rows: list[list[int]] = []
    run = Runner.run

    def counted(self: Runner, batch: Any) -> Any:
        rows.append(batch.rows)
        found = run(self, batch)
        if len(rows) == steps + 1:
            raise KeyboardInterrupt
        return found

    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(Runner, "run", counted)
        chunks = [chunk for _ in range(steps) for chunk in engine.step()]
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        check(engine)
        while engine.busy:
            chunks += engine.step()
    tokens = {name: [token for chunk in chunks if chunk.request_id == name for token in chunk.tokens] for name in order}
    assert [*tokens.values()] == plain(name, requests)
    if name in EXACT:
        # Only the interrupted rows are computed again.
        assert sum(map(sum, rows)) == sum(map(sum, rows[: steps + 1])) + sum(map(sum, rows[steps + 1 :]))
    check(engine)
