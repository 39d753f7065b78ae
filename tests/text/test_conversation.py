"""Faulty conversations: each has a message of its own that names the place."""

from __future__ import annotations

from typing import Any

import pytest

from zoo.registry.errors import TextError
from zoo.text.conversation import check_messages, joined

U: dict[str, Any] = {"role": "user", "content": "u"}
A: dict[str, Any] = {"role": "assistant", "content": "a"}
S: dict[str, Any] = {"role": "system", "content": "s"}
CALL: dict[str, Any] = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLS: dict[str, Any] = {"role": "assistant", "tool_calls": [CALL]}
T: dict[str, Any] = {"role": "tool", "content": "t", "tool_call_id": "c1"}


def calls(**changes: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{**CALL, **changes}]}


FAULTS = {
    "empty list": ([], "the conversation is empty; expected at least one user message."),
    "a text": ("hello", "a conversation is a list of messages; found str."),
    "one message": (U, "a conversation is a list of messages; found dict."),
    "not a dict": ([U, "x"], "message 2: not a message; found str"),
    "no role": (
        [{"content": "x"}],
        "message 1: unknown role; found None; expected one of system, user, assistant, tool.",
    ),
    "misspelt role": ([{"role": "assistent", "content": "x"}], "message 1: unknown role; found 'assistent'"),
    "misspelt field": ([{**U, "contents": "x"}], "message 1 (user): unknown field 'contents'"),
    "null content": ([{"role": "user", "content": None}], "message 1 (user): the content is missing or null"),
    "no content": ([{"role": "user"}], "message 1 (user): the content is missing or null"),
    "empty content": ([{"role": "user", "content": ""}], "message 1 (user): the content is empty"),
    "no parts": ([{"role": "user", "content": []}], "message 1 (user): the content is empty"),
    "empty system": ([{"role": "system", "content": ""}, U], "message 1 (system): the content is empty"),
    "empty answer": ([U, {"role": "assistant", "content": ""}, U], "message 2 (assistant): the content is empty"),
    "null answer": (
        [U, {"role": "assistant", "content": None}, U],
        'message 2 (assistant): the content is missing or null; expected a text. An assistant message needs "content"',
    ),
    "content a number": ([{"role": "user", "content": 3}], "message 1 (user): the content is not a text; found int"),
    "image part": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        "message 1 (user): part 1 is an image, which this tokenizer cannot take",
    ),
    "audio part": (
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_audio"}]}],
        "message 1 (user): part 2 is a sound",
    ),
    "unknown part": (
        [{"role": "user", "content": [{"type": "txt", "text": "x"}]}],
        "message 1 (user): part 1 is of no known type; found type 'txt'",
    ),
    "part a text": ([{"role": "user", "content": ["x"]}], "message 1 (user): part 1 is of no known type; found str"),
    "part without text": (
        [{"role": "user", "content": [{"type": "text"}]}],
        "message 1 (user): part 1 has no text in 'text'; found None.",
    ),
    "assistant first": ([A, U], "message 1 (assistant): a conversation cannot start with a message of role assistant"),
    "tool first": ([T], "message 1 (tool): a conversation cannot start with a message of role tool"),
    "two users": (
        [U, U],
        "message 2 (user): role user cannot follow a message of role user; expected assistant. "
        "Pass merge=True to join consecutive messages of one role.",
    ),
    "two assistants": ([U, A, A, U], "message 3 (assistant): role assistant cannot follow a message of role assistant"),
    "system in the middle": ([U, A, S, U], "message 3 (system): a system message stands only at the beginning"),
    "system last": ([U, S], "message 2 (system): a system message stands only at the beginning"),
    "system twice": ([S, S, U], "message 2 (system): a system message stands only at the beginning"),
    "system alone": ([S], "message 1 (system): there is only a system message"),
    "assistant after system": (
        [S, A, U],
        "message 2 (assistant): role assistant cannot follow a message of role system",
    ),
    "tool after user": ([U, T], "message 2 (tool): a tool message answers a tool call, but there is none before"),
    "tool after an answer": ([U, A, T], "message 3 (tool): a tool message answers a tool call"),
    "user after a call": ([U, CALLS, U], "message 3 (user): role user cannot follow a tool call; expected tool."),
    "assistant last": (
        [U, A],
        "message 2 (assistant): the conversation ends with an assistant message; expected user or tool",
    ),
    "call last": ([U, CALLS], "message 2 (assistant): the conversation ends with a tool call. Add the tool's result."),
    "another id": (
        [U, CALLS, {**T, "tool_call_id": "c2"}],
        "message 3 (tool): tool_call_id names no open call; found 'c2'; expected 'c1'.",
    ),
    "two results": ([U, CALLS, T, T], "message 4 (tool): more tool results than tool calls; found tool_call_id 'c1'."),
    "a result too few": (
        [U, {**CALLS, "tool_calls": [CALL, {**CALL, "id": "c2"}]}, T, A, U],
        "message 4 (assistant): a tool call before this message has no result; found call c2.",
    ),
    "a result too few at the end": (
        [U, {**CALLS, "tool_calls": [CALL, {**CALL, "id": "c2"}]}, T],
        "message 3 (tool): a tool call has no result; found call c2.",
    ),
    "repeated id": ([U, {**CALLS, "tool_calls": [CALL, CALL]}, T], "message 2 (assistant): two calls have the same id"),
    "empty id": ([U, calls(id=""), T], "message 2 (assistant), call 1: the id of a tool call is a text; found ''."),
    "calls a dict": (
        [U, {**CALLS, "tool_calls": CALL}],
        "message 2 (assistant): tool_calls is not a list; found dict.",
    ),
    "no function": ([U, calls(function=None), T], "message 2 (assistant), call 1: not in OpenAI's form"),
    "no function name": ([U, calls(function={}), T], "message 2 (assistant), call 1: the function has no name"),
    "single quotes": (
        [U, calls(function={"name": "f", "arguments": "{'a': 1}"}), T],
        "message 2 (assistant), call 1: the arguments are not JSON; found {'a': 1}.",
    ),
    "a call cut short": (
        [U, calls(function={"name": "f", "arguments": '{"a": '}), T],
        "message 2 (assistant), call 1: the arguments are not JSON",
    ),
    "arguments a number": (
        [U, calls(function={"name": "f", "arguments": "3"}), T],
        "message 2 (assistant), call 1: the arguments are no JSON object; found 3.",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault(name: str) -> None:
    messages, said = FAULTS[name]
    with pytest.raises(TextError) as caught:
        check_messages(messages)  # type: ignore[arg-type]
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([U], "message 1 (user): continue_final continues an assistant message, but the last is none."),
        ([U, CALLS, T], "message 3 (tool): continue_final continues an assistant message"),
        ([U, CALLS], "message 2 (assistant): continue_final needs a last message of text, without tool calls."),
    ],
)
def test_nothing_to_continue(messages: list[Any], said: str) -> None:
    with pytest.raises(TextError) as caught:
        check_messages(messages, continue_final=True)
    assert str(caught.value).startswith(said)


def test_checked_copies_leave_the_caller_alone() -> None:
    given = [dict(U), {**CALLS, "content": None}, T]
    checked = check_messages(given)
    assert checked[1] == {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {}}}]}
    assert given[1]["tool_calls"][0]["function"]["arguments"] == "{}"
    assert checked[0] is not given[0]


@pytest.mark.parametrize("messages", [[U, CALLS, T, U], [U, CALLS, T, A, U], [S, U, A, U, A, U]])
def test_usual_orders_pass(messages: list[Any]) -> None:
    assert [m["role"] for m in check_messages(messages)] == [m["role"] for m in messages]


def test_merging_joins_each_role() -> None:
    part = {"type": "text", "text": "p"}
    messages = [S, S, U, {"role": "user", "content": [part]}, A, A, {**CALLS}, T, U]
    merged = joined(check_messages(messages, merge=True))
    assert [m["role"] for m in merged] == ["system", "user", "assistant", "tool", "user"]
    assert merged[0]["content"] == "s\n\ns"
    assert merged[1]["content"] == [{"type": "text", "text": "u"}, part]
    assert (merged[2]["content"], len(merged[2]["tool_calls"])) == ("a\n\na", 1)


@pytest.mark.parametrize("messages", [[A, A, U], [U, T, T], [U, S, U], [U, CALLS, A, U]])
def test_merging_mends_nothing_else(messages: list[Any]) -> None:
    with pytest.raises(TextError):
        check_messages(messages, merge=True)
