"""The embedded model guesses ahead: the same answers in fewer steps, through Python and the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

import zoo
from zoo.registry.errors import RequestError

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
    with pytest.raises(RequestError, match=r"draft: nothing guesses tokens by this name; found 'lookpu'"):
        zoo.load("tiny", draft="lookpu")
    done = zoo_command("run", "tiny", "--prompt", "x", "--drafts", "3")
    assert done.code == 2
    assert "draft='lookup'" in done.err
