"""Conversations in Mistral's format equal what mistral-common makes of the same conversation, for every version."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from mistral_common.protocol.instruct.chunk import TextChunk, ThinkChunk
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import Function, FunctionCall, Tool, ToolCall

from zoo.registry.errors import TextError
from zoo.text.tokenizer import Tokenizer

Open = Callable[[str], Tokenizer]

ALL = ("v1", "v2", "v3", "v3-tekken", "v7", "v7-tekken", "v11", "v13", "v15")
WITH_TOOLS = ALL[1:]
FROM_V3 = ALL[2:]
FROM_V7 = ALL[4:]
THINKING = ("v13", "v15")
EFFORT = ("v15",)

SCHEMA = {"type": "object", "properties": {"c": {"type": "string", "description": "Größe"}}, "required": ["c"]}
DEFINITION = {"type": "function", "function": {"name": "get_w", "description": "Wetter", "parameters": SCHEMA}}
ARGUMENTS = {"c": "Zürich 北京", "n": 3, "deep": {"list": [1, 2.5, None, True], "quote": 'a"b'}}


def call(name: str, arguments: Any, function: str = "get_w") -> dict[str, Any]:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"id": name, "type": "function", "function": {"name": function, "arguments": text}}


def mc_call(name: str, arguments: Any, function: str = "get_w") -> ToolCall:
    return ToolCall(id=name, function=FunctionCall(name=function, arguments=json.dumps(arguments)))


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def tool(content: Any, answers: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": answers, **more}


@dataclass
class Case:
    messages: list[dict[str, Any]]
    expected: list[Any]
    versions: tuple[str, ...] = ALL
    options: dict[str, Any] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)


WEATHER = [
    user("U1"),
    assistant(None, tool_calls=[call("abcdefghi", ARGUMENTS)]),
    tool("22", "abcdefghi", name="get_w"),
]
MC_WEATHER = [
    UserMessage(content="U1"),
    AssistantMessage(tool_calls=[mc_call("abcdefghi", ARGUMENTS)]),
    ToolMessage(content="22", tool_call_id="abcdefghi", name="get_w"),
]
TOOLS: dict[str, Any] = {"tools": [DEFINITION]}
MC_TOOLS: dict[str, Any] = {
    "tools": [Tool(function=Function(name="get_w", description="Wetter", parameters=SCHEMA))],
}
LITERAL = "a [INST] b </s> <s>[IMG][TOOL_CALLS][SYSTEM_PROMPT]<unk> c"

CASES = {
    "one user": Case([user("Hello")], [UserMessage(content="Hello")]),
    "system and user": Case([system("S"), user("U")], [SystemMessage(content="S"), UserMessage(content="U")]),
    "turns": Case(
        [system("S"), user("U1"), assistant("A1"), user("U2")],
        [
            SystemMessage(content="S"),
            UserMessage(content="U1"),
            AssistantMessage(content="A1"),
            UserMessage(content="U2"),
        ],
    ),
    "spaces and lines": Case(
        [user("  two\n\nlines  "), assistant(" answer   "), user("\ttab ")],
        [
            UserMessage(content="  two\n\nlines  "),
            AssistantMessage(content=" answer   "),
            UserMessage(content="\ttab "),
        ],
    ),
    "other scripts": Case(
        [user("你好，한국어 🦒👩‍👩‍👧 naïve Ωμέγα")], [UserMessage(content="你好，한국어 🦒👩‍👩‍👧 naïve Ωμέγα")]
    ),
    "parts": Case(
        [user([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}])],
        [UserMessage(content=[TextChunk(text="one"), TextChunk(text="two")])],
    ),
    "names of control tokens": Case(
        [system(LITERAL), user(LITERAL), assistant(LITERAL), user(LITERAL)],
        [
            SystemMessage(content=LITERAL),
            UserMessage(content=LITERAL),
            AssistantMessage(content=LITERAL),
            UserMessage(content=LITERAL),
        ],
    ),
    "continued answer": Case(
        [user("U1"), assistant("The answer is")],
        [UserMessage(content="U1"), AssistantMessage(content="The answer is", prefix=True)],
        options={"continue_final": True},
    ),
    "merged users": Case(
        [user("a"), user("b"), assistant("c"), assistant("d"), user("e")],
        [
            UserMessage(content="a"),
            UserMessage(content="b"),
            AssistantMessage(content="c"),
            AssistantMessage(content="d"),
            UserMessage(content="e"),
        ],
        options={"merge": True},
    ),
    "merged system": Case(
        [system("a"), system("b"), user("c")],
        [SystemMessage(content="a"), SystemMessage(content="b"), UserMessage(content="c")],
        options={"merge": True},
    ),
    "tools offered": Case([user("U1")], [UserMessage(content="U1")], WITH_TOOLS, TOOLS, MC_TOOLS),
    "tool result": Case(WEATHER, MC_WEATHER, WITH_TOOLS, TOOLS, MC_TOOLS),
    "tool history": Case(
        [system("S"), *WEATHER, assistant("It is 22."), user("Thanks")],
        [
            SystemMessage(content="S"),
            *MC_WEATHER,
            AssistantMessage(content="It is 22."),
            UserMessage(content="Thanks"),
        ],
        WITH_TOOLS,
        TOOLS,
        MC_TOOLS,
    ),
    "user after a tool": Case([*WEATHER, user("U2")], [*MC_WEATHER, UserMessage(content="U2")], WITH_TOOLS),
    "two calls": Case(
        [
            user("U1"),
            assistant("", tool_calls=[call("aaaaaaaa1", {"c": 1}), call("aaaaaaaa2", "", "other-tool_2")]),
            tool('{"t": [1,  2]}', "aaaaaaaa2", name="other-tool_2"),
            tool("plain text", "aaaaaaaa1", name="get_w"),
        ],
        [
            UserMessage(content="U1"),
            AssistantMessage(tool_calls=[mc_call("aaaaaaaa1", {"c": 1}), mc_call("aaaaaaaa2", {}, "other-tool_2")]),
            ToolMessage(content='{"t": [1,  2]}', tool_call_id="aaaaaaaa2", name="other-tool_2"),
            ToolMessage(content="plain text", tool_call_id="aaaaaaaa1", name="get_w"),
        ],
        FROM_V3,
    ),
    "tools among turns": Case(
        [system("S"), user("U0"), assistant("A0"), *WEATHER],
        [SystemMessage(content="S"), UserMessage(content="U0"), AssistantMessage(content="A0"), *MC_WEATHER],
        WITH_TOOLS,
        TOOLS,
        MC_TOOLS,
    ),
    "two rounds of calls": Case(
        [*WEATHER, assistant(None, tool_calls=[call("jklmnopqr", {"c": 2})]), tool("23", "jklmnopqr", name="get_w")],
        [
            *MC_WEATHER,
            AssistantMessage(tool_calls=[mc_call("jklmnopqr", {"c": 2})]),
            ToolMessage(content="23", tool_call_id="jklmnopqr", name="get_w"),
        ],
        WITH_TOOLS,
        TOOLS,
        MC_TOOLS,
    ),
    "result in other scripts": Case(
        [*WEATHER[:2], tool('{"größe": "北京 🦒", "n": [1, null]}', "abcdefghi", name="get_w")],
        [
            *MC_WEATHER[:2],
            ToolMessage(content='{"größe": "北京 🦒", "n": [1, null]}', tool_call_id="abcdefghi", name="get_w"),
        ],
        WITH_TOOLS,
        TOOLS,
        MC_TOOLS,
    ),
    "thinking and a call": Case(
        [user("U1"), assistant(None, reasoning_content="hm", tool_calls=[call("abcdefghi", {})]), WEATHER[2]],
        [
            UserMessage(content="U1"),
            AssistantMessage(content=[ThinkChunk(thinking="hm")], tool_calls=[mc_call("abcdefghi", {})]),
            MC_WEATHER[2],
        ],
        THINKING,
        TOOLS,
        MC_TOOLS,
    ),
    "text beside a call": Case(
        [user("U1"), assistant("Let me see.", tool_calls=[call("abcdefghi", {})]), tool("22", "abcdefghi")],
        [
            UserMessage(content="U1"),
            AssistantMessage(content="Let me see.", tool_calls=[mc_call("abcdefghi", {})]),
            ToolMessage(content="22", tool_call_id="abcdefghi"),
        ],
        FROM_V7,
    ),
    "thinking part": Case(
        [user("U"), assistant([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "A"}]), user("V")],
        [
            UserMessage(content="U"),
            AssistantMessage(content=[ThinkChunk(thinking="hm"), TextChunk(text="A")]),
            UserMessage(content="V"),
        ],
        THINKING,
    ),
    "reasoning field": Case(
        [user("U"), assistant("A", reasoning_content="hm"), user("V")],
        [
            UserMessage(content="U"),
            AssistantMessage(content=[ThinkChunk(thinking="hm"), TextChunk(text="A")]),
            UserMessage(content="V"),
        ],
        THINKING,
    ),
    "effort": Case(
        [user("U")],
        [UserMessage(content="U")],
        EFFORT,
        {"options": {"reasoning_effort": "high"}},
        {"reasoning_effort": "high"},
    ),
}


@pytest.mark.parametrize("version", ALL)
@pytest.mark.parametrize("name", CASES)
def test_equals_mistral_common(name: str, version: str, mistral: Open, mistral_common: Callable[[str], Any]) -> None:
    case = CASES[name]
    if version not in case.versions:
        with pytest.raises(TextError):
            mistral(version).render(case.messages, **case.options)
        return
    request: Any = ChatCompletionRequest(messages=case.expected, **case.request)
    expected = mistral_common(version).encode_chat_completion(request).tokens
    prompt = mistral(version).render(case.messages, **case.options)
    assert prompt.ids == expected
    assert prompt.continues is case.options.get("continue_final", False)


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("v1", [1, 733, 16289, 28793, 22557, 733, 28748, 16289, 28793]),
        ("v2", [1, 3, 23325, 4]),
        ("v3", [1, 3, 23325, 4]),
        ("v7", [1, 3, 23325, 4]),
        ("v3-tekken", [1, 3, 22177, 4]),
        ("v7-tekken", [1, 3, 22177, 4]),
        ("v11", [1, 3, 22177, 4]),
        ("v13", [1, 3, 22177, 4]),
        ("v15", [1, 36, 19227, 80277, 1302, 13196, 1609, 1449, 2811, 1429, 17670, 46005, 37, 3, 22177, 4]),
    ],
)
def test_known_ids(version: str, expected: list[int], mistral: Open) -> None:
    assert mistral(version).render([user("Hello")]).ids == expected


def test_prompt_is_shown_as_text(mistral: Open) -> None:
    messages = [system("S"), user("U1"), assistant("A1"), user("U2")]
    assert (
        mistral("v7").render(messages).text
        == "<s>[SYSTEM_PROMPT] S[/SYSTEM_PROMPT][INST] U1[/INST] A1</s>[INST] U2[/INST]"
    )
    assert mistral("v3-tekken").render(messages).text == "<s>[INST]U1[/INST]A1</s>[INST]S\n\nU2[/INST]"


@pytest.mark.parametrize("version", FROM_V3)
def test_written_control_tokens_stay_text(version: str, mistral: Open) -> None:
    tokenizer = mistral(version)
    written = [tokenizer.vocabulary.control(i) for i in tokenizer.render([user(LITERAL)]).ids]
    plain = [tokenizer.vocabulary.control(i) for i in tokenizer.render([user("x")]).ids]
    assert [name for name in written if name] == [name for name in plain if name]
    assert not [i for i in tokenizer.encode(LITERAL, bos=False) if tokenizer.vocabulary.control(i)]


@pytest.mark.parametrize("version", ["v3", "v7-tekken", "v11"])
def test_long_call_ids_become_nine_characters(version: str, mistral: Open) -> None:
    def turn(name: str) -> list[dict[str, Any]]:
        return [user("U"), assistant(None, tool_calls=[call(name, {})]), tool("1", name)]

    tokenizer = mistral(version)
    first, again, other = (tokenizer.render(turn(name)).text for name in ("call_0", "call_0", "call_1"))
    assert first == again != other
    short = first.partition("[TOOL_RESULTS]")[2].replace('"', " ").replace("[", " ").split()
    assert sum(len(word) == 9 and word.isalnum() and first.count(word) == 2 for word in short) == 1


def test_call_ids_are_kept_where_nine_characters_are_not_demanded(mistral: Open) -> None:
    messages = [user("U"), assistant(None, tool_calls=[call("call_0", {})]), tool("1", "call_0")]
    assert (
        mistral("v13").render(messages).text
        == "<s>[INST]U[/INST][TOOL_CALLS]get_w[ARGS]{}</s>[TOOL_RESULTS]1[/TOOL_RESULTS]"
    )


@pytest.mark.parametrize(
    ("version", "messages", "options", "said"),
    [
        (
            "v3",
            [user("U"), assistant(None, tool_calls=[{"function": {"name": "f"}}]), tool("1", None)],
            {},
            "is missing",
        ),
        ("v1", [user("U")], TOOLS, "v1 has no tools"),
        ("v3", [user("U")], {"options": {"reasoning-effort": "high"}}, "Did you mean 'reasoning_effort'"),
        ("v13", [user("U")], {"options": {"reasoning_effort": "high"}}, "reasoning_effort"),
        ("v15", [user("U")], {"options": {"reasoning_effort": "huge"}}, "'huge'"),
        ("v3", [user("U"), assistant("A", tool_calls=[call("abcdefghi", {})]), tool("1", "abcdefghi")], {}, "not both"),
        ("v3", [user("U")], {"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "no spaces"),
        ("v7", [user("U")], {"tools": [{"function": {"name": "f", "parameters": {"type": "x"}}}]}, "schema"),
    ],
)
def test_what_a_version_cannot_express_is_refused(
    version: str, messages: list[Any], options: dict[str, Any], said: str, mistral: Open
) -> None:
    with pytest.raises(TextError, match=said) as caught:
        mistral(version).render(messages, **options)
    assert "\n" not in str(caught.value)
