"""Prompts, options and stops as users have them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch

import zoo
from zoo.costs.memory import PROCESS_BYTES
from zoo.registry.errors import CapacityError, CardError, RequestError, TextError, ZooError

if TYPE_CHECKING:
    from tests.bad_inputs.conftest import Desk
    from zoo.model import Model

Open = Callable[[str], "Model"]
Ask = Callable[["Model"], Any]

CONTEXT, WINDOW = 512, 8
IDS = [1, 1072, 1299]
HELLO = [{"role": "user", "content": "Hello"}]


def ask(prompt: Any = (IDS,), **options: Any) -> Ask:
    return lambda model: model.generate(prompt, **{"max_tokens": 2, **options})


NO_PROMPT = "expected a text, a list of token ids or of messages, or a list of these"
TOO_LONG = "tokens; expected at most 512, prompt and answer together. Shorten the prompt"
OPTIONS = "expected one of max_tokens, temperature, top_p, top_k, min_p, seed, stop, stop_ids"

FAULTS: dict[str, tuple[Ask, type[ZooError], str]] = {
    # Prompts
    "no token ids": (
        ask([[]]),
        RequestError,
        "prompt: the prompt is empty; found no tokens; expected at least one token",
    ),
    "an empty message": (ask(""), TextError, "message 1 (user): the content is empty"),
    "one token too many": (ask([[1] * 513]), RequestError, f"longer than the context; found 513 {TOO_LONG}"),
    "ten times too many": (ask([[1] * 5120]), RequestError, f"longer than the context; found 5120 {TOO_LONG}"),
    "a text that is too long": (
        ask("no " * 600, raw=True),
        RequestError,
        f"longer than the context; found 1202 {TOO_LONG}",
    ),
    "one long prompt among short ones": (
        ask([[1], [1] * 513, [2]]),
        RequestError,
        f"prompts[1], prompt: the prompt is longer than the context; found 513 {TOO_LONG}",
    ),
    "an empty message among others": (
        ask(["Hello", ""]),
        TextError,
        "prompts[1], message 1 (user): the content is empty",
    ),
    "a token that the model has not": (
        ask([[1, 1400]]),
        RequestError,
        "prompt[1]: a token id is not in the vocabulary; found 1400; expected 0 to 1399",
    ),
    "a negative token": (ask([[-1]]), RequestError, "prompt[0]: a token id is not in the vocabulary; found -1"),
    "text among token ids": (
        ask([[1, "a"]]),
        RequestError,
        "prompt[1]: the prompt is not a sequence of token ids; found 'a'; expected whole numbers",
    ),
    "a fraction among token ids": (
        ask([[1, 2.5]]),
        RequestError,
        "prompt[1]: the prompt is not a sequence of token ids; found 2.5",
    ),
    "None": (ask(None), RequestError, f"prompts: not a prompt; found NoneType; {NO_PROMPT}"),
    "a number": (ask(5), RequestError, f"prompts: not a prompt; found int; {NO_PROMPT}"),
    "bytes": (ask(b"Hello"), RequestError, f"prompts: not a prompt; found bytes; {NO_PROMPT}"),
    "a message without its list": (
        ask({"role": "user", "content": "x"}),
        RequestError,
        f"prompts: not a prompt; found dict; {NO_PROMPT}",
    ),
    "a tensor": (
        ask(torch.tensor([1, 2])),
        RequestError,
        "prompts: not a prompt; found Tensor; " + NO_PROMPT + ". `.tolist()` makes a list of it",
    ),
    "a picture": (
        ask(images=["a.png"]),
        RequestError,
        "this model does not read images; found 1 image(s); expected text or token ids",
    ),
    "nothing to embed": (lambda model: model.embed([]), RequestError, "texts: not texts; found []"),
    "nothing to compute": (lambda model: model.logits([]), RequestError, "prompt: the prompt is empty"),
    # Sampling
    "a negative temperature": (
        ask(temperature=-1),
        RequestError,
        "temperature: out of range; found -1; expected a finite number, 0 or more",
    ),
    "a temperature that is no number": (
        ask(temperature=float("nan")),
        RequestError,
        "temperature: out of range; found nan",
    ),
    "an endless temperature": (ask(temperature=float("inf")), RequestError, "temperature: out of range; found inf"),
    "a temperature as text": (ask(temperature="0.7"), RequestError, "temperature: out of range; found '0.7'"),
    "top-p of zero": (
        ask(top_p=0),
        RequestError,
        "top_p: out of range; found 0; expected a number above 0, at most 1",
    ),
    "top-p above one": (ask(top_p=1.5), RequestError, "top_p: out of range; found 1.5"),
    "top-k below zero": (
        ask(top_k=-1),
        RequestError,
        "top_k: out of range; found -1; expected a whole number, 0 (off) or more",
    ),
    "min-p above one": (ask(min_p=2), RequestError, "min_p: out of range; found 2; expected a number from 0 to 1"),
    "tokens below zero": (
        ask(max_tokens=-1),
        RequestError,
        "max_tokens: out of range; found -1; expected a whole number, 0 or more",
    ),
    "half a token": (ask(max_tokens=2.5), RequestError, "max_tokens: out of range; found 2.5"),
    "a seed as text": (
        ask(seed="7"),
        RequestError,
        "seed: out of range; found '7'; expected a whole number of 64 bits",
    ),
    "a seed of too many bits": (ask(seed=2**70), RequestError, "seed: out of range; found 1180591620717411303424"),
    "a seed in the wrong place": (ask(options={"seed": 1}), RequestError, f"options: unknown option; {OPTIONS}"),
    "an option misspelt": (ask(temprature=1), RequestError, "temprature: unknown option; " + OPTIONS),
    "an option of another library": (ask(max_new_tokens=3), RequestError, "max_new_tokens: unknown option;"),
    "an option of an interface": (ask(top_logprobs=3), RequestError, "top_logprobs: unknown option;"),
    # Log-probabilities
    "log-probabilities below zero": (
        ask(logprobs=-1),
        RequestError,
        "logprobs: out of range; found -1; expected a whole number",
    ),
    "log-probabilities yes": (
        ask(logprobs=True),
        RequestError,
        "logprobs: out of range; found True; expected a whole number",
    ),
    "more alternatives than tokens": (
        ask(logprobs=1401),
        RequestError,
        "logprobs: out of range; found 1401; expected at most 1400, the size of the voc",
    ),
    # Stops
    "an empty stop text": (
        ask(stop=""),
        RequestError,
        "stop: out of range; found ''; expected texts, none of them empty",
    ),
    "an empty stop text among others": (ask(stop=["a", ""]), RequestError, "stop: out of range; found ['a', '']"),
    "a stop text that is a number": (ask(stop=[3]), RequestError, "stop: out of range; found [3]; expected texts"),
    "a stop id that the model has not": (
        ask(stop_ids=[1400]),
        RequestError,
        "stop_ids[0]: a token id is not in the vocabulary; found 1400",
    ),
    "a stop id without a list": (
        ask(stop_ids=2),
        RequestError,
        "stop_ids: out of range; found 2; expected token ids",
    ),
    # Switches
    "raw, in words": (ask("Hello", raw="no"), RequestError, "raw: out of range; found 'no'; expected True or False"),
    "merge, in words": (
        lambda model: model.chat(HELLO, merge=cast(Any, "no")),
        RequestError,
        "merge: out of range; found 'no'; expected True or False",
    ),
    "continue_final as a number": (
        lambda model: model.chat(HELLO, continue_final=cast(Any, 1)),
        RequestError,
        "continue_final: out of range; found 1; expected True or False",
    ),
    "settings of the chat format as a text": (
        lambda model: model.chat(HELLO, chat_options=cast(Any, "high")),
        TextError,
        "chat_options: not settings; found 'high'; expected a dict such as",
    ),
    # Texts
    "no text to encode": (lambda model: model.encode(cast(Any, None)), TextError, "not a text; found None"),
    "no texts to embed": (lambda model: model.embed(cast(Any, None)), RequestError, "texts: not texts; found None"),
    "token ids to embed": (lambda model: model.embed(cast(Any, [1, 2])), TextError, "texts[0]: not a text; found 1"),
    # Filling in
    "filling in, untrained": (
        lambda model: model.fill("a", "b"),
        RequestError,
        "not trained to fill in the middle; found features chat; expected the feature fim",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_refused(name: str, opened: Open, desk: Desk) -> None:
    call, error, said = FAULTS[name]
    model = opened("v7-tekken")
    desk.refused(error, [said], lambda: call(model))
    assert len(model.generate([IDS], max_tokens=2, ignore_eos=True)[0].tokens) == 2, "the model still works"


NEAR = {
    "temprature": "'temperature'",
    "max_new_tokens": "'max_tokens'",
    "top_logprobs": "'logprobs' or 'prompt_logprobs'",
}


@pytest.mark.parametrize("option", NEAR)
def test_the_nearest_option_is_named(option: str, opened: Open, desk: Desk) -> None:
    desk.refused(RequestError, [f"Did you mean {NEAR[option]}?"], lambda: ask(**{option: 1})(opened("v7-tekken")))


# --- limits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "made"), [(1, 511), (511, 1), (512, 0)])
def test_a_prompt_up_to_the_limit(opened: Open, length: int, made: int) -> None:
    """Prompt and answer together fill the context to the last token, and the answer says why it ends."""
    [answer] = opened("").generate([[7] * length])
    assert (len(answer.tokens), answer.finish_reason) == (made, "length")
    assert answer.usage.prompt_tokens == length


def test_a_shorter_limit_of_the_users_own(desk: Desk) -> None:
    with desk.load(max_context=20) as model:
        said = "longer than the context; found 21 tokens; expected at most 20, prompt and answer together"
        desk.refused(RequestError, [said], lambda: model.generate([[7] * 21]))
        assert len(model.generate([[7] * 15])[0].tokens) == 5


@pytest.mark.parametrize("length", [0, -1, 513, "8", True])
def test_a_limit_that_is_none(desk: Desk, length: Any) -> None:
    said = f"context is out of range; found {length!r}; expected 1 to 512, the card's context_length"
    desk.refused(RequestError, [f"max_{said}"], lambda: desk.load(max_context=length))
    told = zoo.inspect(desk.folder)
    asked: list[Callable[..., Any]] = [told.memory, told.fits, told.memory_plan, told.to_dict]
    for ask_for in asked:
        desk.refused(RequestError, [f": {said}"], partial(ask_for, length))


@pytest.mark.parametrize("tokens", [-1, 2.5, None])
def test_a_cache_for_no_number_of_tokens(desk: Desk, tokens: Any) -> None:
    said = f"tokens: out of range; found {tokens!r}; expected a whole number, 0 or more"
    desk.refused(RequestError, [said], lambda: zoo.inspect(desk.folder).cache_bytes(tokens))


@pytest.mark.parametrize("size", [0, -3, True])
def test_a_batch_of_none(desk: Desk, size: int) -> None:
    said = f"max_batch_size: out of range; found {size}; expected a whole number, at least 1"
    desk.refused(RequestError, [said], lambda: desk.load(max_batch_size=size))


def test_a_prompt_that_memory_cannot_hold(desk: Desk) -> None:
    """A cache for fewer tokens than the context refuses what would never fit, with the sizes."""
    desk.patch.setattr("zoo.device.free_memory", lambda: 6_000_000)
    desk.patch.setattr("zoo.fitting.resident_memory", lambda: PROCESS_BYTES)
    with desk.load(overrides={"context_length": 32768}) as model:
        budget = model.memory.cache_budget
        words = [
            f"does not fit in the cache's memory; found {budget} bytes, room for",
            "bytes for 20000 tokens",
            "Lower max_tokens",
        ]
        desk.refused(CapacityError, words, lambda: model.generate([[7] * 20000]))
        assert len(model.generate([[7] * 100], max_tokens=3, ignore_eos=True)[0].tokens) == 3


# --- windows and batches ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def windowed(checkpoint: Callable[[str], Path]) -> Any:
    """The checkpoint with a window of eight tokens."""
    changed = {"model.layers.0.mixer.window": WINDOW}
    with zoo.load(checkpoint(""), device="cpu", dtype="float32", overrides=changed) as model:
        yield model


@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW])
def test_prompts_about_the_window(windowed: Model, length: int) -> None:
    """Token by token equals a full prefill: greedy tokens are those of `logits`, alone and among strangers."""
    prompt = [(7 * place + 3) % 509 for place in range(length)]
    [alone] = windowed.generate([prompt], max_tokens=12, ignore_eos=True)
    wanted = [*prompt]
    for _ in range(12):
        wanted.append(int(windowed.logits(wanted)[-1].argmax()))
    assert alone.tokens == wanted[length:]
    together = windowed.generate([[9], prompt, [5] * 40], max_tokens=12, ignore_eos=True)
    assert together[1].tokens == alone.tokens


def test_the_window_is_no_ornament(windowed: Model, opened: Open) -> None:
    prompt = [*range(3, 20)]
    assert not torch.allclose(windowed.logits(prompt)[-1], opened("").logits(prompt)[-1], atol=1e-3)


def test_lengths_of_one_and_four_hundred_together(opened: Open) -> None:
    prompts = [[5], [(11 * place) % 509 for place in range(400)], [6]]
    together = opened("").generate(prompts, max_tokens=6, ignore_eos=True)
    alone = [opened("").generate([prompt], max_tokens=6, ignore_eos=True)[0] for prompt in prompts]
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]


def test_more_prompts_than_run_together(desk: Desk, opened: Open) -> None:
    prompts = [[place, 5, 9] for place in range(7)]
    with desk.load(max_batch_size=2) as model:
        few = model.generate(prompts, max_tokens=4, ignore_eos=True)
    many = opened("").generate(prompts, max_tokens=4, ignore_eos=True)
    assert [answer.tokens for answer in few] == [answer.tokens for answer in many]


def test_the_same_prompt_twice(opened: Open) -> None:
    first, second, other = opened("").generate(
        [IDS[:1], IDS[:1], [9]], max_tokens=8, temperature=1, seed=3, ignore_eos=True
    )
    assert first.tokens == second.tokens != other.tokens


def test_no_prompts(opened: Open) -> None:
    assert opened("").generate([]) == []


def test_padding_that_is_the_end_token(desk: Desk, opened: Open) -> None:
    """Batches are not padded, so a file that names one id for both changes nothing."""
    desk.become("v7-tekken")
    desk.put("generation_config.json", {"eos_token_id": 2, "pad_token_id": 2})
    prompts = [IDS, [1, 2, 2, 1072, 2], [1] * 30]
    with desk.load() as model:
        found = model.generate(prompts, max_tokens=5)
    alone = [opened("v7-tekken").generate([prompt], max_tokens=5)[0] for prompt in prompts]
    assert [answer.tokens for answer in found] == [answer.tokens for answer in alone]


# --- sampling -----------------------------------------------------------------------------------------------------


def tokens(model: Model, **options: Any) -> list[int]:
    return model.generate([IDS], max_tokens=8, ignore_eos=True, **options)[0].tokens


GREEDY: dict[str, dict[str, Any]] = {
    "temperature 0": {"temperature": 0},
    "temperature 0 and a seed": {"temperature": 0, "seed": 5},
    "no temperature": {"temperature": None},
    "one candidate": {"temperature": 5.0, "top_k": 1},
    "the smallest share": {"temperature": 1.0, "top_p": 1e-9},
    "no candidate less likely": {"temperature": 1.0, "min_p": 1.0},
}


@pytest.mark.parametrize("name", GREEDY)
def test_the_likeliest_tokens(name: str, opened: Open) -> None:
    assert tokens(opened("v7-tekken"), **GREEDY[name]) == tokens(opened("v7-tekken"))


SAME: dict[str, dict[str, Any]] = {
    "top-p of one": {"top_p": 1.0},
    "top-k of zero": {"top_k": 0},
    "min-p of zero": {"min_p": 0.0},
}


@pytest.mark.parametrize("name", SAME)
def test_a_filter_that_lets_all_pass(name: str, opened: Open) -> None:
    plain = tokens(opened("v7-tekken"), temperature=1.0, seed=11)
    assert tokens(opened("v7-tekken"), temperature=1.0, seed=11, **SAME[name]) == plain


def test_more_candidates_than_tokens(opened: Open) -> None:
    drawn = [tokens(opened("v7-tekken"), temperature=1.0, seed=11, top_k=count) for count in (1400, 10**6)]
    assert drawn[0] == drawn[1]


def test_a_huge_temperature(opened: Open) -> None:
    """All tokens are equally likely: no overflow, no fixed token, and the seed decides."""
    model = opened("v7-tekken")
    drawn = [tokens(model, temperature=1e30, seed=seed) for seed in range(6)]
    assert len({token for each in drawn for token in each}) > 40
    assert drawn[0] == tokens(model, temperature=1e30, seed=0)


def test_a_negative_seed(opened: Open) -> None:
    model = opened("v7-tekken")
    assert tokens(model, temperature=1.0, seed=-5) == tokens(model, temperature=1.0, seed=-5)


def test_no_seed_is_a_new_one_each_time_and_told(opened: Open) -> None:
    model = opened("v7-tekken")
    first, second = (model.generate([IDS], max_tokens=8, temperature=1.0, ignore_eos=True)[0] for _ in range(2))
    assert first.seed != second.seed
    assert tokens(model, temperature=1.0, seed=first.seed) == first.tokens


def test_no_tokens_wanted(opened: Open) -> None:
    [answer] = opened("v7-tekken").generate([IDS], max_tokens=0)
    assert (answer.tokens, answer.text, answer.finish_reason) == ([], "", "length")


# --- log-probabilities --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "temperature"), [(0, 0.0), (3, 0.0), (0, 1.0), (3, 1.0)])
def test_logprobs_with_and_without_alternatives(opened: Open, count: int, temperature: float) -> None:
    model = opened("v7-tekken")
    [answer] = model.generate([IDS], max_tokens=4, logprobs=count, temperature=temperature, seed=1, ignore_eos=True)
    wanted = torch.log_softmax(model.logits([*IDS, *answer.tokens]), -1)[len(IDS) - 1 : -1]
    assert answer.logprobs == pytest.approx(
        [row[t].item() for row, t in zip(wanted, answer.tokens, strict=True)], abs=1e-3
    )
    assert answer.top_logprobs is not None
    assert [[*top] for top in answer.top_logprobs] == wanted.topk(count).indices.tolist()


def test_logprobs_only_when_asked(opened: Open) -> None:
    [answer] = opened("v7-tekken").generate([IDS], max_tokens=2)
    assert (answer.logprobs, answer.top_logprobs, answer.prompt_logprobs) == (None, None, None)


# --- stops --------------------------------------------------------------------------------------------------------

SAID = "Hello, my big fr🦒."

STOPS: dict[str, tuple[Any, str, str]] = {
    "over token edges": ("lo, my b", "Hel", "stop"),
    "inside one token": ("e", "H", "stop"),
    "the beginning of the text": ("Hello", "", "stop"),
    "never met": ("big dog", SAID, "stop"),
    "never met, and nearly at the end": ("🦒.!", SAID, "stop"),
    "not in the vocabulary": ("🦒", "Hello, my big fr", "stop"),
    "several": (["fr", "big", "zzz"], "Hello, my ", "stop"),
    "one in another": (["o, my", "my"], "Hell", "stop"),
}


@pytest.mark.parametrize("name", STOPS)
def test_stop_texts(name: str, desk: Desk, parrot: Callable[[str], Path]) -> None:
    stop, text, reason = STOPS[name]
    with desk.load(parrot(SAID)) as model:
        [answer] = model.generate([[1]], stop=stop)
        assert (answer.text, answer.finish_reason) == (text, reason)
        assert "".join(chunk.text for chunk in model.stream([1], stop=stop)) == text


def test_a_stop_text_cut_by_the_limit(desk: Desk, parrot: Callable[[str], Path]) -> None:
    """What might have become a stop text is shown when nothing more comes."""
    with desk.load(parrot(SAID)) as model:
        chunks = [*model.stream([1], stop="llo!", max_tokens=3)]
        assert "".join(chunk.text for chunk in chunks) == "Hello"[: len(chunks[-1].completion.text)]  # type: ignore[union-attr]
        assert chunks[-1].finish_reason == "length"


def test_a_stop_text_without_a_tokenizer(opened: Open, desk: Desk) -> None:
    said = "stop: stop texts need a tokenizer; found ['a']; expected stop_ids"
    desk.refused(RequestError, [said], lambda: opened("").generate([[1]], stop="a"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("generation_config.json", {"eos_token_id": "{id}"}),
        ("generation_config.json", {"eos_token_id": [2, "{id}"]}),
        ("config.json", {"eos_token_id": "{id}"}),
    ],
)
def test_an_end_token_that_one_file_names(desk: Desk, parrot: Callable[[str], Path], name: str, content: Any) -> None:
    """The tokenizer's own end and those of the configuration all stop."""
    made = parrot(SAID)
    desk.become("v7-tekken")
    for file in made.iterdir():
        desk.put(file.name, file.read_bytes())
    with desk.load() as model:
        assert model.tokenizer is not None
        comma = model.tokenizer.encode(SAID, bos=False)[3]
        assert model.generate([[1]])[0].text == SAID
    desk.put(name, json.loads(json.dumps(content).replace('"{id}"', str(comma))))
    with desk.load() as model:
        [answer] = model.generate([[1]])
        assert SAID.startswith(answer.text)
        assert (len(answer.tokens), answer.finish_reason) == (3, "stop")
        assert len(model.generate([[1]], ignore_eos=True, max_tokens=6)[0].tokens) == 6


def test_an_end_token_that_is_none(desk: Desk) -> None:
    desk.become("v7-tekken")
    desk.put("generation_config.json", {"eos_token_id": "</s>"})
    with desk.load() as model:
        said = "generation_config.json: eos_token_id is no token id; found '</s>'; expected an id or a list"
        desk.refused(TextError, [said], lambda: model.generate("Hello"))


# --- broken models, other modes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers(desk: Desk, value: float) -> None:
    with desk.load() as model:
        with torch.no_grad():
            dict(model.module.named_parameters())["norm.weight"].fill_(value)
        said = "position 1: the model computed logits that are not finite; found inf or nan. The weights may be damaged"
        desk.refused(ZooError, [said, "try dtype float32"], lambda: model.generate([[1, 2]]))


FILLS = {"both": ("def f(", "return"), "no prefix": ("", "return"), "no suffix": ("def f(", ""), "neither": ("", "")}


@pytest.mark.parametrize("name", FILLS)
def test_filling_in(name: str, desk: Desk) -> None:
    """Suffix first, then prefix, each after its mark, the beginning only once."""
    prefix, suffix = FILLS[name]
    desk.become("v3")
    with desk.load(overrides={"text.features": ["fim"]}) as model:
        assert model.tokenizer is not None
        ids = model.fill(prefix, suffix, max_tokens=0).prompt_ids
        shown = model.tokenizer.decode(ids, special=True)
        space = " " if prefix else ""  # SentencePiece puts one before a text
        assert shown == f"<s>[SUFFIX]{suffix}[PREFIX]{space}{prefix}"


def test_filling_in_with_a_version_that_cannot(desk: Desk) -> None:
    desk.become("v1")
    with desk.load(overrides={"text.features": ["fim"]}) as model:
        said = "Mistral's tokenizer v1 has no fill-in-the-middle; expected v3 or newer"
        desk.refused(TextError, [said], lambda: model.fill("a", "b"))


def test_after_the_end(desk: Desk) -> None:
    model = desk.load()
    model.close()
    model.close()
    for call in (lambda: model.generate([[1]]), lambda: model.logits([1])):
        desk.refused(ZooError, ["the model was closed. Load it again"], call)


def test_a_stream_that_is_left(opened: Open) -> None:
    """Closing an answer's iterator ends the request and gives its memory back."""
    model = opened("")
    stream = model.stream([1], ignore_eos=True)
    for _ in range(3):
        next(stream)
    assert model.memory.cache_used > 0
    stream.close()  # type: ignore[attr-defined]
    assert (model.memory.cache_used, model.engine.busy) == (0, False)


OVERRIDES: dict[str, tuple[dict[str, Any], str]] = {
    "a field misspelt": (
        {"model.dims": 3},
        "override: model.dims: unknown key 'dims'; expected one of kind, vocab_size",
    ),
    "a layer that is not there": (
        {"model.layers.9.mixer.window": 8},
        "override: model.layers has no item 9; expected an index from 0 to 0",
    ),
    "a wrong value": ({"model.layers.0.mixer.window": "wide"}, "found the text 'wide'; expected an integer"),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_an_override_that_means_nothing(name: str, desk: Desk) -> None:
    overrides, said = OVERRIDES[name]
    desk.refused(CardError, [said], lambda: desk.load(overrides=overrides))
