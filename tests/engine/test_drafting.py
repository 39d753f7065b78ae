"""Guesses never change what is generated: every kind of cache, any batch, whatever is guessed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from zoo.assemble import assemble
from zoo.components import native
from zoo.components.decoder.model import Decoder
from zoo.engine.capture import Captured
from zoo.engine.drafting import Asked
from zoo.engine.engine import DRAFT_ROWS, Engine
from zoo.engine.lookup import LONGEST, Chains, Lookup
from zoo.engine.request import Completion, Request, SamplingParams
from zoo.registry.card import Card
from zoo.registry.errors import RequestError
from zoo.registry.plan import Plan
from zoo.registry.resolve import resolve

pytestmark = pytest.mark.usefixtures("always_guess")

Make = Callable[..., Any]
CONTEXT, VOCABULARY = 110, 67
ATTENTION: dict[str, Any] = {
    "kind": "attention",
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
    "rope": {"theta": 50.0},
}
LATENT: dict[str, Any] = {"kind": "latent_attention", "num_heads": 4, "q_lora_rank": 10, "kv_lora_rank": 14}
LATENT |= {"nope_head_dim": 6, "rope_head_dim": 4, "v_head_dim": 5, "rope": {"theta": 50.0}}
INDEXER = {"kind": "lightning", "num_heads": 16, "head_dim": 6, "top_k": 20, "norm_eps": 1e-6}
READING = LATENT | {"indexer": INDEXER, "cache": {"kind": "shared", "layer": 0}}
MAMBA2 = {"kind": "mamba2", "num_heads": 6, "head_dim": 4, "num_groups": 2, "state_size": 5}
MAMBA2 |= {"conv_size": 4, "norm_eps": 1e-5}
MAMBA1: dict[str, Any] = {"kind": "mamba1", "inner_dim": 32, "state_size": 6, "dt_rank": 3, "conv_size": 4}
GATED: dict[str, Any] = {"kind": "gated", "hidden_dim": 20}
MOE: dict[str, Any] = {"kind": "moe", "num_experts": 4, "experts_per_token": 2, "expert": GATED}
WINDOW = ATTENTION | {"window": 9}
LAYERS: dict[str, list[dict[str, Any]]] = {
    "full": [{"mixer": ATTENTION, "ffn": GATED}] * 2,
    "window": [{"mixer": WINDOW, "ffn": GATED}, {"mixer": ATTENTION, "ffn": GATED}],
    "window in a full cache": [{"mixer": WINDOW | {"cache": {"kind": "full"}}, "ffn": GATED}],
    "sinks": [{"mixer": WINDOW | {"sinks": True}, "ffn": GATED}],
    "latent": [{"mixer": LATENT, "ffn": GATED}],
    "indexed": [{"mixer": LATENT | {"indexer": INDEXER}, "ffn": GATED}, {"mixer": READING, "ffn": GATED}],
    "mamba1": [{"mixer": MAMBA1, "ffn": None}],
    "mamba2": [{"mixer": MAMBA2, "ffn": None}],
    "hybrid": [{"mixer": MAMBA2, "ffn": MOE}, {"mixer": WINDOW, "ffn": None}, {"mixer": MAMBA1, "ffn": GATED}],
    "mixture": [{"mixer": ATTENTION, "ffn": MOE}],
}


@cache
def built(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Decoder, Plan]:
    model = {"dim": 24, "vocab_size": VOCABULARY, "norm": {"kind": "rms", "eps": 1e-5}, "layers": LAYERS[kind]}
    plan = resolve(Card.from_dict({"name": "drafting", "context_length": CONTEXT, "model": model}))
    module = assemble(plan, dtype).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(5)
    for parameter in module.parameters():
        parameter.requires_grad_(False).copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return module, plan


def prompt(length: int) -> list[int]:
    """Random tokens with a repetition in them."""
    chance = random.Random(length)
    tokens = chance.choices(range(VOCABULARY), k=-(-length // 2))
    return (tokens + chance.choices(range(VOCABULARY), k=2) + tokens)[:length]


class Oracle(Lookup):
    """Guesses from known answers, each token wrong with some chance: what tries accepting and rejecting best."""

    def __init__(self, answers: dict[tuple[int, ...], list[int]], wrong: float) -> None:
        super().__init__()
        self.answers, self.wrong, self.chance = answers, wrong, random.Random(3)

    def drafts(self, asked: Asked) -> list[list[int]]:
        found = []
        for seq, count in asked:
            rest = self.answers[tuple(seq.tokens[: seq.prompt_length])][seq.generated :][
                : self.chance.randint(0, count)
            ]
            found.append([t if self.chance.random() > self.wrong else self.chance.randrange(VOCABULARY) for t in rest])
        return found


def guessing(engine: Engine, answers: dict[tuple[int, ...], list[int]], wrong: float = 0.3) -> Engine:
    assert engine._scheduler.drafting is not None
    engine._scheduler.drafting.source = Oracle(answers, wrong)
    return engine


SETTINGS = [
    SamplingParams(max_tokens=34, ignore_eos=True),
    SamplingParams(max_tokens=34, temperature=1.0, seed=3, ignore_eos=True, logprobs=2, prompt_logprobs=True),
    SamplingParams(max_tokens=20, temperature=0.8, top_p=0.9, seed=4, drafts=0),
    SamplingParams(max_tokens=25, logprobs=0, drafts=3, stop_ids=(5, 6)),
]


def requests() -> list[Request]:
    return [Request(prompt(n), SETTINGS[i % 4]) for i, n in enumerate((1, 2, 19, 66, 5, 34, 21))]


@cache
def alone(kind: str) -> list[Completion]:
    """What each request gives by itself, without drafts."""
    plain = [replace(request, params=replace(request.params, drafts=None)) for request in requests()]
    return [Engine(*built(kind)).generate([request])[0] for request in plain]


def known(found: list[Completion]) -> dict[tuple[int, ...], list[int]]:
    return {tuple(c.prompt_ids): c.tokens for c in found}


def same(found: list[Completion], expected: list[Completion]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.tokens, one.finish_reason) == (other.tokens, other.finish_reason)
        if other.logprobs is not None:
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
            assert [[*top] for top in one.top_logprobs or ()] == [[*top] for top in other.top_logprobs or ()]
        if other.prompt_logprobs is not None:
            assert one.prompt_logprobs == pytest.approx(other.prompt_logprobs, abs=1e-4)


@pytest.mark.parametrize("storage", ["slab", "pages"])
@pytest.mark.parametrize("kind", LAYERS)
def test_drafts_change_nothing(kind: str, storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone(kind)
    assert len({token for c in expected for token in c.tokens}) > 20, "the model must not be trivial"
    contexts = 2 * Engine(*built(kind), storage=storage)._memory.cost(CONTEXT)
    monkeypatch.setenv("ZOO_CAPTURE", "on")
    monkeypatch.setitem(DRAFT_ROWS, "cpu", 24)
    variants: list[dict[str, Any]] = [{}, {"chunk_tokens": 11, "max_batch_size": 3}, {"memory_bytes": contexts}]
    for sizes in variants:
        engine = guessing(Engine(*built(kind), storage=storage, draft="lookup", **sizes), known(expected))
        found = engine.generate(requests())
        same(found, expected)
        usages = [c.usage for c in found]
        assert 30 < sum(u.accepted_tokens for u in usages) < 0.9 * sum(u.drafted_tokens for u in usages)
        assert not any(u.drafted_tokens for u, r in zip(usages, requests(), strict=True) if r.params.drafts == 0)
        assert engine.memory["cache_used"] == 0


@pytest.mark.parametrize("kind", ["full", "latent"])
def test_drafts_run_in_recorded_steps_where_no_slot_is_taken_twice(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone(kind)
    monkeypatch.setenv("ZOO_CAPTURE", "on")
    monkeypatch.setitem(DRAFT_ROWS, "cpu", 24)
    runs: list[int] = []
    run = Captured.run

    def counted(self: Captured, batch: Any) -> Any:
        found = run(self, batch)
        runs.append(0 if found is None else len(found))
        return found

    monkeypatch.setattr(Captured, "run", counted)
    engine = guessing(Engine(*built(kind), storage="pages", draft="lookup"), known(expected))
    same(engine.generate(requests()), expected)
    assert max(runs) > len(expected), "more rows than sequences"


def own(kind: str, noise: float) -> tuple[Decoder, Plan]:
    """The model with other weights by a little: one that guesses well."""
    module, plan = built(kind)
    draft = assemble(plan, torch.float32).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(9)
    for mine, others in zip(draft.parameters(), module.parameters(), strict=True):
        mine.requires_grad_(False).copy_(others + noise * torch.randn(others.shape, generator=generator))
    return draft, plan


@pytest.mark.parametrize("storage", ["slab", "pages"])
@pytest.mark.parametrize("kind", ["full", "window", "hybrid", "indexed"])
def test_another_model_guesses(kind: str, storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cache follows the sequences: through chunks, wrong guesses, preemption and requests that want none."""
    expected = alone(kind)
    contexts = 4 * Engine(*built(kind), storage=storage)._memory.cost(CONTEXT)
    monkeypatch.setenv("ZOO_CAPTURE", "on")
    monkeypatch.setitem(DRAFT_ROWS, "cpu", 24)
    variants: list[dict[str, Any]] = [{}, {"chunk_tokens": 11, "max_batch_size": 3}, {"memory_bytes": contexts}]
    for sizes in variants:
        engine = Engine(*built(kind), storage=storage, draft=own(kind, 0.01), **sizes)
        found = engine.generate(requests())
        same(found, expected)
        usages = [c.usage for c in found]
        assert 30 < sum(u.accepted_tokens for u in usages) < sum(u.drafted_tokens for u in usages)
        assert engine.memory["cache_used"] == 0
        assert engine._scheduler.drafting is not None
        [cache] = engine._scheduler.drafting.source.caches
        assert cache.used == 0
        assert cache.peak > 0


@pytest.mark.parametrize("kind", ["full", "window", "hybrid"])
def test_a_model_that_guesses_for_itself_is_always_right(kind: str) -> None:
    asked = [Request(prompt(n), replace(SETTINGS[i % 2], max_tokens=30)) for i, n in enumerate((3, 40, 17))]
    for request in asked:
        engine = Engine(*built(kind), draft=own(kind, 0.0))
        [done] = engine.generate([request])
        assert done.usage.accepted_tokens == done.usage.drafted_tokens > 20
        assert engine.memory["weights"] == 2 * Engine(*built(kind)).memory["weights"]


def test_a_model_with_a_short_context_guesses_as_far_as_it_reads() -> None:
    module, plan = built("full")
    short = resolve(plan.card.with_overrides({"context_length": 40}))
    asked = Request(prompt(30), SamplingParams(max_tokens=60, ignore_eos=True))
    [expected] = Engine(module, plan).generate([asked])
    engine = Engine(module, plan, draft=(own("full", 0.0)[0], short))
    [found] = engine.generate([asked])
    assert found.tokens == expected.tokens
    assert 0 < found.usage.accepted_tokens < 12


def test_half_precision_gives_the_same_tokens() -> None:
    for kind in ("window", "hybrid", "latent"):
        model = built(kind, torch.bfloat16)
        asked = Request(prompt(30), SamplingParams(max_tokens=60, ignore_eos=True))
        [expected] = Engine(*model, dtype=torch.bfloat16).generate([asked])
        engine = Engine(*model, dtype=torch.bfloat16, draft="lookup")
        [found] = guessing(engine, known([expected])).generate([asked])
        assert found.tokens == expected.tokens
        assert 5 < found.usage.accepted_tokens < found.usage.drafted_tokens


class Fixed(Lookup):
    """Guesses the tokens that are written down."""

    def __init__(self, tokens: list[int]) -> None:
        super().__init__()
        self.tokens = tokens

    def drafts(self, asked: Asked) -> list[list[int]]:
        return [self.tokens[len(seq.tokens) :][:count] for seq, count in asked]


def scripted(make_engine: Make, decoder: Any, answer: list[int], **sizes: Any) -> Engine:
    """An engine whose guesses are the script's, all right."""
    engine: Engine = make_engine(decoder, draft="lookup", **sizes)
    assert engine._scheduler.drafting is not None
    engine._scheduler.drafting.source = Fixed([1, *answer])
    return engine


SCRIPT = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24]


def test_right_drafts_save_steps(make_engine: Make, ask: Make, fake_decoder: Make) -> None:
    decoder = fake_decoder({1: SCRIPT})
    [done] = scripted(make_engine, decoder, SCRIPT).generate([ask([1], max_tokens=14)])
    assert done.tokens == SCRIPT
    assert decoder.steps == [[1], [1] * 8, [1] * 5]
    assert (done.usage.drafted_tokens, done.usage.accepted_tokens, done.usage.completion_tokens) == (11, 11, 14)


def test_wrong_drafts_are_taken_back(make_engine: Make, ask: Make, fake_decoder: Make) -> None:
    decoder = fake_decoder({1: SCRIPT})
    guesses = [11, 12, 13, 50, 15, 16, 17, 51, 52, 53, 54, 55, 56, 57]
    [done] = scripted(make_engine, decoder, guesses).generate([ask([1], max_tokens=9)])
    assert done.tokens == SCRIPT[:9]
    assert (done.usage.drafted_tokens, done.usage.accepted_tokens) == (7 + 4, 2 + 3)


def test_tokens_behind_the_end_are_dropped(
    make_engine: Make, ask: Make, fake_decoder: Make, fake_tokenizer: Make, joined: Make
) -> None:
    tokenizer = fake_tokenizer({token: b"%d." % token for token in SCRIPT}, stop_ids=(20,))
    endings: list[dict[str, Any]] = [{}, {"stop": ["4.15.1"]}, {"stop_ids": [13]}, {"max_tokens": 6}]
    for options in (*endings, {"ignore_eos": True}):
        request = ask([1], tokenizer=tokenizer, **{"max_tokens": 12, "logprobs": 1, **options})
        [expected] = make_engine(fake_decoder({1: SCRIPT})).generate([request])
        engine = scripted(make_engine, fake_decoder({1: SCRIPT}), SCRIPT)
        chunks = [*engine.stream(request)]
        done = chunks[-1].completion
        assert done is not None
        joined(chunks, done)
        assert len(chunks) <= 3
        assert (done.tokens, done.text) == (expected.tokens, expected.text)
        assert done.finish_reason == expected.finish_reason
        assert done.logprobs == expected.logprobs
        assert done.top_logprobs == expected.top_logprobs
        assert done.usage.accepted_tokens < done.usage.completion_tokens


def test_cancelled_and_interrupted_steps_leave_nothing_marked(make_engine: Make, ask: Make, fake_decoder: Make) -> None:
    decoder = fake_decoder({1: SCRIPT})
    engine = scripted(make_engine, decoder, SCRIPT)
    first = engine.submit(ask([1], max_tokens=14))
    engine.step()

    def interrupted(step: Any) -> None:
        decoder.fault = None
        raise KeyboardInterrupt

    decoder.fault = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    second = engine.submit(ask([1], max_tokens=14))
    engine.step()
    engine.cancel(first)
    done = {completion.request_id: completion for completion in engine.run()}
    assert done[second].tokens == SCRIPT


def test_logits_that_are_not_finite_behind_a_wrong_draft_do_not_matter(
    make_engine: Make, ask: Make, fake_decoder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = fake_decoder({1: SCRIPT})
    row = type(decoder)._row

    def broken(self: Any, history: list[int]) -> Any:
        return row(self, history) if 50 not in history else torch.full((61,), torch.nan)

    monkeypatch.setattr(type(decoder), "_row", broken)
    engine = scripted(make_engine, decoder, [11, 12, 50, 14])
    assert engine.generate([ask([1], max_tokens=8)])[0].tokens == SCRIPT[:8]


def test_many_sequences_share_the_rows_and_prompts_get_the_rest(
    make_engine: Make, ask: Make, fake_decoder: Make
) -> None:
    decoder = fake_decoder({1: SCRIPT})
    engine = scripted(make_engine, decoder, SCRIPT, chunk_tokens=40)
    engine.generate([ask([1], max_tokens=14) for _ in range(5)] + [ask([1] * 30, max_tokens=1)])
    assert decoder.steps[0] == [1] * 5 + [30]
    assert decoder.steps[1] == [1] * 8, "5 sequences have 8 rows to share"
    most = engine_rows(decoder, make_engine, ask, 9)
    assert most == 9, "where sequences fill the rows there are no drafts"


def engine_rows(decoder: Any, make_engine: Make, ask: Make, count: int) -> int:
    decoder.steps.clear()
    scripted(make_engine, decoder, SCRIPT).generate([ask([1], max_tokens=5) for _ in range(count)])
    return max(len(rows) for rows in decoder.steps)


def test_drafts_throw_nobody_out(make_engine: Make, ask: Make, fake_decoder: Make) -> None:
    """48 tokens fit: two sequences of 16 leave a grain for drafts of the first, and none for the second's."""
    decoder = fake_decoder()
    requests = [ask([1] * 14, max_tokens=12), ask([2] * 14, max_tokens=12)]
    expected = make_engine(fake_decoder(), memory_bytes=48).generate(requests)
    engine = scripted(make_engine, decoder, SCRIPT, memory_bytes=48)
    assert [c.tokens for c in engine.generate(requests)] == [c.tokens for c in expected]
    assert engine._scheduler.preemptions <= 1


def test_a_request_for_drafts_needs_something_that_guesses(make_engine: Make, ask: Make) -> None:
    with pytest.raises(RequestError, match=r"drafts: nothing guesses.*draft='lookup'"):
        make_engine().submit(ask([1], drafts=2))
    with pytest.raises(RequestError, match="drafts: out of range"):
        ask([1], drafts=-1)
    assert make_engine().generate([ask([1], drafts=0, max_tokens=2)])[0].usage.drafted_tokens == 0


# --- where guesses come from -----------------------------------------------------------------------------------------


def longest_match(tokens: list[int]) -> tuple[int, int]:
    """The length of the longest earlier match of the end, and where the latest one of that length ends."""
    best = (1, -1)
    for place in range(len(tokens) - 1):
        length = 0
        while length <= min(place, LONGEST - 1) and tokens[place - length] == tokens[-1 - length]:
            length += 1
        if length > 1 and length >= best[0]:
            best = (length, place)
    return best


def test_lookup_finds_the_longest_and_latest_match() -> None:
    chance = random.Random(2)
    found = 0
    for _ in range(60):
        chains, tokens = Chains(), chance.choices(range(chance.randint(3, 9)), k=3)
        while len(tokens) < 60:
            tokens += chance.choices(range(chance.randint(3, 9)), k=chance.randint(1, 4))
            drafts = chains.drafts(tokens, 5)
            _, place = longest_match(tokens)
            if place >= 0:
                found += 1
                follow = [*tokens]
                for _ in range(5):
                    follow.append(follow[place + 1 + len(follow) - len(tokens)])
                assert drafts == follow[len(tokens) :]
            else:
                assert drafts == []
    assert found > 500


def test_lookup_of_a_single_token_and_of_a_period() -> None:
    assert Chains().drafts([4], 3) == []
    assert Chains().drafts([4, 5, 4], 3) == []
    assert Chains().drafts([9, 4, 5, 6, 4, 5, 6], 7) == [4, 5, 6, 4, 5, 6, 4]
    assert Chains().drafts([7] * 4, 3) == [7, 7, 7]


@pytest.mark.skipif(native.missing() is not None, reason="the native kernels are not in use")
@pytest.mark.parametrize("kind", ["window", "hybrid", "latent"])
def test_every_bit_is_the_same_where_native_kernels_multiply(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide(kind)
    asked = Request(prompt(20), SamplingParams(max_tokens=60, ignore_eos=True, logprobs=5))
    [expected] = Engine(*model, dtype=torch.bfloat16).generate([asked])
    [found] = guessing(Engine(*model, dtype=torch.bfloat16, draft="lookup"), known([expected])).generate([asked])
    assert 10 < found.usage.accepted_tokens < found.usage.drafted_tokens
    assert found.tokens == expected.tokens
    assert found.logprobs == expected.logprobs
    assert found.top_logprobs == expected.top_logprobs


@cache
def wide(kind: str) -> tuple[Decoder, Plan]:
    """Sizes like those of real models: multiples of a processor's vectors, so that no row ends within one."""
    grown: dict[str, Any] = {"num_heads": 4, "head_dim": 32, "hidden_dim": 128, "inner_dim": 128, "kv_lora_rank": 64}
    grown |= {"q_lora_rank": 64, "nope_head_dim": 32, "rope_head_dim": 32, "v_head_dim": 32, "state_size": 32}

    def widened(node: Any) -> Any:
        if isinstance(node, list):
            return [widened(item) for item in node]
        return {k: grown.get(k, widened(v)) for k, v in node.items()} if isinstance(node, dict) else node

    model = {"dim": 64, "vocab_size": VOCABULARY, "norm": {"kind": "rms", "eps": 1e-5}, "layers": widened(LAYERS[kind])}
    plan = resolve(Card.from_dict({"name": "wide", "context_length": CONTEXT, "model": model}))
    module = assemble(plan, torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(5)
    for parameter in module.parameters():
        parameter.requires_grad_(False).copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return module, plan


@pytest.mark.parametrize("kind", ["full", "window", "hybrid"])
def test_what_ended_among_right_guesses_is_gone_on_from(kind: str) -> None:
    """An answer cut by a stop id has cached no more than its own tokens; a prompt that goes on from it starts there."""
    first = Request(prompt(40), SamplingParams(max_tokens=30, ignore_eos=True))
    [whole] = Engine(*built(kind)).generate([first])
    place = next(i for i in range(9, 30) if whole.tokens[i] not in whole.tokens[:i])
    engine = guessing(Engine(*built(kind), draft="lookup"), known([whole]), 0.0)
    stopped = replace(first, params=SamplingParams(max_tokens=30, stop_ids=(whole.tokens[place],)))
    [cut] = engine.generate([stopped])
    assert cut.tokens == whole.tokens[:place]
    on = Request([*first.prompt, *cut.tokens, 3, 4, 5], SamplingParams(max_tokens=20, drafts=0, ignore_eos=True))
    [expected] = Engine(*built(kind)).generate([replace(on, params=SamplingParams(max_tokens=20, ignore_eos=True))])
    [found] = engine.generate([on])
    assert found.tokens == expected.tokens
    assert found.usage.cached_tokens >= 40
