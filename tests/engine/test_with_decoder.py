"""The loop around a real decoder: full and windowed attention, a mixture of experts, float32 on the CPU."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from zoo.components.build import build
from zoo.components.cache.store import fresh_step
from zoo.components.decoder.model import Decoder
from zoo.engine.engine import Engine
from zoo.engine.request import Completion, Request
from zoo.registry.card import Card
from zoo.registry.plan import Plan
from zoo.registry.resolve import resolve

WINDOW, VOCABULARY, CONTEXT = 8, 67, 80
Ask = Callable[..., Request]
Layout = Literal["slab", "pages"]


def make_plan(window: int | None) -> Plan:
    mixer = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "rope": {"theta": 50.0}}
    gated = {"kind": "gated", "hidden_dim": 20}
    experts = {"kind": "moe", "num_experts": 4, "experts_per_token": 2, "expert": gated}
    layers = [
        {"mixer": {**mixer, "window": window}, "ffn": gated},
        {"mixer": mixer, "ffn": experts},
        {"mixer": {**mixer, "window": window}, "ffn": gated},
    ]
    model = {"dim": 16, "vocab_size": VOCABULARY, "norm": {"kind": "rms", "eps": 1e-5}, "layers": layers}
    return resolve(Card.from_dict({"name": "engine-test", "context_length": CONTEXT, "model": model}))


def make_decoder(plan: Plan, dtype: torch.dtype = torch.float32) -> Decoder:
    module = build(plan.model, device="cpu", dtype=dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(11)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * (parameter.shape[-1] ** -0.5))
    assert isinstance(module, Decoder)
    return module


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(WINDOW)


@pytest.fixture(scope="module")
def decoder(plan: Plan) -> Decoder:
    return make_decoder(plan)


@pytest.fixture
def engine(plan: Plan, decoder: Decoder) -> Callable[..., Engine]:
    def make(**sizes: Any) -> Engine:
        return Engine(decoder, plan, **sizes)

    return make


@pytest.fixture(scope="module")
def crowded() -> Callable[..., Engine]:
    """Engines of a model without windows whose cache holds two whole contexts, in pages, so that it often overflows."""
    plan = make_plan(None)
    decoder = make_decoder(plan)

    def make(contexts: int | None = 2, **sizes: Any) -> Engine:
        sizes = {"storage": "pages", **sizes}
        memory = None if contexts is None else contexts * Engine(decoder, plan, **sizes)._memory.cost(CONTEXT)
        return Engine(decoder, plan, memory_bytes=memory, **sizes)

    return make


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(1000 * seed + length).choices(range(VOCABULARY), k=length)


def prefill(decoder: Decoder, tokens: Sequence[int]) -> Tensor:
    with torch.inference_mode():
        logits_TV: Tensor = decoder(torch.tensor([*tokens]), fresh_step(decoder.spec, [len(tokens)]))
    return logits_TV


def greedy(decoder: Decoder, tokens: Sequence[int], count: int) -> list[int]:
    """The likeliest continuation without any cache."""
    found = [*tokens]
    for _ in range(count):
        found.append(int(prefill(decoder, found)[-1].argmax()))
    return found[len(tokens) :]


def answers(completions: list[Completion]) -> list[list[int]]:
    return [c.tokens for c in completions]


LENGTHS = [1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 2 * WINDOW + 1, 33]


@pytest.mark.parametrize("storage", ["slab", "pages"])
@pytest.mark.parametrize("chunk", [1, 3, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 64])
def test_greedy_tokens_are_those_without_a_cache(
    engine: Callable[..., Engine], decoder: Decoder, ask: Ask, storage: Layout, chunk: int
) -> None:
    expected = [greedy(decoder, prompt(n), 12) for n in LENGTHS]
    assert len({token for tokens in expected for token in tokens}) > 15, "the model must not be trivial"
    requests = [ask(prompt(n), max_tokens=12) for n in LENGTHS]
    together = engine(chunk_tokens=chunk, storage=storage).generate(requests)
    assert answers(together) == expected
    one_by_one = engine(chunk_tokens=chunk, storage=storage, max_batch_size=1)
    assert answers(one_by_one.generate(requests)) == expected


@pytest.mark.parametrize("storage", ["slab", "pages"])
def test_sampled_tokens_do_not_depend_on_batch_or_chunks(
    engine: Callable[..., Engine], ask: Ask, storage: Layout
) -> None:
    settings: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 2.0, "min_p": 0.05},
    ]
    requests = [ask(prompt(n), max_tokens=10, seed=n, **settings[i % 4]) for i, n in enumerate(LENGTHS)]
    expected = [engine().generate([request])[0].tokens for request in requests]
    for sizes in ({}, {"chunk_tokens": 5}, {"chunk_tokens": 1}, {"max_batch_size": 2}):
        assert answers(engine(storage=storage, **sizes).generate(requests)) == expected


@pytest.mark.parametrize("chunk", [5, 64])
def test_a_cache_too_small_for_all_changes_no_token(crowded: Callable[..., Engine], ask: Ask, chunk: int) -> None:
    requests = [ask(prompt(n), max_tokens=40, seed=n, temperature=n % 2) for n in LENGTHS]
    expected = answers(crowded(None).generate(requests))
    small = crowded(2, chunk_tokens=chunk)
    assert answers(small.generate(requests)) == expected
    assert small._scheduler.preemptions > 2
    assert small.memory["cache_peak"] <= small.memory["cache_budget"] == 2 * small._memory.cost(CONTEXT)
    assert small.memory["cache_used"] == 0


def test_windows_with_room_for_one_run_one_by_one(engine: Callable[..., Engine], ask: Ask) -> None:
    requests = [ask(prompt(n), max_tokens=20) for n in LENGTHS]
    for storage in ("slab", "pages"):
        small = engine(storage=storage, memory_bytes=engine(storage=storage)._memory.cost(CONTEXT))
        assert answers(small.generate(requests)) == answers(engine().generate(requests))


def test_the_memory_in_use_is_what_the_stores_hold(engine: Callable[..., Engine], ask: Ask) -> None:
    for storage in ("slab", "pages"):
        running = engine(storage=storage, chunk_tokens=16)
        for n in LENGTHS:
            running.submit(ask(prompt(n), max_tokens=20))
        while running.busy:
            running.step()
            assert running._memory.used == running._memory.holds(running._memory.numbers) <= running._memory.budget
        assert running.memory["cache_used"] == 0 < running._memory.peak


def test_logprobs_are_those_of_one_full_prefill(engine: Callable[..., Engine], decoder: Decoder, ask: Ask) -> None:
    requests = [
        ask(prompt(n), max_tokens=9, logprobs=4, prompt_logprobs=True, temperature=n % 3, seed=n) for n in LENGTHS
    ]
    for done in engine(chunk_tokens=7).generate(requests):
        tokens = done.prompt_ids + done.tokens
        logprobs_TV = prefill(decoder, tokens).log_softmax(-1)
        following = logprobs_TV[:-1].gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]
        assert done.prompt_logprobs is not None
        assert done.prompt_logprobs[0] is None
        found = torch.tensor([*done.prompt_logprobs[1:], *(done.logprobs or [])])
        torch.testing.assert_close(found, following, rtol=1e-4, atol=1e-5)
        for row, top in zip(logprobs_TV[len(done.prompt_ids) - 1 :], done.top_logprobs or [], strict=False):
            torch.testing.assert_close(torch.tensor([*top.values()]), row.topk(4).values, rtol=1e-4, atol=1e-5)
            assert [*top] == row.topk(4).indices.tolist()


def test_logits_and_hidden_are_one_full_prefill(engine: Callable[..., Engine], decoder: Decoder) -> None:
    tokens = prompt(33)
    running = engine()
    logits_TV = running.logits(tokens)
    assert (logits_TV.shape, logits_TV.dtype) == ((33, VOCABULARY), torch.float32)
    assert torch.equal(logits_TV, prefill(decoder, tokens))
    hidden_TD = running.hidden(tokens)
    assert hidden_TD.shape == (33, 16)
    assert torch.equal(decoder.logits(hidden_TD), logits_TV)
    assert running.memory["cache_peak"] == 0
    logits_TV[0] = 0.0


def test_the_whole_context_can_be_filled(engine: Callable[..., Engine], decoder: Decoder, ask: Ask) -> None:
    done = engine(chunk_tokens=13).generate([ask(prompt(CONTEXT - 5)), ask(prompt(CONTEXT))])
    assert answers(done) == [greedy(decoder, prompt(CONTEXT - 5), 5), []]


def test_a_half_precision_cache_and_model_run(plan: Plan, ask: Ask) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        running = Engine(make_decoder(plan, dtype), plan, dtype=dtype)
        done = running.generate([ask(prompt(n), max_tokens=5, logprobs=1) for n in LENGTHS])
        assert [len(c.tokens) for c in done] == [5] * len(LENGTHS)
        assert running._memory.cost(1) * 2 == Engine(make_decoder(plan), plan)._memory.cost(1)


@pytest.mark.parametrize("cramped", [False, True])
def test_fifty_random_requests_that_come_and_go(
    engine: Callable[..., Engine], crowded: Callable[..., Engine], ask: Ask, joined: Callable[..., None], cramped: bool
) -> None:
    chance = random.Random(5)
    requests = [
        ask(
            prompt(chance.randint(1, 40), i),
            max_tokens=chance.randint(0, 30),
            temperature=chance.choice([0.0, 1.0]),
            top_k=chance.choice([0, 3]),
            seed=i,
            logprobs=chance.choice([None, 0, 2]),
            stop_ids=chance.sample(range(VOCABULARY), 2),
        )
        for i in range(50)
    ]
    make = crowded if cramped else engine
    expected = [make(**({"contexts": None} if cramped else {})).generate([request])[0] for request in requests]
    assert {c.finish_reason for c in expected} == {"stop", "length"}
    running = make(chunk_tokens=24, max_batch_size=7)
    waiting = [*range(50)]
    streams: dict[int, tuple[Any, list[Any]]] = {}
    while waiting or streams:
        if waiting and (len(streams) < 3 or chance.random() < 0.3):
            i = waiting.pop(0)
            streams[i] = (running.stream(requests[i]), [])
        i = chance.choice(list(streams))
        stream, chunks = streams[i]
        chunk = next(stream, None)
        if chunk is not None:
            chunks.append(chunk)
            continue
        assert chunks[-1].completion.tokens == expected[i].tokens, i
        assert chunks[-1].finish_reason == expected[i].finish_reason
        joined(chunks, chunks[-1].completion)
        del streams[i]
        if chance.random() < 0.3:
            abandoned = running.stream(requests[i])
            next(abandoned)
            abandoned.close()
    assert not running.busy
    assert (running._scheduler.preemptions > 0) == cramped
    assert running.memory["cache_used"] == 0
