"""The embedded model guesses ahead: the same answers in fewer steps, through Python and the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

import zoo
from zoo.drafts import check_tokenizers
from zoo.registry.card import Card
from zoo.registry.errors import CardError, RequestError
from zoo.registry.resolve import resolve

pytestmark = pytest.mark.usefixtures("always_guess")

CARD = "A card is a YAML file that describes one checkpoint: its sizes, parts, tokenizer and where its weights are."
PROMPTS = [
    "What is a card?",
    f"{CARD} {CARD} What is a card?",
    "Which licence does Mistral 7B have?",
    "red green blue red green blue red green blue red",
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_are_those_without_drafts(dtype: str) -> None:
    settings: list[dict[str, Any]] = [{}, {"temperature": 0.7, "seed": 5, "top_p": 0.95}]
    with zoo.load("tiny", dtype=dtype) as model:
        expected = [model.generate([p], max_tokens=60, **s)[0] for s in settings for p in PROMPTS]
        raw = model.generate([CARD[:60]], raw=True, max_tokens=120, ignore_eos=True)[0]
    with zoo.load("tiny", dtype=dtype, draft="lookup") as model:
        found = [model.generate([p], max_tokens=60, **s)[0] for s in settings for p in PROMPTS]
        again = model.generate([CARD[:60]], raw=True, max_tokens=120, ignore_eos=True)[0]
        chunks = [*model.stream(CARD[:60], raw=True, max_tokens=120, ignore_eos=True)]
        off = model.generate([PROMPTS[1]], max_tokens=60, drafts=0)[0]
    assert [c.text for c in found] == [c.text for c in expected]
    assert [c.tokens for c in found] == [c.tokens for c in expected]
    assert again.tokens == raw.tokens == [token for chunk in chunks for token in chunk.tokens]
    assert "".join(chunk.text for chunk in chunks) == raw.text
    assert off.tokens == expected[1].tokens
    assert off.usage.drafted_tokens == raw.usage.drafted_tokens == 0
    assert again.usage.accepted_tokens > 20


def test_the_command_line_says_what_was_guessed(zoo_command: Callable[..., Any]) -> None:
    done = zoo_command("run", "tiny", "--prompt", PROMPTS[1], "--draft", "lookup", "--max-tokens", "40", "--json")
    usage = json.loads(done.out)["usage"]
    assert 0 < usage["accepted_tokens"] <= usage["drafted_tokens"]
    plain = zoo_command("run", "tiny", "--prompt", PROMPTS[1], "--draft", "lookup", "--max-tokens", "40")
    assert f"{usage['accepted_tokens']} of {usage['drafted_tokens']} drafts right" in plain.err
    off = zoo_command("run", "tiny", "--prompt", PROMPTS[1], "--draft", "lookup", "--drafts", "0", "--json")
    assert json.loads(off.out)["usage"]["drafted_tokens"] == 0


def test_what_cannot_guess_is_refused(zoo_command: Callable[..., Any]) -> None:
    with pytest.raises(CardError, match="lookpu"):
        zoo.load("tiny", draft="lookpu")
    with zoo.load("tiny") as model, pytest.raises(RequestError, match="drafts: nothing guesses"):
        model.generate("x", drafts=2)


def test_drafts_without_a_source_are_refused_before_anything_is_loaded(
    zoo_command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zoo.api.load", lambda *_, **__: pytest.fail("it was loaded"))
    for command in (("run", "tiny", "--prompt", "x"), ("chat", "tiny"), ("fim", "tiny", "--prefix", "x")):
        for source in ((), ("--draft", "none")):
            done = zoo_command(*command, "--drafts", "3", *source)
            assert done.code == 2
            assert "nothing guesses tokens for this model" in done.err
            assert "--draft lookup" in done.err


@pytest.mark.parametrize("draft", ["lookup", "tiny"])
def test_a_conversation_with_guesses_says_the_same(draft: str, zoo_command: Callable[..., Any]) -> None:
    lines = ["What is a card?", "Say that again.", "/set drafts=2", "/retry", "/set drafts=0", "/undo", "And a layer?"]
    talk = ("chat", "tiny", "--dtype", "float32", "--max-tokens", "40")
    plain = zoo_command(*talk, stdin="\n".join([line for line in lines if "drafts" not in line]))
    found = zoo_command(*talk, "--draft", draft, "--drafts", "5", stdin="\n".join([*lines, "/set drafts=-1"]))
    assert (plain.code, found.code) == (0, 0)
    assert found.out == plain.out
    assert len(found.out) > 200
    assert "drafts right" in found.err
    assert "drafts right" not in plain.err
    assert "drafts: out of range" in found.err
    refused = zoo_command(*talk, stdin="/set drafts=2\nHello\n/set drafts=0\nHello")
    assert refused.err.count("nothing guesses") == 1
    assert refused.out


def test_a_model_that_guesses_must_fit_beside_the_other(
    zoo_command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known before either is read, and what would fit is said."""
    monkeypatch.setattr("zoo.device.free_memory", lambda: 17 << 30)
    monkeypatch.setattr("zoo.loading.fill.filled", lambda *_, **__: pytest.fail("it was read"))
    flags = ("--weights", "random", "--device", "cpu", "--max-context", "512", "--prompt", "x")
    found = zoo_command("run", "mistral-7b-instruct-v0.3", "--draft", "mistral-7b-v0.3", *flags)
    assert found.code == 2
    assert "the model does not fit in memory" in found.err
    assert "the model that guesses 1" in found.err
    assert "no --draft, or --draft lookup" in found.err
    assert "--quantize int8" in found.err


def small(**changes: Any) -> dict[str, Any]:
    mixer = {"kind": "attention", "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "rope": {"theta": 100.0}}
    layers = [{"mixer": mixer, "ffn": {"kind": "gated", "hidden_dim": 20}}]
    model = {"dim": 16, "vocab_size": 61, "norm": {"kind": "rms", "eps": 1e-5}, "layers": layers}
    return {"name": "small", "context_length": 64, "model": model | changes}


def test_a_model_guesses_for_another() -> None:
    asked: dict[str, Any] = {"max_tokens": 30, "ignore_eos": True}
    with zoo.load("tiny", dtype="float32", draft="tiny") as model:
        assert model.memory.weights == 2 * sum(p.nbytes for p in model.module.parameters())
        found = model.generate(PROMPTS, **asked)
        assert any("tiny guesses" in note for note in model.notes)
    with zoo.load("tiny", dtype="float32") as model:
        assert [c.tokens for c in found] == [c.tokens for c in model.generate(PROMPTS, **asked)]
    assert sum(c.usage.accepted_tokens for c in found) > 40
    with zoo.load(small(), weights="random", draft=small(dim=8)) as model:
        done = model.generate([[1, 2, 3]], max_tokens=20, ignore_eos=True)[0]
        assert done.usage.drafted_tokens > 0
        assert any("no tokenizer: ids of small are taken for the same" in note for note in model.notes)


def test_models_of_other_vocabularies_are_refused(zoo_command: Callable[..., Any]) -> None:
    with pytest.raises(RequestError, match=r"draft: small cannot guess for small: .* found 60 token ids; expected 61"):
        zoo.load(small(), weights="random", draft=small(vocab_size=60))
    done = zoo_command("run", "tiny", "--prompt", "x", "--draft", "mixtral-8x7b")
    assert done.code == 2
    assert "mixtral-8x7b cannot guess for tiny: their vocabularies differ" in done.err


def test_ids_must_stand_for_the_same_text() -> None:
    plan = resolve(Card.from_dict(small()))

    def tokenizer(words: str, control: dict[int, str] | None = None) -> Any:
        vocabulary = SimpleNamespace(
            size=len(words),
            control=(control or {}).get,
            surface=lambda token, first: words[token].encode(),
        )
        return SimpleNamespace(vocabulary=vocabulary, piece=lambda token: words[token])

    assert check_tokenizers(plan, tokenizer("abc"), plan, tokenizer("abc")) == ""
    for other, found in (
        (tokenizer("abcd"), "a tokenizer of 4 ids; expected 3"),
        (tokenizer("axc"), "'x' for id 1; expected 'b'"),
        (tokenizer("abc", {2: "</s>"}), "'c' for id 2"),
    ):
        with pytest.raises(RequestError, match=found):
            check_tokenizers(plan, tokenizer("abc"), plan, other)
    assert "no tokenizer" in check_tokenizers(plan, None, plan, tokenizer("abc"))
