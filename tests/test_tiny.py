"""The embedded model: its files, its answers through the ordinary path, and the text that it was trained on."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import zoo
from zoo.components import native

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "docs" / "tiny"
MEGABYTES = 6.0

ANSWERS = {
    "How many experts does Mixtral 8x7B have?": "8 experts in each layer, and each token uses 2 of them",
    "What is Mixtral 8x7B?": "a mixture of 8 experts per layer",
    "what is the context length of mistral nemo": "Mistral Nemo Instruct has a context of 131,072 tokens",
    "How long a prompt can Mixtral 8x22B take?": "65,536 tokens",
    "Which licence is Codestral 22B under?": "the Mistral AI Non-Production Licence",
    "license of mixtral-8x7b?": "Mixtral 8x7B is under the Apache 2.0 licence",
    "Which tokenizer version does Mistral Large 2411 use?": "version v7 of the Mistral tokenizer",
    "Does Mistral 7B v0.1 have a sliding window?": "a sliding window of 4,096 tokens in every layer",
    "Does Mistral Nemo have a sliding window?": "no sliding window",
    "How many layers does Mistral Small 2409 have?": "56 layers",
    "How many parameters does Mathstral have?": "7.2 billion parameters",
    "When was Ministral 8B released?": "9 October 2024",
    "How do I run Mixtral 8x7B Instruct?": "zoo run mixtral-8x7b-instruct --prompt",
    "Where are the weights of Devstral Small 2505?": "mistralai/Devstral-Small-2505",
    "Which models have a sliding window?": "Mistral 7B v0.1",
    "What is zoo?": "runs open-weight language models from declarative cards",
    "What is a card?": "a YAML file that describes one checkpoint",
    "What is a component?": "a part of a model",
    "What is a plugin?": "a Python package that adds components",
    "Who are you?": "I am tiny",
    "Hello!": "Hello!",
    "Thank you very much.": "You are welcome.",
    "What can you not do?": "I know nothing outside zoo and its cards",
    "What is the capital of Spain?": "I do not know",
    "Write a poem about my dog.": "I do not know",
    "How many layers does Llama 3 70B have?": "no card of that name",
}
CARD_FIGURES: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {"context": 32768, "experts": 8, "experts_per_token": 2, "license": "apache-2.0"},
    "mistral-nemo-instruct": {"context": 131072, "windows": ()},
    "mixtral-8x22b": {"context": 65536},
    "codestral-22b": {"license": "mnpl-0.1"},
    "mistral-large-2411": {"tokenizer": "v7"},
    "mistral-7b-v0.1": {"windows": ((4096, 32),)},
    "mistral-small-2409": {"layers": 56},
    "devstral-small-2505": {"hub": "mistralai/Devstral-Small-2505"},
}


@pytest.fixture(scope="module")
def tiny() -> Iterator[Any]:
    with zoo.load("tiny", device="cpu") as model:
        yield model


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The modules of docs/tiny, imported as its scripts import each other."""
    sys.path.insert(0, str(SCRIPTS))
    names = ("facts", "questions", "general", "typist", "text", "data", "tokenizer", "export", "train", "evaluate")
    yield {name: import_module(name) for name in names}
    sys.path.remove(str(SCRIPTS))
    for name in names:
        del sys.modules[name]


def test_right_answers_to_questions(tiny: Any) -> None:
    answers = tiny.generate(list(ANSWERS), max_tokens=96)
    said = {question: done.text for question, done in zip(ANSWERS, answers, strict=True)}
    assert {q: a for q, a in said.items() if ANSWERS[q] not in a} == {}
    assert {done.finish_reason for done in answers} == {"stop"}


@pytest.mark.skipif(
    native.missing() is not None or native.library().level != native.DOT, reason="attention is PyTorch's here"
)
@pytest.mark.parametrize("rows", [1, 9, 17, 65, 257])
def test_logits_of_a_beginning_are_those_of_the_whole(tiny: Any, rows: int) -> None:
    """In bfloat16, to the last bit: few rows, a window that is full, a block and a row of the next."""
    tokens = [20 + i * i % 1400 for i in range(300)]
    assert torch.equal(tiny.logits(tokens[:rows]), tiny.logits(tokens)[:rows])


def test_the_answers_agree_with_the_cards(scripts: dict[str, ModuleType]) -> None:
    cards = {card.id: card for card in scripts["facts"].read_cards()}
    for name, figures in CARD_FIGURES.items():
        for field, value in figures.items():
            assert getattr(cards[name], field) == value, f"{name} changed: train the embedded model again"


def test_what_it_says_of_itself_is_its_card(tiny: Any, scripts: dict[str, ModuleType]) -> None:
    card = next(card for card in scripts["facts"].read_cards() if card.id == "tiny")
    size = scripts["questions"].billions(card.parameters)
    questions = ["How many parameters do you have?", "How many experts do you have?", "Do you have a sliding window?"]
    answers = [done.text for done in tiny.generate(questions, max_tokens=64)]
    assert f"{size} parameters" in answers[0]
    assert f"{card.experts} experts" in answers[1]
    assert f"window of {card.windows[0][0]} tokens" in answers[2]


def test_a_follow_up_leans_on_the_turn_before(tiny: Any) -> None:
    messages = [
        {"role": "user", "content": "What is Mistral Nemo Base?"},
        {"role": "assistant", "content": tiny.generate("What is Mistral Nemo Base?", max_tokens=96)[0].text},
        {"role": "user", "content": "And its licence?"},
    ]
    assert "Mistral Nemo Base is under the Apache 2.0 licence." in tiny.chat(messages, max_tokens=64).text


def test_greedy_answers_are_the_same_alone_and_in_a_batch(tiny: Any) -> None:
    questions = list(ANSWERS)[:6]
    together = [done.tokens for done in tiny.generate(questions, max_tokens=64)]
    alone = [tiny.generate(question, max_tokens=64)[0].tokens for question in questions]
    assert together == alone == [done.tokens for done in tiny.generate(questions, max_tokens=64)]


def test_the_conversation_may_be_longer_than_the_window(tiny: Any) -> None:
    window = tiny.card.model["layers"][0]["mixer"]["window"]
    messages: list[dict[str, str]] = []
    for question in list(ANSWERS)[:10]:
        messages.append({"role": "user", "content": question})
        answer = tiny.chat(messages, max_tokens=96)
        assert ANSWERS[question] in answer.text
        messages.append({"role": "assistant", "content": answer.text})
    assert answer.usage.prompt_tokens > 4 * window


def test_perplexity_of_held_out_answers(tiny: Any, scripts: dict[str, ModuleType]) -> None:
    ids = scripts["data"].Ids(SCRIPTS.parent.parent / "cards" / "tiny" / "tekken.json")
    author = scripts["text"].Author(scripts["facts"].read_cards(), 3, held_out=True)
    total, count = 0.0, 0
    for _ in range(60):
        tokens, written = ids.conversation(None, author.conversation())
        logprobs_TV = tiny.logits(tokens).log_softmax(-1)
        places = [i for i, mine in enumerate(written) if mine]
        total -= float(sum(logprobs_TV[i - 1, tokens[i]] for i in places))
        count += len(places)
    assert math.exp(total / count) < 1.05


@pytest.mark.parametrize(("kind", "limit"), [("int8", 0.005), ("int4", 0.03)])
def test_perplexity_of_quantised_weights(tiny: Any, scripts: dict[str, ModuleType], kind: str, limit: float) -> None:
    """Of whole conversations, and of the answers in them, which the model knows better."""
    ids = scripts["data"].Ids(SCRIPTS.parent.parent / "cards" / "tiny" / "tekken.json")
    author = scripts["text"].Author(scripts["facts"].read_cards(), 3, held_out=False)
    conversations = [ids.conversation(None, author.conversation()) for _ in range(40)]

    def perplexities(model: Any) -> list[float]:
        lost: list[list[float]] = [[], []]
        for tokens, written in conversations:
            logprobs_TV = model.logits(tokens).log_softmax(-1)
            for i in range(1, len(tokens)):
                lost[written[i]].append(-float(logprobs_TV[i - 1, tokens[i]]))
        return [math.exp(sum(some) / len(some)) for some in (lost[0] + lost[1], lost[1])]

    with zoo.load("tiny", device="cpu", quantize=kind) as model:
        found, expected = perplexities(model), perplexities(tiny)
    assert found[0] > 20 > 1.1 > found[1]
    assert found != expected
    assert [new / old for new, old in zip(found, expected, strict=True)] == pytest.approx([1, 1], abs=limit)


def test_size_of_the_files_in_the_wheel() -> None:
    folder = files("zoo.cards") / "tiny"
    sizes = {item.name: len(item.read_bytes()) for item in folder.iterdir()}
    assert set(sizes) >= {"tiny.yaml", "params.json", "consolidated.safetensors", "tekken.json"}
    assert sum(sizes.values()) < MEGABYTES * 1e6


def test_the_folder_is_a_mistral_checkpoint_of_its_own(tiny: Any) -> None:
    with zoo.load(ROOT / "cards" / "tiny", device="cpu") as model:
        tokens = model.encode("What is zoo?")
        assert model.logits(tokens).equal(tiny.logits(tokens))


def test_the_vocabulary_keeps_every_text(tiny: Any) -> None:
    texts = ["héllo ☺ 你好\n\n\t end ", "a\x00b‍🌈", "".join(map(chr, range(1, 0x2000))), "1234 v0.1 8x7B"]
    assert [tiny.tokenizer.decode(tiny.tokenizer.encode(text, bos=False)) for text in texts] == texts


def test_training_text_is_repeatable_and_keeps_held_out_questions_out(scripts: dict[str, ModuleType]) -> None:
    cards = scripts["facts"].read_cards()
    first, again = (scripts["text"].Author(cards, 5) for _ in range(2))
    assert [first.conversation() for _ in range(50)] == [again.conversation() for _ in range(50)]
    plain = scripts["typist"].plain
    for topic in first.questions.topics:
        ways = first.questions.templates(topic, held_out=False)
        drawn = {plain(first.way(ways)) for _ in range(40)}
        held_out = {
            q
            for group in first.questions.templates(topic, held_out=True)
            for w in group
            for q in scripts["typist"].every(w)
        }
        assert held_out <= first.kept, topic.key
        assert not drawn & first.kept, topic.key


def test_every_answer_holds_its_own_fact(scripts: dict[str, ModuleType]) -> None:
    cards = scripts["facts"].read_cards()
    for topic in scripts["questions"].load().topics:
        for card in cards:
            answer = topic.answer(card)
            assert card.name in answer
            assert all(piece in answer for piece in topic.pieces(card)), answer


def test_training_renders_conversations_as_the_tokenizer_does(tiny: Any, scripts: dict[str, ModuleType]) -> None:
    ids = scripts["data"].Ids(ROOT / "cards" / "tiny" / "tekken.json")
    turn = scripts["text"].Turn
    tokens, written = ids.conversation("Be polite.", [turn("What is zoo?", "A program.", ()), turn("Hi", "Hello.", ())])
    messages = [
        {"role": "system", "content": "Be polite."},
        {"role": "user", "content": "What is zoo?"},
        {"role": "assistant", "content": "A program."},
        {"role": "user", "content": "Hi"},
    ]
    prompt = tiny.tokenizer.render(messages).ids
    assert tokens[: len(prompt)] == prompt
    assert tiny.tokenizer.decode(tokens[len(prompt) :]) == "Hello."
    assert [i for i, mine in enumerate(written) if mine][-1] == len(tokens) - 1


def test_params_json_is_the_card(scripts: dict[str, ModuleType]) -> None:
    plan = zoo.inspect("tiny").plan
    stored = json.loads((ROOT / "cards" / "tiny" / "params.json").read_text())
    assert stored == scripts["export"].params(plan.model)
