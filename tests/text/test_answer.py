"""Answers taken apart: calls and thinking of every tokenizer version, whole, cut and streamed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mistral_common.experimental.tools import _decode_tool_calls, _split_content_and_tool_calls

from zoo.text.answer import PLAIN, Answer, AnswerForm, AnswerReader
from zoo.text.calls import ToolCall
from zoo.text.spec import HuggingFaceTokenizerSpec, NoChatSpec, TemplateChatSpec
from zoo.text.tokenizer import Tokenizer, open_tokenizer
from zoo.text.tools import SHORT_ID, short_id

Open = Callable[[str], Tokenizer]

LISTS = ("v2", "v3", "v3-tekken", "v7", "v7-tekken")
NAMED = ("v11", "v13", "v15")
THINKING = ("v13", "v15")
ARGUMENTS = {"c": "Zürich 北京 🦒", "n": 3, "big": 2**70, "deep": {"list": [1, 2.5, None, True, {}], "quote": 'a"b\\'}}
DEFINITION = {"type": "function", "function": {"name": "get_w", "parameters": {"type": "object", "properties": {}}}}
USER = {"role": "user", "content": "U"}
TAGS = AnswerForm(thinking=True, calls=True)


def call(function: str, arguments: Any, name: str | None = None) -> dict[str, Any]:
    made = {"type": "function", "function": {"name": function, "arguments": json.dumps(arguments)}}
    return made if name is None else {"id": name, **made}


ONE = [call("get_w", ARGUMENTS, "abcdefghi")]
TWO = [*ONE, call("other-tool_2", {}, "abcdefghj")]


def conversation(calls: list[dict[str, Any]], **more: Any) -> list[dict[str, Any]]:
    """A question, an answer with calls, and a result for each."""
    results = [{"role": "tool", "content": "22", "tool_call_id": made.get("id"), "name": "f"} for made in calls]
    return [USER, {"role": "assistant", "tool_calls": calls, **more}, *results]


def read_answer(tokenizer: Tokenizer, ids: Iterable[int], form: AnswerForm = PLAIN, *, salt: str = "") -> Answer:
    """The answer of `ids` in one piece."""
    reader = AnswerReader(tokenizer, form, salt=salt)
    return reader.push(ids) + reader.finish()


def answer_ids(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> list[int]:
    """What the model would have generated for the second message."""
    asked = tokenizer.render(messages[:1], tools=[DEFINITION]).ids
    whole = tokenizer.render(messages, tools=[DEFINITION]).ids
    assert whole[: len(asked)] == asked
    rest = whole[len(asked) :]
    return rest[: rest.index(2)]


def streamed(
    tokenizer: Tokenizer, parts: Iterable[list[int]], form: AnswerForm | None = None, **options: Any
) -> Answer:
    reader = AnswerReader(tokenizer, form or AnswerForm(), **options)
    whole = Answer()
    for part in parts:
        whole += reader.push(part)
    return whole + reader.finish()


def ids_of(tokenizer: Tokenizer, *parts: str) -> list[int]:
    """Ids of texts; a text that is the name of a control token is its id."""
    named = {tokenizer.vocabulary.control(i): i for i in range(40)}
    found: list[int] = []
    for part in parts:
        found += [named[part]] if part in named else tokenizer.encode(part, bos=False)
    return found


@pytest.mark.parametrize("calls", [ONE, TWO], ids=["one", "two"])
@pytest.mark.parametrize("version", [*LISTS, *NAMED])
def test_calls_of_every_version(version: str, calls: list[Any], mistral: Open, mistral_common: Any) -> None:
    if version == "v2":
        calls = [call("get_w", ARGUMENTS)]
    tokenizer = mistral(version)
    messages = conversation(calls)
    ids = answer_ids(tokenizer, messages)
    found = read_answer(tokenizer, ids)
    assert (found.text, found.thinking, found.call_error) == ("", "", None)
    assert [(made.name, made.arguments) for made in found.tool_calls] == [
        (made["function"]["name"], json.loads(made["function"]["arguments"])) for made in calls
    ]
    raw = mistral_common(version).instruct_tokenizer.tokenizer
    _, split = _split_content_and_tool_calls(ids, ids[0])
    for made, expected in zip(found.tool_calls, _decode_tool_calls(split, raw), strict=True):
        assert (made.name, made.arguments) == (expected.function.name, json.loads(expected.function.arguments))
    if version not in ("v2", "v13", "v15"):
        assert [made.id for made in found.tool_calls] == [made["id"] for made in calls]
    assert all(SHORT_ID.fullmatch(made.id) for made in found.tool_calls)


@pytest.mark.parametrize("calls", [ONE, TWO], ids=["one", "two"])
@pytest.mark.parametrize("version", [*LISTS, *NAMED])
def test_read_calls_go_back_in_as_they_were(version: str, calls: list[Any], mistral: Open) -> None:
    if version == "v2":
        calls = [call("get_w", ARGUMENTS)]
    tokenizer = mistral(version)
    messages = conversation(calls)
    found = read_answer(tokenizer, answer_ids(tokenizer, messages))
    again = conversation([made.to_dict() for made in found.tool_calls])
    assert tokenizer.render(again, tools=[DEFINITION]).ids == tokenizer.render(messages, tools=[DEFINITION]).ids


@pytest.mark.parametrize("version", ["v7", "v7-tekken", "v11", "v13"])
def test_text_before_a_call(version: str, mistral: Open) -> None:
    tokenizer = mistral(version)
    found = read_answer(tokenizer, answer_ids(tokenizer, conversation(ONE, content="Let me see.")))
    assert (found.text, len(found.tool_calls)) == ("Let me see.", 1)


@pytest.mark.parametrize("version", ["v3", "v7-tekken", "v11", "v13"])
def test_streamed_equals_whole_at_every_cut(version: str, mistral: Open) -> None:
    tokenizer = mistral(version)
    ids = answer_ids(tokenizer, conversation(TWO))
    for whole in (ids, ids[:-3], ids[:-9]):
        expected = read_answer(tokenizer, whole)
        assert streamed(tokenizer, [[i] for i in whole]) == expected
        for cut in range(len(whole)):
            assert streamed(tokenizer, [whole[:cut], whole[cut:]]) == expected


@pytest.mark.parametrize("version", ["v3", "v7-tekken", "v11", "v13"])
def test_a_cut_call_is_text_with_a_flag(version: str, mistral: Open) -> None:
    tokenizer = mistral(version)
    ids = answer_ids(tokenizer, conversation(TWO))
    whole = read_answer(tokenizer, ids).tool_calls
    counts = []
    for end in range(1, len(ids)):
        found = read_answer(tokenizer, ids[:end])
        made = [(one.name, one.arguments) for one in found.tool_calls]
        assert made == [(one.name, one.arguments) for one in whole[: len(made)]]
        assert (found.call_error is None) == (found.text == "")
        assert found.call_error or made
        assert found.text.startswith("[TOOL_CALLS]" if found.text else "")
        counts.append(len(made))
    assert counts == sorted(counts)
    assert {0, 1} <= {*counts}


FAULTY = {
    "single quotes": "[{'name': 'f', 'arguments': {}}]",
    "no list": '{"name": "f", "arguments": {}}',
    "empty list": "[]",
    "nothing": "",
    "no name": '[{"arguments": {}}]',
    "empty name": '[{"name": "", "arguments": {}}]',
    "no arguments": '[{"name": "f"}]',
    "arguments a number": '[{"name": "f", "arguments": 5}]',
    "arguments a broken text": '[{"name": "f", "arguments": "{"}]',
    "not a number": '[{"name": "f", "arguments": {"x": NaN}}]',
    "half a character": '[{"name": "f", "arguments": {"x": "\\ud83e"}}]',
    "deep": "[" * 100_000,
    "a name": "f",
}


@pytest.mark.parametrize("text", FAULTY.values(), ids=FAULTY)
def test_a_faulty_call_is_text_with_a_flag(text: str, mistral: Open) -> None:
    tokenizer = mistral("v7-tekken")
    found = read_answer(tokenizer, ids_of(tokenizer, "[TOOL_CALLS]", text))
    assert (found.tool_calls, found.text) == ([], f"[TOOL_CALLS]{text}")
    assert found.call_error is not None
    assert found.call_error.startswith("a tool call could not be read: ")


FAULTY_PARTS = {
    "no arguments": ["[TOOL_CALLS]", "f", "[ARGS]"],
    "two arguments": ["[TOOL_CALLS]", "f", "[ARGS]", "{}", "[ARGS]", "{}"],
    "id last": ["[TOOL_CALLS]", "f", "[ARGS]", "{}", "[CALL_ID]", "abcdefghi"],
    "no name": ["[TOOL_CALLS]", "[ARGS]", "{}"],
    "a list": ["[TOOL_CALLS]", "f", "[ARGS]", "[1]"],
    "more after it": ["[TOOL_CALLS]", "f", "[ARGS]", "{} and so on"],
    "no JSON": ["[TOOL_CALLS]", "f", "[ARGS]", "x=1"],
}


@pytest.mark.parametrize("parts", FAULTY_PARTS.values(), ids=FAULTY_PARTS)
def test_faulty_named_calls(parts: list[str], mistral: Open) -> None:
    tokenizer = mistral("v11")
    good = ["[TOOL_CALLS]", "g", "[ARGS]", ' {"n": 1}\n']
    found = read_answer(tokenizer, ids_of(tokenizer, "Hm.", *parts, *good))
    assert found.text == "Hm." + "".join(parts)
    assert [(made.name, made.arguments) for made in found.tool_calls] == [("g", {"n": 1})]
    assert found.call_error is not None


WELL = {
    "text for arguments": ('[{"name": "f", "arguments": "{\\"x\\": 1}"}]', {"x": 1}, ""),
    "line ends": ('[\n {"name": "f",\n "arguments": {"x": "a\nb"}}\n]\n', {"x": "a\nb"}, ""),
    "no end": ('[{"name": "f", "arguments": {}}', {}, ""),
    "text behind": ('[{"name": "f", "arguments": {}}] Done.', {}, "Done."),
}


@pytest.mark.parametrize(("text", "arguments", "rest"), WELL.values(), ids=WELL)
def test_calls_that_can_be_read(text: str, arguments: Any, rest: str, mistral: Open) -> None:
    tokenizer = mistral("v7-tekken")
    found = read_answer(tokenizer, ids_of(tokenizer, "[TOOL_CALLS]", text))
    assert [made.arguments for made in found.tool_calls] == [arguments]
    assert (found.text, found.call_error) == (rest, None)


def test_of_a_cut_list_only_the_rest_is_text(mistral: Open) -> None:
    tokenizer = mistral("v7-tekken")
    text = '[{"name": "f", "arguments": {}} , {"name": "g", "arg'
    found = read_answer(tokenizer, ids_of(tokenizer, "[TOOL_CALLS]", text))
    assert [made.name for made in found.tool_calls] == ["f"]
    assert found.text == '[TOOL_CALLS]{"name": "g", "arg'


def test_what_closes_nothing_is_left_out(mistral: Open) -> None:
    tokenizer = mistral("v13")
    found = read_answer(tokenizer, ids_of(tokenizer, "[TOOL_CALLS]", "f", "[ARGS]", '{"n"', "[/THINK]", ": 1}"))
    assert ([made.arguments for made in found.tool_calls], found.text) == ([{"n": 1}], "")


def test_ids_are_made_and_made_to_differ(mistral: Open) -> None:
    tokenizer = mistral("v11")
    same, none = ["[CALL_ID]", "call_0", "[ARGS]", "{}"], ["[ARGS]", "{}"]
    ids = ids_of(tokenizer, *["[TOOL_CALLS]", "f", *same] * 2, *["[TOOL_CALLS]", "f", *none] * 2)
    found = [made.id for made in read_answer(tokenizer, ids, salt="10").tool_calls]
    assert found[0] == short_id("call_0")
    assert len({*found}) == 4
    assert all(SHORT_ID.fullmatch(name) for name in found)
    assert found == [made.id for made in read_answer(tokenizer, ids, salt="10").tool_calls]
    other = [made.id for made in read_answer(tokenizer, ids, salt="20").tool_calls]
    assert [one == two for one, two in zip(found, other, strict=True)] == [True, True, False, False]


def test_written_names_of_control_tokens_are_text(mistral: Open) -> None:
    tokenizer = mistral("v13")
    text = 'Write [TOOL_CALLS]f[ARGS]{} or [THINK]x[/THINK] or <tool_call>{"name": "f"}</tool_call> <think>'
    assert read_answer(tokenizer, tokenizer.encode(text, bos=False)) == Answer(text)


@pytest.mark.parametrize("version", THINKING)
def test_thinking_by_control_tokens(version: str, mistral: Open) -> None:
    tokenizer = mistral(version)
    messages = [USER, {"role": "assistant", "content": "A", "reasoning_content": "hm\n\nwell\n"}, USER]
    ids = answer_ids(tokenizer, messages)
    assert read_answer(tokenizer, ids) == Answer("A", "hm\n\nwell\n")
    assert streamed(tokenizer, [[i] for i in ids]) == Answer("A", "hm\n\nwell\n")


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (["[THINK]", "hm"], Answer("", "hm")),
        (["[THINK]", "a", "[/THINK]", "b", "[THINK]", "c", "[/THINK]", "d"], Answer("bd", "ac")),
        (["a", "[/THINK]", "[ARGS]", "b"], Answer("ab")),
        (["[THINK]", "a", "[/THINK]"], Answer("", "a")),
    ],
)
def test_odd_thinking(parts: list[str], expected: Answer, mistral: Open) -> None:
    tokenizer = mistral("v13")
    assert read_answer(tokenizer, ids_of(tokenizer, *parts)) == expected


def test_a_call_ends_thinking(mistral: Open) -> None:
    tokenizer = mistral("v13")
    found = read_answer(tokenizer, ids_of(tokenizer, "[THINK]", "hm", "[TOOL_CALLS]", "f", "[ARGS]", "{}"))
    assert (found.text, found.thinking, [made.name for made in found.tool_calls]) == ("", "hm", ["f"])


CALL = '{"name": "f", "arguments": {"x": "é"}}'
TAGGED: dict[str, tuple[AnswerForm, str, str, str, int]] = {
    "thinking": (TAGS, "<think>\nhm, 2 < 3\n</think>\n\nYes.\n", "Yes.\n", "hm, 2 < 3", 0),
    "no thinking": (TAGS, "Yes.", "Yes.", "", 0),
    "cut thinking": (TAGS, "<think>hm</thi", "", "hm</thi", 0),
    "begun by the prompt": (AnswerForm(thinking=True, begun=True), "\nhm\n</think>\n\nYes.", "Yes.", "hm", 0),
    "not at the beginning": (TAGS, "See <think>x</think>", "See <think>x</think>", "", 0),
    "only once": (TAGS, "<think>a</think>b<think>c", "b<think>c", "a", 0),
    "not looked for": (
        AnswerForm(),
        f"<think>a</think>b<tool_call>{CALL}",
        f"<think>a</think>b<tool_call>{CALL}",
        "",
        0,
    ),
    "call": (TAGS, f"<tool_call>\n{CALL}\n</tool_call>", "", "", 1),
    "calls": (TAGS, f"So:\n<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>\n", "So:", "", 2),
    "thinking and call": (
        TAGS,
        f"<think>\n<tool_call>\n</think>\n\n<tool_call>{CALL}</tool_call>",
        "",
        "<tool_call>",
        1,
    ),
    "call without end": (TAGS, f"<tool_call>{CALL}", "", "", 1),
    "cut call": (TAGS, '<tool_call>{"name": "f"', '<tool_call>{"name": "f"', "", 0),
    "faulty call": (TAGS, "<tool_call>f()</tool_call>\n.", "<tool_call>f()</tool_call>\n.", "", 0),
    "beginnings of tags": (TAGS, "a <tool\n\n<thin\n", "a <tool\n\n<thin\n", "", 0),
}


@pytest.mark.parametrize("name", TAGGED)
def test_tags_in_text_at_every_cut(name: str, mistral: Open) -> None:
    form, text, answer, thinking, calls = TAGGED[name]
    tokenizer = mistral("v11")
    ids = tokenizer.encode(text, bos=False)
    found = read_answer(tokenizer, ids, form)
    assert (found.text, found.thinking, len(found.tool_calls)) == (answer, thinking, calls)
    assert (found.call_error is not None) == (name in ("cut call", "faulty call"))
    assert streamed(tokenizer, [[i] for i in ids], form) == found
    for cut in range(len(ids)):
        assert streamed(tokenizer, [ids[:cut], ids[cut:]], form) == found


def test_added_tokens_of_hugging_face(hugging_face: Callable[..., Path]) -> None:
    """`<tool_call>` is a token of its own there, and text none the less."""
    tokenizer = open_tokenizer(HuggingFaceTokenizerSpec(), NoChatSpec(), hugging_face())
    ids = tokenizer.encode('hello<tool_call>{"name": "f", "arguments": {}}</tool_call>', bos=False)
    found = read_answer(tokenizer, ids, AnswerForm(calls=True))
    assert (found.text, [made.name for made in found.tool_calls]) == ("hello", ["f"])


TURN = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize(
    ("ending", "tools", "form"),
    [
        ("<|im_start|>", None, AnswerForm(thinking=True)),
        ("<|im_start|>", [DEFINITION], AnswerForm(thinking=True, calls=True)),
        ("<|im_start|><think>\n", None, AnswerForm(thinking=True, begun=True)),
        ("<|im_start|><think>\n\n</think>\n\n", None, AnswerForm(thinking=True)),
    ],
)
def test_templates_say_how_their_answers_begin(
    ending: str, tools: Any, form: AnswerForm, hugging_face: Callable[..., Path]
) -> None:
    folder = hugging_face(chat_template=TURN + "{% if add_generation_prompt %}" + ending + "{% endif %}")
    tokenizer = open_tokenizer(HuggingFaceTokenizerSpec(), TemplateChatSpec(), folder)
    assert tokenizer.render([USER], tools=tools).form == form
    begun = [USER, {"role": "assistant", "content": "hello"}]
    assert tokenizer.render(begun, continue_final=True).form == AnswerForm()


WORDS = [
    "<think>",
    "</think>",
    "\n",
    "<tool_call>",
    "</tool_call>",
    CALL,
    "a",
    "<",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[THINK]",
]
WORDS += ["[/THINK]", "[CALL_ID]", "{}", "[" + CALL, "]", ","]


@settings(max_examples=150, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_cuts_of_any_answer(mistral: Open, data: st.DataObject) -> None:
    tokenizer = mistral("v13")
    ids = ids_of(tokenizer, *data.draw(st.lists(st.sampled_from(WORDS), max_size=12)))
    form = AnswerForm(*data.draw(st.tuples(st.booleans(), st.booleans(), st.booleans())))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=4)))
    parts = [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    assert streamed(tokenizer, parts, form) == read_answer(tokenizer, ids, form)


SPECIALS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>")


class Channelled:
    """A tokenizer's vocabulary with the control tokens of channels after its own."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._own, self.vocabulary = tokenizer, self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own.vocabulary, name)

    def control(self, token: int) -> str | None:
        return SPECIALS[token - 9000] if token >= 9000 else self._own.vocabulary.control(token)

    def ids(self, *parts: str) -> list[int]:
        found = [[9000 + SPECIALS.index(p)] if p in SPECIALS else self._own.encode(p, bos=False) for p in parts]
        return [token for ids in found for token in ids]


THOUGHT = ("<|channel|>", "analysis", "<|message|>", "hm, so", "<|end|>", "<|start|>", "assistant")
CALLED = ("<|channel|>", "commentary to=functions.f ", "<|constrain|>", "json", "<|message|>", '{"a": 1}', "<|call|>")
CHANNELLED: dict[str, tuple[tuple[str, ...], Answer]] = {
    "thought, then said": (
        (*THOUGHT, "<|channel|>", "final", "<|message|>", "hello"),
        Answer("hello", "hm, so"),
    ),
    "said before a call": (
        ("<|channel|>", "commentary", "<|message|>", "I look.", "<|end|>", "<|start|>", "assistant", *CALLED),
        Answer("I look.", "", [ToolCall("", "f", {"a": 1})]),
    ),
    "called by the header's first part": (
        (*THOUGHT, " to=functions.f", *CALLED[:1], "commentary json", *CALLED[4:]),
        Answer("", "hm, so", [ToolCall("", "f", {"a": 1})]),
    ),
    "cut while thinking": (THOUGHT[:4], Answer("", "hm, so")),
    "cut in a header": (THOUGHT, Answer("", "hm, so")),
    "no channels": (("<|start|>", "hello", "<|end|>", " hello"), Answer("hello hello")),
}


@pytest.mark.parametrize("form", [AnswerForm(), AnswerForm(thinking=True, calls=True)], ids=["plain", "template"])
@pytest.mark.parametrize(("parts", "expected"), CHANNELLED.values(), ids=CHANNELLED)
def test_channels(
    parts: tuple[str, ...], expected: Answer, form: AnswerForm, hugging_face: Callable[..., Path]
) -> None:
    tokenizer: Any = Channelled(open_tokenizer(HuggingFaceTokenizerSpec(), NoChatSpec(), hugging_face()))
    ids = tokenizer.ids(*parts)
    whole = read_answer(tokenizer, ids, form)
    assert (whole.text, whole.thinking, whole.call_error) == (expected.text, expected.thinking, None)
    named = [(made.name, made.arguments) for made in whole.tool_calls]
    assert named == [(made.name, made.arguments) for made in expected.tool_calls]
    assert streamed(tokenizer, [[token] for token in ids], form) == whole
