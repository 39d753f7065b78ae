"""The loop, followed with a model that checks its own history."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.engine.request import Chunk, Completion, Request
from zoo.registry.errors import CapacityError, RequestError, ZooError

Make = Callable[..., Any]
PROMPTS = [[1, 2, 3], [4], [5] * 30, [7, 8, 9, 10, 11], [12] * 17]


def alone(make_engine: Make, request: Request) -> Completion:
    found: Completion = make_engine().generate([request])[0]
    return found


# --- results ------------------------------------------------------------------------------------------------------


def test_a_prompt_gives_the_same_tokens_alone_and_in_any_batch(make_engine: Make, ask: Make) -> None:
    requests = [ask(p, max_tokens=9, temperature=i % 2, seed=i) for i, p in enumerate(PROMPTS)]
    expected = [alone(make_engine, r).tokens for r in requests]
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    for batch in (1, 2, 5):
        found = make_engine(max_batch_size=batch).generate(requests)
        assert [c.tokens for c in found] == expected


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 16, 64])
def test_chunks_of_any_size_change_nothing(make_engine: Make, ask: Make, chunk: int) -> None:
    requests = [ask(p, max_tokens=6, temperature=0.9, seed=i, logprobs=2) for i, p in enumerate(PROMPTS)]
    expected = make_engine().generate(requests)
    found = make_engine(chunk_tokens=chunk).generate(requests)
    assert [(c.tokens, c.logprobs) for c in found] == [(c.tokens, c.logprobs) for c in expected]


def test_a_cache_too_small_for_all_preempts_and_changes_nothing(make_engine: Make, ask: Make) -> None:
    requests = [ask(p, max_tokens=40, temperature=0.9, seed=i, prompt_logprobs=True) for i, p in enumerate(PROMPTS)]
    expected = make_engine().generate(requests)
    engine = make_engine(memory_bytes=96, chunk_tokens=16)
    found = engine.generate(requests)
    assert engine._scheduler.preemptions > 2
    assert engine.memory["cache_peak"] <= 96
    assert [(c.tokens, c.prompt_logprobs) for c in found] == [(c.tokens, c.prompt_logprobs) for c in expected]


def test_usage_seed_and_timings(make_engine: Make, ask: Make) -> None:
    done = alone(make_engine, ask([1, 2, 3], max_tokens=5, temperature=1.0))
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.cached_tokens) == (3, 5, 0)
    assert done.prompt_ids == [1, 2, 3]
    assert done.finish_reason == "length"
    timings = done.timings
    assert min(timings.queue_s, timings.prefill_s, timings.decode_s) > 0
    assert timings.tokens_per_second == pytest.approx(4 / timings.decode_s)
    again = alone(make_engine, ask([1, 2, 3], max_tokens=5, temperature=1.0, seed=done.seed))
    assert again.tokens == done.tokens


def test_without_a_seed_every_request_has_its_own(make_engine: Make, ask: Make) -> None:
    found = make_engine().generate([ask([1], max_tokens=20, temperature=5.0) for _ in range(5)])
    assert len({c.seed for c in found}) == len({tuple(c.tokens) for c in found}) == 5


def test_a_continued_text_continues_its_random_numbers(make_engine: Make, ask: Make) -> None:
    whole = alone(make_engine, ask([1, 2], max_tokens=10, temperature=1.0, seed=3)).tokens
    rest = alone(make_engine, ask([1, 2, *whole[:4]], max_tokens=6, temperature=1.0, seed=3)).tokens
    assert rest == whole[4:]


# --- ends ---------------------------------------------------------------------------------------------------------


def test_prompt_and_answer_together_fill_the_context_and_no_more(make_engine: Make, ask: Make) -> None:
    engine = make_engine(context=20)
    lengths = {n: len(engine.generate([ask([1] * n)])[0].tokens) for n in (1, 18, 19, 20)}
    assert lengths == {1: 19, 18: 2, 19: 1, 20: 0}
    assert engine.generate([ask([1] * 20)])[0].finish_reason == "length"
    for length in (21, 200):
        with pytest.raises(
            RequestError,
            match=rf"prompt: the prompt is longer than the context; found {length} tokens; expected at most 20",
        ):
            engine.submit(ask([1] * length))


def test_no_tokens_may_be_asked_for(make_engine: Make, ask: Make, fake_decoder: Make) -> None:
    decoder = fake_decoder()
    done = make_engine(decoder).generate([ask([1, 2], max_tokens=0)])[0]
    assert (done.tokens, done.finish_reason, decoder.steps) == ([], "length", [])


def test_a_stop_id_ends_the_answer_and_is_not_in_it(make_engine: Make, ask: Make, fake_decoder: Make) -> None:
    done = make_engine(fake_decoder({1: [5, 6, 7, 8]})).generate([ask([1], max_tokens=9, stop_ids=[7], logprobs=0)])[0]
    assert (done.tokens, done.finish_reason, done.usage.completion_tokens) == ([5, 6], "stop", 2)
    assert len(done.logprobs) == len(done.top_logprobs) == 2


def test_the_tokenizers_stop_ids_count_unless_ignored(
    make_engine: Make, ask: Make, fake_decoder: Make, fake_tokenizer: Make
) -> None:
    engine = make_engine(fake_decoder({1: [5, 0, 7, 8, 9]}))
    tokenizer = fake_tokenizer({5: b"five", 7: b"seven"})
    plain, both, ignored = engine.generate(
        [
            ask([1], tokenizer=tokenizer, max_tokens=4),
            ask([1], tokenizer=tokenizer, max_tokens=4, stop_ids=[5]),
            ask([1], tokenizer=tokenizer, max_tokens=4, stop_ids=[8], ignore_eos=True),
        ]
    )
    assert (plain.text, plain.tokens, plain.finish_reason) == ("five", [5], "stop")
    assert (both.text, both.tokens, both.finish_reason) == ("", [], "stop")
    assert (ignored.text, ignored.tokens, ignored.finish_reason) == ("fiveseven", [5, 0, 7], "stop")


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        ("cd", "ab", [2, 3]),
        ("c", "ab", [2, 3]),
        ("bcde", "a", [2, 3, 4]),
        ("ab", "", [2]),
        ("f", "abcde", [2, 3, 4]),
        ("zz", "abcdef", [2, 3, 4]),
        ("fz", "abcdef", [2, 3, 4]),
    ],
)
def test_stop_texts_across_token_edges(
    make_engine: Make,
    ask: Make,
    fake_decoder: Make,
    fake_tokenizer: Make,
    joined: Make,
    stop: str,
    text: str,
    tokens: list[int],
) -> None:
    engine = make_engine(fake_decoder({1: [2, 3, 4, 0]}))
    tokenizer = fake_tokenizer({2: b"ab", 3: b"cd", 4: b"ef"})
    request = ask([1], tokenizer=tokenizer, max_tokens=9, stop=stop)
    done = engine.generate([request])[0]
    assert (done.text, done.tokens, done.finish_reason) == (text, tokens, "stop")
    chunks = list(engine.stream(request))
    joined(chunks, done)


def test_a_stop_text_met_at_the_last_token_is_a_stop(
    make_engine: Make, ask: Make, fake_decoder: Make, fake_tokenizer: Make
) -> None:
    engine = make_engine(fake_decoder({1: [2, 3]}))
    tokenizer = fake_tokenizer({2: b"ab", 3: b"\xc3"})
    by_token = engine.generate([ask([1], tokenizer=tokenizer, max_tokens=1, stop="b")])[0]
    assert (by_token.text, by_token.finish_reason) == ("a", "stop")
    # The unfinished character becomes text only when the answer ends.
    by_rest = engine.generate([ask([1], tokenizer=tokenizer, max_tokens=2, stop="\ufffd")])[0]
    assert (by_rest.text, by_rest.finish_reason) == ("ab", "stop")


def test_characters_are_never_cut(
    make_engine: Make, ask: Make, fake_decoder: Make, fake_tokenizer: Make, joined: Make
) -> None:
    engine = make_engine(fake_decoder({1: [2, 3, 4, 5, 6]}))
    pieces = {2: b"a\xf0", 3: b"\x9f", 4: b"\x90", 5: b"\x98b", 6: b"\xe2\x82"}
    request = ask([1], tokenizer=fake_tokenizer(pieces), max_tokens=5)
    chunks = list(engine.stream(request))
    assert [c.text for c in chunks] == ["a", "", "", "🐘b", "\ufffd\ufffd"]
    assert [c.tokens for c in chunks] == [[2], [3], [4], [5], [6]]
    joined(chunks, engine.generate([request])[0])


# --- log-probabilities --------------------------------------------------------------------------------------------


def test_only_the_rows_that_are_needed_get_logits(make_engine: Make, ask: Make, fake_decoder: Make) -> None:
    decoder = fake_decoder()
    make_engine(decoder, chunk_tokens=8).generate([ask([1] * 20, max_tokens=3)])
    assert decoder.steps == [[8], [8], [4], [1], [1]]
    assert decoder.logit_rows == [0, 0, 1, 1, 1]
    decoder = fake_decoder()
    make_engine(decoder, chunk_tokens=8).generate([ask([1] * 20, max_tokens=2, prompt_logprobs=True)])
    assert decoder.logit_rows == [8, 8, 4, 1]


@pytest.mark.parametrize("chunk", [3, 64])
def test_a_prompt_may_be_scored_without_an_answer(make_engine: Make, ask: Make, fake_decoder: Make, chunk: int) -> None:
    prompt, decoder = [5, 3, 8, 2, 1], fake_decoder()
    engine = make_engine(decoder, chunk_tokens=chunk, context=5)
    done = engine.generate([ask(prompt, max_tokens=0, prompt_logprobs=True)])[0]
    assert (done.tokens, done.finish_reason, sum(decoder.logit_rows)) == ([], "length", 4)
    rows = torch.stack([decoder._row(prompt[: i + 1]) for i in range(4)]).log_softmax(-1)
    assert done.prompt_logprobs[0] is None
    assert done.prompt_logprobs[1:] == pytest.approx([rows[i, prompt[i + 1]].item() for i in range(4)], abs=1e-6)
    assert engine.generate([ask([5], max_tokens=0, prompt_logprobs=True)])[0].prompt_logprobs == [None]


def test_logprobs_are_the_raw_models_whatever_the_sampling(make_engine: Make, ask: Make, fake_decoder: Make) -> None:
    decoder = fake_decoder()
    requests = [
        ask([1, 2], max_tokens=5, logprobs=3),
        ask([3], max_tokens=5),
        ask([4], max_tokens=5, logprobs=0, temperature=2.0, top_k=4, seed=1),
        ask([5, 6], max_tokens=5, logprobs=61, temperature=1.0, min_p=0.1, seed=2),
    ]
    found = make_engine(decoder).generate(requests)
    assert found[1].logprobs is found[1].top_logprobs is None
    for request, done, count in ((requests[0], found[0], 3), (requests[2], found[2], 0), (requests[3], found[3], 61)):
        for i, token in enumerate(done.tokens):
            row = decoder._row([*request.prompt, *done.tokens[:i]]).log_softmax(-1)
            assert done.logprobs[i] == pytest.approx(row[token].item(), abs=1e-6)
            top = done.top_logprobs[i]
            assert list(top) == row.argsort(descending=True, stable=True)[:count].tolist()
            assert list(top.values()) == pytest.approx(row[list(top)].tolist(), abs=1e-6)


def test_streamed_logprobs_equal_the_whole(make_engine: Make, ask: Make, joined: Make) -> None:
    engine = make_engine()
    request = ask([1, 2], max_tokens=6, logprobs=2, stop_ids=[3], temperature=1.5, seed=4)
    chunks = list(engine.stream(request))
    joined(chunks, engine.generate([request])[0])
    assert chunks[-1].completion.tokens == [t for c in chunks for t in c.tokens]


# --- refusals -----------------------------------------------------------------------------------------------------


def test_ids_outside_the_vocabulary_are_refused(make_engine: Make, ask: Make) -> None:
    engine = make_engine()
    for prompt, found in (([1, 61], r"prompt\[1\].* found 61"), ([-1], r"prompt\[0\].* found -1")):
        with pytest.raises(RequestError, match=found + "; expected 0 to 60"):
            engine.submit(ask(prompt))
        with pytest.raises(RequestError, match=found):
            engine.logits(prompt)
    with pytest.raises(RequestError, match=r"stop_ids\[0\].* found 61"):
        engine.submit(ask([1], stop_ids=[61]))
    with pytest.raises(RequestError, match="logprobs: out of range; found 62; expected at most 61"):
        engine.submit(ask([1], logprobs=62))


def test_what_could_never_fit_is_refused_with_need_and_have(make_engine: Make, ask: Make) -> None:
    engine = make_engine(memory_bytes=50)
    with pytest.raises(CapacityError, match=r"found 50 bytes, room for 48 tokens; expected 64 bytes for 50 tokens"):
        engine.submit(ask([1] * 41, max_tokens=10))
    with pytest.raises(CapacityError, match="expected 64 bytes for 49 tokens"):
        engine.submit(ask([1] * 49))
    with pytest.raises(CapacityError, match="for 99 tokens"):
        engine.submit(ask([1], max_tokens=1000))
    assert len(engine.generate([ask([1] * 40, max_tokens=9)])[0].tokens) == 9
    # An open end takes what memory allows.
    assert len(engine.generate([ask([1] * 40)])[0].tokens) == 9


def test_one_refused_request_of_many_ends_all(make_engine: Make, ask: Make) -> None:
    engine = make_engine()
    with pytest.raises(RequestError):
        engine.generate([ask([1]), ask([2] * 101)])
    assert not engine.busy
    assert engine.step() == []


def test_two_unfinished_requests_may_not_share_an_id(make_engine: Make, ask: Make) -> None:
    engine = make_engine()
    assert engine.submit(ask([1], max_tokens=2, request_id="mine")) == "mine"
    with pytest.raises(RequestError, match="request_id: a request of this id is unfinished; found 'mine'"):
        engine.submit(ask([1], request_id="mine"))
    engine.run()
    assert engine.generate([ask([1], max_tokens=2, request_id="mine")])[0].request_id == "mine"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size: out of range; found 0; expected a whole number, at least 1"),
        ({"chunk_tokens": 0}, "chunk_tokens: out of range; found 0; expected a whole number, at least 1"),
        ({"max_context": 0}, "max_context: out of range; found 0; expected a whole number, at least 1"),
        ({"max_context": 101}, "found 101; expected at most 100, the model's context_length"),
    ],
)
def test_engine_sizes_out_of_range_are_refused(make_engine: Make, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make_engine(**sizes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_end_their_request_only(
    make_engine: Make, ask: Make, fake_decoder: Make, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    decoder = fake_decoder()
    plain = decoder._row

    def row(history: list[int]) -> Tensor:
        logits_V: Tensor = plain(history)
        if history[0] == 9 and len(history) >= 4:
            logits_V[17] = bad
        return logits_V

    monkeypatch.setattr(decoder, "_row", row)
    engine = make_engine(decoder)
    good = engine.stream(ask([1, 2], max_tokens=8))
    wrong = engine.stream(ask([9, 1], max_tokens=8, temperature=1.0, request_id="wrong"))
    message = "wrong, position 3: the model computed logits that are not finite"
    with pytest.raises(ZooError, match=message):
        list(wrong)
    assert len(list(good)) == 8
    with pytest.raises(ZooError, match="position 3"):
        engine.generate([ask([1], max_tokens=8), ask([9, 1, 1, 1, 1, 1], max_tokens=8, prompt_logprobs=True)])
    assert len(engine.generate([ask([1], max_tokens=8)])[0].tokens) == 8
    engine.submit(ask([9, 1, 2, 3], max_tokens=2))
    engine.submit(ask([1], max_tokens=2))
    with pytest.raises(ZooError, match="position 3"):
        engine.run()


# --- streams ------------------------------------------------------------------------------------------------------


def test_open_streams_may_be_read_in_turn(make_engine: Make, ask: Make, joined: Make, fake_decoder: Make) -> None:
    decoder = fake_decoder()
    engine = make_engine(decoder)
    requests = [ask([i + 1], max_tokens=5 + i) for i in range(3)]
    expected = [alone(make_engine, r) for r in requests]
    streams = [engine.stream(r) for r in requests]
    chunks: list[list[Chunk]] = [[next(streams[0])], [], []]
    chunks[2] += [next(streams[2]), next(streams[2])]
    chunks[1] += list(streams[1])
    chunks[0] += list(streams[0])
    chunks[2] += list(streams[2])
    for found, done in zip(chunks, expected, strict=True):
        joined(found, done)
    assert len(decoder.steps) == 7, "streams share steps"
    assert engine.step() == []


def test_submitted_requests_and_streams_do_not_take_each_others_chunks(make_engine: Make, ask: Make) -> None:
    engine = make_engine()
    name = engine.submit(ask([1], max_tokens=3))
    stream = engine.stream(ask([2], max_tokens=5))
    assert len(list(stream)) == 5
    chunks = engine.step()
    assert [c.request_id for c in chunks] == [name] * 3
    assert chunks[-1].completion.tokens == [t for c in chunks for t in c.tokens]


def test_run_returns_what_was_submitted(make_engine: Make, ask: Make) -> None:
    engine = make_engine()
    names = [engine.submit(ask([i + 1], max_tokens=4 - i)) for i in range(3)]
    assert [c.request_id for c in engine.run()] == names[::-1]
    assert engine.run() == []


@pytest.mark.parametrize("how", ["close", "drop", "with"])
def test_a_stream_closed_early_is_cancelled_and_frees_its_memory(make_engine: Make, ask: Make, how: str) -> None:
    engine = make_engine()
    other = engine.stream(ask([2], max_tokens=4))
    stream = engine.stream(ask([1]))
    next(stream)
    used = engine.memory["cache_used"]
    if how == "close":
        stream.close()
        assert list(stream) == []
    elif how == "with":
        with stream:
            next(stream)
    del stream
    gc.collect()
    assert engine.memory["cache_used"] == used / 2
    assert len(list(other)) == 4
    assert not engine._mail


def test_a_stream_that_was_never_read_leaves_nothing(make_engine: Make, ask: Make) -> None:
    engine = make_engine()
    engine.stream(ask([1]))
    gc.collect()
    assert not engine.busy
    assert engine.step() == []


def test_cancel_ends_a_request_wherever_it_stands(
    make_engine: Make, ask: Make, fake_tokenizer: Make, fake_decoder: Make
) -> None:
    engine = make_engine(fake_decoder({1: [2] * 90, 3: [4] * 90}), max_batch_size=1)
    running = engine.submit(ask([1], tokenizer=fake_tokenizer({2: b"ab"}), stop="abab!", max_tokens=50))
    waiting = engine.submit(ask([3], max_tokens=50))
    engine.step()
    assert engine.cancel(waiting)
    assert engine.cancel(running)
    assert not engine.cancel(running)
    assert not engine.cancel("unknown")
    ends = {c.request_id: c for c in engine.step() if c.last}
    assert ends[waiting].completion.tokens == []
    done = ends[running].completion
    # What was held back, because a stop text might have begun, is shown.
    assert (done.text, done.tokens, done.finish_reason) == ("ab", [2], "cancelled")
    assert ends[running].text == "ab"


def test_cancelling_inside_a_step_waits_for_its_end(make_engine: Make, ask: Make, fake_decoder: Make) -> None:
    decoder = fake_decoder()
    engine = make_engine(decoder)
    name = engine.submit(ask([1]))
    decoder.fault = lambda step: engine.cancel(name)
    assert [c.finish_reason for c in engine.step()] == [None, "cancelled"]
    assert not engine.busy
    assert engine.step() == []


@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_step_leaks_nothing_and_others_go_on(
    make_engine: Make, ask: Make, fake_decoder: Make, joined: Make, fault: type[BaseException]
) -> None:
    expected = alone(make_engine, ask([1, 2], max_tokens=8))
    decoder = fake_decoder()
    engine = make_engine(decoder)
    other = engine.stream(ask([1, 2], max_tokens=8))
    chunks = [next(other), next(other)]

    def interrupt(step: object) -> None:
        decoder.fault = None
        raise fault

    decoder.fault = interrupt
    with pytest.raises(fault):
        engine.generate([ask([3], max_tokens=8), ask([4], max_tokens=8)])
    assert len(engine._live) == 1
    chunks += list(other)
    joined(chunks, expected)
    decoder.fault = interrupt
    stream = engine.stream(ask([5]))
    with pytest.raises(fault):
        next(stream)
    assert not engine.busy


def test_threads_share_one_engine(make_engine: Make, ask: Make, joined: Make) -> None:
    engine = make_engine(max_batch_size=3)
    requests = [ask([i + 1], max_tokens=12, temperature=1.0, seed=i) for i in range(6)]
    expected = [alone(make_engine, r) for r in requests]
    found: dict[int, list[Chunk]] = {}

    def read(i: int) -> None:
        found[i] = list(engine.stream(requests[i]))

    threads = [threading.Thread(target=read, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    for i, done in enumerate(expected):
        joined(found[i], done)


def test_a_closed_engine_ends_its_streams_and_refuses_more(make_engine: Make, ask: Make) -> None:
    engine = make_engine()
    with engine:
        stream = engine.stream(ask([1]))
        next(stream)
    assert [c.finish_reason for c in stream] == ["cancelled"]
    assert engine.memory["weights"] == engine.memory["cache_used"] == 0
    for call in (lambda: engine.submit(ask([1])), lambda: engine.logits([1]), engine.step):
        with pytest.raises(ZooError, match="the model was closed"):
            call()
    engine.close()


def test_memory_is_reported(make_engine: Make, ask: Make) -> None:
    engine = make_engine(layers=2, max_batch_size=3)
    assert engine.memory == {
        "weights": 40,
        "cache_used": 0,
        "cache_kept": 0,
        "cache_peak": 0,
        "cache_budget": 3 * 2 * 112,
    }
    stream = engine.stream(ask([1] * 17))
    next(stream)
    assert engine.memory["cache_used"] == engine._memory.used == 2 * 32
    stream.close()
    assert (engine.memory["cache_used"], engine.memory["cache_peak"]) == (0, 64)
