"""model.chat with tools: definitions in, calls out, results back in, with a model whose tokens are written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from mistral_common.protocol.instruct.request import ChatCompletionRequest

import zoo
from zoo.engine import outcome
from zoo.engine.request import Chunk
from zoo.model import Model
from zoo.text.tokenizer import Tokenizer

Open = Callable[[str], Tokenizer]
Say = Callable[..., Any]

VERSIONS = ("v2", "v3", "v3-tekken", "v7", "v7-tekken", "v11", "v13", "v15")
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "get_w", "description": "Wetter", "parameters": SCHEMA}}
QUESTION = {"role": "user", "content": "Wetter?"}
ARGUMENTS = {"city": "Zürich", "days": 3, "deep": {"quote": 'a"b'}}


@pytest.fixture
def say(mistral: Open, mistral_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Say:
    """say(version, features) -> a model of random weights, and a list: the ids that it will sample."""

    @contextmanager
    def make(version: str, features: tuple[str, ...] = ("chat", "tools", "thinking")) -> Iterator[Any]:
        mixer = {"kind": "attention", "num_heads": 1, "num_kv_heads": 1, "head_dim": 8, "rope": {"theta": 1e4}}
        model = {"dim": 8, "vocab_size": mistral(version).vocab_size, "norm": {"kind": "rms", "eps": 1e-5}}
        model["layers"] = [{"mixer": mixer, "ffn": {"kind": "gated", "hidden_dim": 8}}]
        card = {
            "name": "says",
            "context_length": 1024,
            "source": {"path": str(mistral_folder(version))},
            "text": {"tokenizer": "mistral", "chat": "mistral", "features": [*features]},
            "model": model,
        }
        said: list[int] = []
        monkeypatch.setattr(outcome, "choose", lambda *_: torch.tensor([said.pop(0)]))
        with zoo.load(card, weights="random", device="cpu", dtype="float32") as loaded:
            yield loaded, said

    return make


def named(tokenizer: Tokenizer, *parts: str) -> list[int]:
    """Ids of texts; the name of a control token is its id."""
    ids = {tokenizer.vocabulary.control(i): i for i in range(40)}
    return [i for part in parts for i in ([ids[part]] if part in ids else tokenizer.encode(part, bos=False))]


def written(version: str) -> list[str]:
    """A call as a model of the version writes it."""
    arguments = json.dumps(ARGUMENTS, ensure_ascii=False)
    if version in ("v13", "v15"):
        return ["[TOOL_CALLS]", "get_w", "[ARGS]", arguments, "</s>"]
    if version == "v11":
        return ["[TOOL_CALLS]", "get_w", "[CALL_ID]", "abcDEF123", "[ARGS]", arguments, "</s>"]
    name = "" if version == "v2" else ', "id": "abcDEF123"'
    return ["[TOOL_CALLS]", f'[{{"name": "get_w", "arguments": {arguments}{name}}}]', "</s>"]


@pytest.mark.parametrize("version", VERSIONS)
def test_definitions_call_result(version: str, say: Say, mistral_common: Callable[[str], Any]) -> None:
    def expected(messages: list[Any]) -> Any:
        request: Any = ChatCompletionRequest.from_openai(messages, [TOOL])
        return mistral_common(version).encode_chat_completion(request).tokens

    with say(version) as (model, said):
        said += named(model.tokenizer, *written(version))
        asked = model.chat([QUESTION], [TOOL])
        assert asked.prompt_ids == expected([QUESTION])
        assert (asked.text, asked.finish_reason, asked.call_error) == ("", "stop", None)
        (call,) = asked.tool_calls
        assert (call.name, call.arguments) == ("get_w", ARGUMENTS)
        if version in ("v3", "v3-tekken", "v7", "v7-tekken", "v11"):
            assert call.id == "abcDEF123"

        result = {"role": "tool", "content": "22", "tool_call_id": call.id, "name": "get_w"}
        messages = [QUESTION, asked.message, result]
        said += named(model.tokenizer, "It is 22.", "</s>")
        answer = model.chat(messages, [TOOL])
        assert answer.prompt_ids == expected(messages)
        assert answer.prompt_ids[: len(asked.prompt_ids)] == asked.prompt_ids
        assert (answer.text, answer.tool_calls) == ("It is 22.", [])
        assert answer.message == {"role": "assistant", "content": "It is 22."}


@pytest.mark.parametrize("version", ["v3", "v11", "v13"])
def test_streamed_answer_equals_whole(version: str, say: Say) -> None:
    with say(version) as (model, said):
        ids = named(model.tokenizer, *written(version))
        said += ids * 2
        whole = model.chat([QUESTION], [TOOL])
        chunks: list[Chunk] = [*model.stream_chat([QUESTION], [TOOL])]
        last = chunks[-1].completion
        assert last is not None
        assert [call for chunk in chunks for call in chunk.tool_calls] == last.tool_calls == whole.tool_calls
        assert "".join(chunk.text for chunk in chunks) == last.text == whole.text == ""
        plain = json.loads(json.dumps([chunk.to_dict() for chunk in chunks]))
        assert [call for chunk in plain for call in chunk["tool_calls"]] == [whole.tool_calls[0].to_dict()]
        assert json.loads(json.dumps(last.to_dict()))["tool_calls"][0]["function"]["name"] == "get_w"


@pytest.mark.parametrize("version", ["v3", "v11", "v13"])
def test_a_call_cut_by_the_length_limit(version: str, say: Say) -> None:
    with say(version) as (model, said):
        said += named(model.tokenizer, *written(version))[:-3]
        chunks: list[Chunk] = [*model.stream_chat([QUESTION], [TOOL], max_tokens=len(said))]
        cut = chunks[-1].completion
        assert cut is not None
        assert (cut.finish_reason, cut.tool_calls) == ("length", [])
        assert cut.text.startswith("[TOOL_CALLS]")
        assert "Zürich" in cut.text
        assert "".join(chunk.text for chunk in chunks) == cut.text
        assert cut.call_error is not None
        assert cut.call_error == chunks[-1].call_error == cut.to_dict()["call_error"]


def test_the_same_call_of_two_turns_has_two_ids(say: Say) -> None:
    with say("v13") as (model, said):
        said += named(model.tokenizer, *written("v13")) * 2
        first = model.chat([QUESTION], [TOOL])
        result = {"role": "tool", "content": "?", "tool_call_id": first.tool_calls[0].id}
        second = model.chat([QUESTION, first.message, result], [TOOL])
        assert first.tool_calls[0].id != second.tool_calls[0].id


THOUGHTS = {
    "control tokens": ("v13", ["[THINK]", "Hm. END?", "[/THINK]", "Yes. END No."], "Hm. END?"),
    "tags": ("v11", ["<think>\nHm. END?\n</think>\n\nYes. END No."], "Hm. END?"),
}


@pytest.mark.parametrize("name", THOUGHTS)
def test_thinking_is_apart_from_the_answer(name: str, say: Say) -> None:
    """A stop text ends the answer, not the thinking."""
    version, parts, thinking = THOUGHTS[name]
    with say(version) as (model, said):
        ids = named(model.tokenizer, *parts, "</s>")
        said += ids
        chunks: list[Chunk] = [*model.stream([QUESTION], stop=["END"])]
        whole = chunks[-1].completion
        assert whole is not None
        assert (whole.text, whole.thinking, whole.finish_reason) == ("Yes. ", thinking, "stop")
        assert "".join(chunk.thinking for chunk in chunks) == thinking
        assert "".join(chunk.text for chunk in chunks) == "Yes. "
        assert whole.message["reasoning_content"] == thinking


def test_tags_are_text_without_the_feature(say: Say) -> None:
    with say("v11", ("chat",)) as (model, said):
        said += named(model.tokenizer, "<think>a</think>b", "</s>")
        whole = model.chat([QUESTION])
        assert (whole.text, whole.thinking) == ("<think>a</think>b", "")


def test_raw_text_is_not_taken_apart(say: Say) -> None:
    with say("v13") as (model, said):
        said += named(model.tokenizer, "[THINK]", "a", "[/THINK]", "b", "</s>")
        whole = model.generate("Hello", raw=True)[0]
        assert (whole.text, whole.thinking, whole.tool_calls) == ("ab", "", [])


def test_effort_reaches_the_prompt(say: Say) -> None:
    def settings(model: Model, effort: str) -> str:
        prompt = model.chat_request([QUESTION], chat_options={"reasoning_effort": effort}).prompt
        assert model.tokenizer is not None
        return model.tokenizer.decode(prompt, special=True)

    with say("v15") as (model, _):
        assert '{"reasoning_effort": "high"}' in settings(model, "high")
        assert '{"reasoning_effort": "none"}' in settings(model, "none")
