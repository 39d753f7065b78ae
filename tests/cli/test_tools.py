"""zoo run with tools and thinking, and zoo fim; the embedded card's shape, with tokens written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo.api import inspect, tokenizer_of
from zoo.engine import outcome
from zoo.text.tokenizer import Tokenizer

RANDOM = ("--weights", "random", "--device", "cpu", "--dtype", "float32")
THINKS = ("--set", 'text.features=["chat","thinking"]')
FILLS = ("--set", 'text.features=["chat","fim"]')
TOOL = {"type": "function", "function": {"name": "get_w", "parameters": {"type": "object", "properties": {}}}}
CALL = '[{"name": "get_w", "arguments": {"days": 3}, "id": "abcdefghi"}]'
CALLS = 9
END = 2

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizer_of(inspect("tiny"))


@pytest.fixture
def say(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """say(9, "text"): the ids and texts that every model samples from now on, then its end."""

    def will(*parts: int | str) -> None:
        ids = [i for part in parts for i in ([part] if isinstance(part, int) else tokenizer.encode(part, bos=False))]
        ids.append(END)
        monkeypatch.setattr(outcome, "choose", lambda *_: torch.tensor([ids.pop(0)]))

    return will


@pytest.fixture
def tools(tmp_path: Path) -> str:
    """A file with one definition."""
    file = tmp_path / "tools.json"
    file.write_text(json.dumps([TOOL]))
    return str(file)


def test_calls_are_printed_as_json(zoo_command: Command, say: Callable[..., None], tools: str) -> None:
    say("Let me see.", CALLS, CALL)
    found = zoo_command("run", "tiny", "--prompt", "Hello", "--tools", tools, *RANDOM)
    text, calls, end = found.out.split("\n")
    assert (text, end) == ("Let me see.", "")
    assert json.loads(calls) == [
        {"id": "abcdefghi", "type": "function", "function": {"name": "get_w", "arguments": '{"days": 3}'}}
    ]
    say(CALLS, CALL)
    alone = zoo_command("run", "tiny", "--prompt", "Hello", "--tools", tools, *RANDOM)
    assert alone.out == calls + "\n"
    say(CALLS, CALL)
    whole = json.loads(zoo_command("run", "tiny", "--prompt", "Hello", "--tools", tools, "--json", *RANDOM).out)
    assert (whole["tool_calls"], whole["text"]) == (json.loads(calls), "")


def test_definitions_are_in_the_prompt(
    zoo_command: Command, say: Callable[..., None], tools: str, tokenizer: Tokenizer
) -> None:
    say("Hi")
    flags = ("--tools", tools, "--system", "Be short.", "--json")
    found = json.loads(zoo_command("run", "tiny", "--prompt", "Hello", *flags, *RANDOM).out)
    prompt = tokenizer.decode(found["prompt_ids"], special=True)
    assert prompt.startswith("<s>[SYSTEM_PROMPT]Be short.[/SYSTEM_PROMPT][AVAILABLE_TOOLS][{")
    assert '"name": "get_w"' in prompt


def test_a_cut_call_is_printed_and_told(zoo_command: Command, say: Callable[..., None], tools: str) -> None:
    say(CALLS, CALL[:30])
    found = zoo_command("run", "tiny", "--prompt", "Hello", "--tools", tools, *RANDOM)
    assert found.out == f"[TOOL_CALLS]{CALL[:30]}\n"
    assert "a tool call could not be read" in found.err


def test_thinking_goes_to_stderr(zoo_command: Command, say: Callable[..., None]) -> None:
    said = "<think>\nHm, well.\n</think>\n\nYes."
    say(said)
    found = zoo_command("run", "tiny", "--prompt", "Hello", *RANDOM, *THINKS)
    assert found.out == "Yes.\n"
    assert "\nHm, well.\n" in found.err
    assert "\x1b" not in found.err
    say(said)
    whole = json.loads(zoo_command("run", "tiny", "--prompt", "Hello", "--json", *RANDOM, *THINKS).out)
    assert (whole["text"], whole["thinking"]) == ("Yes.", "Hm, well.")
    say(said)
    assert zoo_command("run", "tiny", "--prompt", "Hello", *RANDOM).out == said + "\n"


def test_chat_keeps_no_thinking(zoo_command: Command, say: Callable[..., None], tmp_path: Path) -> None:
    say("<think>Hm.</think>Yes.")
    saved = tmp_path / "talk.json"
    zoo_command("chat", "tiny", *RANDOM, *THINKS, stdin=f"Hello\n/save {saved}\n")
    assert json.loads(saved.read_text())["messages"][1] == {"role": "assistant", "content": "Yes."}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", ["these are no tools", "dict", "a JSON list"]),
        ("[", ["the tools cannot be read", "tools.json"]),
        ("[5]", ["tool 1", "not in OpenAI's form"]),
        ('[{"type": "function", "function": {}}]', ["tool 1", "no name"]),
        (None, ["the tools cannot be read", "No such file"]),
    ],
)
def test_faulty_tools(zoo_command: Command, tmp_path: Path, content: str | None, words: list[str]) -> None:
    file = tmp_path / "tools.json"
    if content is not None:
        file.write_text(content)
    found = zoo_command("run", "tiny", "--prompt", "Hello", "--tools", str(file), *RANDOM)
    assert (found.code, found.out) == (2, "")
    assert [word for word in words if word not in found.err] == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--raw", "--tools", "t.json"), ["--tools", "--raw"]),
        (("--raw", "--reasoning-effort", "high"), ["--reasoning-effort", "--raw"]),
        (("--reasoning-effort", "high"), ["reasoning_effort"]),
    ],
)
def test_what_cannot_be_is_refused(zoo_command: Command, flags: tuple[str, ...], words: list[str]) -> None:
    found = zoo_command("run", "tiny", "--prompt", "Hello", *flags, *RANDOM)
    assert (found.code, found.out) == (2, "")
    assert [word for word in words if word not in found.err] == []


# --- fill in the middle ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        (("--prefix", "def f(", "--suffix", "return s"), "<s>[SUFFIX]return s[PREFIX]def f("),
        (("--prefix", "def f("), "<s>[SUFFIX][PREFIX]def f("),
        (("--suffix", " return s"), "<s>[SUFFIX] return s[PREFIX]"),
        (("--prefix", "", "--suffix", ""), "<s>[SUFFIX][PREFIX]"),
    ],
)
def test_fim(
    zoo_command: Command, say: Callable[..., None], tokenizer: Tokenizer, flags: tuple[str, ...], asked: str
) -> None:
    say(" s):\n    ")
    found = zoo_command("fim", "tiny", *flags, *RANDOM, *FILLS)
    assert found.out == " s):\n    \n"
    say(" s):\n    ")
    whole = json.loads(zoo_command("fim", "tiny", *flags, "--json", *RANDOM, *FILLS).out)
    assert whole["text"] == " s):\n    "
    assert tokenizer.decode(whole["prompt_ids"], special=True) == asked


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prefix", "a", *RANDOM), ["not trained to fill in the middle", "the feature fim"]),
        ((*RANDOM, *FILLS), ["nothing around the gap", "--prefix", "--suffix"]),
    ],
)
def test_fim_is_refused(zoo_command: Command, arguments: tuple[str, ...], words: list[str]) -> None:
    found = zoo_command("fim", "tiny", *arguments)
    assert "random weights" not in found.err, "a model was loaded for nothing"
    assert (found.code, found.out) == (2, "")
    assert [word for word in words if word not in found.err] == []
