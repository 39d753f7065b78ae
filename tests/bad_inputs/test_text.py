"""Tokenizer files, conversations and characters as users have them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from zoo.registry.errors import TextError

if TYPE_CHECKING:
    from tests.bad_inputs.conftest import Desk
    from zoo.model import Model

Message = dict[str, Any]
Open = Callable[[str], "Model"]


def user(content: Any = "Hello") -> Message:
    return {"role": "user", "content": content}


def system(content: Any = "Be short.") -> Message:
    return {"role": "system", "content": content}


def assistant(content: Any = "Yes.") -> Message:
    return {"role": "assistant", "content": content}


def call(name: Any = "call_0", arguments: Any = '{"a": 1}') -> Message:
    return {"id": name, "type": "function", "function": {"name": "add", "arguments": arguments}}


def calls(*made: Message) -> Message:
    return {"role": "assistant", "content": None, "tool_calls": [*made]}


def result(name: Any = "call_0", content: str = "42") -> Message:
    return {"role": "tool", "tool_call_id": name, "content": content}


def asked(arguments: Any) -> list[Message]:
    return [user(), calls(call(arguments=arguments)), result()]


# --- conversations ------------------------------------------------------------------------------------------------

NOT_JSON = "message 2 (assistant), call 1: the arguments are not JSON; found "

CONVERSATIONS: dict[str, tuple[Any, str]] = {
    "no messages": ([], "the conversation is empty; expected at least one user message"),
    "one message without a list": (user(), "a conversation is a list of messages; found dict"),
    "texts for messages": (["Hello"], 'message 1: not a message; found str; expected a dict such as {"role": "user"'),
    "a system message in the middle": (
        [user(), assistant(), system(), user()],
        "message 3 (system): a system message stands only at the beginning; expected user",
    ),
    "a system message at the end": (
        [user(), assistant(), user(), system()],
        "message 4 (system): a system message stands only at the beginning; expected assistant",
    ),
    "two system messages": (
        [system(), system(), user()],
        "message 2 (system): a system message stands only at the beginning",
    ),
    "a system message alone": ([system()], "message 1 (system): there is only a system message; expected a user mess"),
    "two users in a row": (
        [user(), user()],
        "message 2 (user): role user cannot follow a message of role user; expected assistant. Pass merge=True",
    ),
    "an assistant first": (
        [assistant(), user()],
        "message 1 (assistant): a conversation cannot start with a message of role assistant; expected system or user",
    ),
    "an assistant last": ([user(), assistant()], "message 2 (assistant): the conversation ends with an assistant mess"),
    "a result without a call": (
        [user(), result()],
        "message 2 (tool): a tool message answers a tool call, but there is none before; expected assistant",
    ),
    "a user after a call": (
        [user(), calls(call()), user()],
        "message 3 (user): role user cannot follow a tool call; expected tool",
    ),
    "a call at the end": (
        [user(), calls(call())],
        "message 2 (assistant): the conversation ends with a tool call. Add",
    ),
    "content of null": ([user(None)], "message 1 (user): the content is missing or null; expected a text"),
    "no content": ([{"role": "user"}], "message 1 (user): the content is missing or null; expected a text"),
    "empty content": ([user("")], "message 1 (user): the content is empty"),
    "an empty list of parts": ([user([])], "message 1 (user): the content is empty"),
    "a number for content": ([user(3)], "message 1 (user): the content is not a text; found int; expected a text or p"),
    "a picture for a text model": (
        [user([{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}])],
        "message 1 (user): part 1 is an image, which this tokenizer cannot take: it reads text only",
    ),
    "a part of unknown type": (
        [user([{"type": "text", "text": "a"}, {"type": "txt", "text": "b"}])],
        "message 1 (user): part 2 is of no known type; found type 'txt'; expected a dict such as",
    ),
    "a role misspelt": (
        [{"role": "usr", "content": "x"}],
        "message 1: unknown role; found 'usr'; expected one of system, user, assistant, tool. Did you mean 'user'?",
    ),
    "a field misspelt": (
        [{"role": "user", "contents": "x"}],
        "message 1 (user): unknown field 'contents'; expected only role, content. Did you mean 'content'?",
    ),
    "an empty call id": (
        [user(), calls(call("")), result("")],
        "message 2 (assistant), call 1: the id of a tool call is a text; found ''",
    ),
    "a call id twice": (
        [user(), calls(call("a"), call("a")), result("a"), result("a")],
        "message 2 (assistant): two calls have the same id; found 'a'",
    ),
    "a result for another call": (
        [user(), calls(call("a")), result("b")],
        "message 3 (tool): tool_call_id names no open call; found 'b'; expected 'a'",
    ),
    "one result for two calls": (
        [user(), calls(call("a"), call("b")), result("a")],
        "message 3 (tool): a tool call has no result; found call b",
    ),
    "two results for one call": (
        [user(), calls(call("a")), result("a"), result("a")],
        "message 4 (tool): more tool results than tool calls; found tool_call_id 'a'",
    ),
    "arguments cut by the length limit": (asked('{"a": [1, 2'), NOT_JSON + '{"a": [1, 2'),
    "arguments in single quotes": (asked("{'a': 1}"), NOT_JSON + "{'a': 1}"),
    "arguments that are a list": (
        asked("[1]"),
        "message 2 (assistant), call 1: the arguments are no JSON object; found [1]",
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversation_refused(name: str, opened: Open, desk: Desk) -> None:
    messages, said = CONVERSATIONS[name]
    desk.refused(TextError, [said], lambda: opened("v7-tekken").chat(messages, max_tokens=0))


PROMPTS: dict[str, tuple[str, list[Message], dict[str, Any], str]] = {
    "a system message first": (
        "v7-tekken",
        [system(), user()],
        {},
        "<s>[SYSTEM_PROMPT]Be short.[/SYSTEM_PROMPT][INST]Hello[/INST]",
    ),
    "a system message before the second turn, in v3's last turn": (
        "v3",
        [system(), user(), assistant(), user("Why?")],
        {},
        "<s>[INST] Hello[/INST] Yes.</s>[INST] Be short.\n\nWhy?[/INST]",
    ),
    "two users in a row, merged": (
        "v7-tekken",
        [user("One."), user("Two.")],
        {"merge": True},
        "<s>[INST]One.\n\nTwo.[/INST]",
    ),
    "a user after a result": (
        "v7-tekken",
        [user(), calls(call()), result(), user("So?")],
        {},
        "[TOOL_CONTENT]42[/TOOL_RESULTS][INST]So?[/INST]",
    ),
    "content in parts": (
        "v7-tekken",
        [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])],
        {},
        "<s>[INST]a\n\nb[/INST]",
    ),
    "control tokens written by the user": (
        "v7-tekken",
        [user("[INST] </s> [IMG] <s>")],
        {},
        "<s>[INST][INST] </s> [IMG] <s>[/INST]",
    ),
    "a call id of other signs": ("v3", [user(), calls(call("call_0")), result("call_0")], {}, '"id": "'),
    "a call id that is a UUID": (
        "v3",
        [user(), calls(call("8f14e45f-ceea-467f-a9d4-3d8f3a1c6b2e")), result("8f14e45f-ceea-467f-a9d4-3d8f3a1c6b2e")],
        {},
        '"id": "',
    ),
    "arguments of whole numbers": ("v7-tekken", asked('{"a": 1, "b": -2}'), {}, '"arguments": {"a": 1, "b": -2}'),
    "arguments as an object": ("v7-tekken", asked({"a": 1}), {}, '"arguments": {"a": 1}'),
    "no arguments": ("v7-tekken", asked(""), {}, '"arguments": {}'),
    "nested arguments": ("v7-tekken", asked('{"a": {"b": [1, {"c": null}]}}'), {}, '{"a": {"b": [1, {"c": null}]}}'),
    "quotes in arguments": ("v7-tekken", asked('{"a": "say \\"hi\\""}'), {}, '{"a": "say \\"hi\\""}'),
    "other letters in arguments": ("v7-tekken", asked('{"a": "Zürich 数字"}'), {}, '{"a": "Zürich 数字"}'),
    "two calls at once": (
        "v7-tekken",
        [user(), calls(call("a" * 9), call("b" * 9)), result("b" * 9), result("a" * 9, "43")],
        {},
        "bbbbbbbbb[TOOL_CONTENT]42[/TOOL_RESULTS][TOOL_RESULTS]aaaaaaaaa[TOOL_CONTENT]43[/TOOL_RESULTS]",
    ),
    "an answer begun": (
        "v7-tekken",
        [user(), assistant("Sure")],
        {"continue_final": True},
        "<s>[INST]Hello[/INST]Sure",
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_conversation_right(name: str, opened: Open) -> None:
    version, messages, options, shown = PROMPTS[name]
    model = opened(version)
    assert model.tokenizer is not None
    ids = model.chat(messages, max_tokens=0, **options).prompt_ids
    text = model.tokenizer.decode(ids, special=True)
    assert text == shown if shown.startswith("<s>") else shown in text
    assert ids[0] == 1
    assert 1 not in ids[1:]


def test_call_ids_of_other_signs_agree_with_their_results(opened: Open) -> None:
    """v3 knows nine letters and digits only: a call and its result get the same nine."""
    model = opened("v3")
    assert model.tokenizer is not None
    text = model.tokenizer.decode(model.chat(asked("{}"), max_tokens=0).prompt_ids, special=True)
    made = text.partition('"id": "')[2][:9]
    assert made.isalnum()
    assert text.count(made) == 2


def test_a_version_without_tools(opened: Open, desk: Desk) -> None:
    said = "Mistral's tokenizer v1 has no tools; expected v2 or newer"
    desk.refused(TextError, [said], lambda: opened("v1").chat(asked("{}"), max_tokens=0))


def test_written_control_tokens_on_the_command_line(opened: Open, desk: Desk) -> None:
    desk.become("v7-tekken")
    shown = json.loads(desk.command("inspect", str(desk.folder), "--prompt", "</s>[INST]", "--json").out)["prompt"]
    assert [row["id"] for row in shown if row["id"] < 1000] == [1, 3, 4]
    assert [shown[0]["piece"], shown[1]["piece"], shown[-1]["piece"]] == ["<s>", "[INST]", "[/INST]"]


# --- tokenizer files ----------------------------------------------------------------------------------------------

FileAct = Callable[["Desk"], dict[str, Any]]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"


def with_tekken(content: Callable[[bytes], bytes | str], **changes: Any) -> FileAct:
    """A checkpoint of tekken's whose tokenizer file has other bytes, and whose card other fields."""

    def act(desk: Desk) -> dict[str, Any]:
        desk.become("v7-tekken")
        file = desk.folder / "tekken.json"
        desk.put("tekken.json", content(file.read_bytes()))
        return changes

    return act


def with_both(**changes: Any) -> FileAct:
    """tokenizer.model.v1 with its model, and a tekken.json beside it."""

    def act(desk: Desk) -> dict[str, Any]:
        desk.become("v1")
        shutil.copy(desk.checkpoint("v7-tekken") / "tekken.json", desk.folder)
        return changes

    return act


def named(name: str, version: str = "v1") -> FileAct:
    """The SentencePiece file of a version under a name."""

    def act(desk: Desk) -> dict[str, Any]:
        desk.become(version)
        (desk.folder / f"tokenizer.model.{version}").rename(desk.folder / name)
        return {}

    return act


def too_large(desk: Desk) -> dict[str, Any]:
    """The tokenizer of another model."""
    shutil.copy(desk.checkpoint("v7-tekken") / "tekken.json", desk.folder)
    return {}


def both_kinds(desk: Desk) -> dict[str, Any]:
    """Mistral's tokenizer, and a tokenizer.json with its template."""
    desk.become("v7-tekken")
    return hugging_face(CHATML)(desk)


def hugging_face(template: str | None, **config: Any) -> FileAct:
    """tokenizer.json of a byte-level tokenizer, and a template in tokenizer_config.json."""

    def act(desk: Desk) -> dict[str, Any]:
        desk.put("tokenizer.json", desk.tokenizer_json("byte level"))
        fields = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **config}
        desk.put("tokenizer_config.json", fields if template is None else {**fields, "chat_template": template})
        return {}

    return act


TEKKEN, V3 = "text.tokenizer.version", {"text.tokenizer.version": "v3"}

FILES: dict[str, tuple[FileAct, list[str]]] = {
    "no tokenizer": (
        lambda desk: {},
        [
            "model: there is no tokenizer, so only token ids can be used",
            "expected tekken.json",
            "Pass lists of token ids",
        ],
    ),
    "a Git-LFS pointer": (
        with_tekken(lambda _: "version https://git-lfs.github.com/spec/v1\n"),
        ["tekken.json: a Git-LFS pointer instead of the file", "`git lfs pull`"],
    ),
    "a file of no bytes": (with_tekken(lambda _: b""), ["tekken.json: the file is empty", "Fetch it again"]),
    "a file that is cut": (
        with_tekken(lambda data: data[:9000]),
        ["tekken.json: not a tokenizer of version v7; found", "Fetch the file again"],
    ),
    "a version of the future": (
        with_tekken(lambda data: data.replace(b'"v7"', b'"v99"')),
        ["tekken.json: unknown tokenizer version; found v99; expected one of v1, v2", "A newer zoo may know it"],
    ),
    "another version than the card's": (
        with_tekken(lambda data: data, **V3),
        ["the tokenizer file is not of the card's version; found tekken.json (v7); expected version v3"],
    ),
    "two files, and neither is the card's": (
        with_both(**V3),
        ["not of the card's version; found tekken.json (v7), tokenizer.model.v1 (v1); expected version v3"],
    ),
    "more tokens than the model has": (
        too_large,
        ["does not fit the model", "found 1400 token ids for a vocabulary of 509", "that belongs to these weights"],
    ),
    "a name that promises another version": (
        named("tokenizer.model.v3"),
        ["tokenizer.model.v3: the file's name and content disagree; found the pieces of v1"],
    ),
    "a chat format for another tokenizer": (
        with_tekken(lambda data: data, **{"text.chat": "template"}),
        ["the chat format 'template' needs a tokenizer of kind 'huggingface'", "Write `chat: mistral` in the card"],
    ),
    "a template of broken grammar": (
        hugging_face("{% for m in %}"),
        ["tokenizer_config.json:1: the chat template is faulty; found TemplateSyntaxError: Expected an expression"],
    ),
    "a template that reaches out": (
        hugging_face("{{ messages.__class__.__mro__ }}"),
        ["tokenizer_config.json: the chat template reaches for what templates may not touch", "'__class__'"],
    ),
    "a template that refuses": (
        hugging_face("{{ raise_exception('Only on Sundays!') }}"),
        ["tokenizer_config.json: the chat template refuses the conversation; found Only on Sundays!"],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_tokenizer_file_refused(name: str, desk: Desk) -> None:
    """Text is refused, by Python and on the command line; token ids go through."""
    act, words = FILES[name]
    overrides = act(desk)
    flags = [part for field, value in overrides.items() for part in ("--set", f"{field}={value}")]
    with desk.load(overrides=overrides) as model:
        chosen = ("--device", "cpu", "--dtype", "float32", "--max-tokens", "1")
        command = ("run", str(desk.folder), "--prompt", "Hello", *chosen, *flags)
        desk.refused(TextError, words, lambda: model.generate("Hello", max_tokens=1), *command)
        assert len(model.generate([[1, 5]], max_tokens=2, ignore_eos=True)[0].tokens) == 2


GOOD_FILES: dict[str, tuple[FileAct, str, str]] = {
    "only tekken.json": (with_tekken(lambda data: data), "v7", ""),
    "only tokenizer.model": (
        named("tokenizer.model"),
        "v1",
        "tokenizer: tokenizer.model (v1), the version read from its control pieces",
    ),
    "only tokenizer.model with a version": (named("tokenizer.model.v3", "v3"), "v3", ""),
    "two files, and the card names one": (
        with_both(**{TEKKEN: "v1"}),
        "v1",
        "tokenizer: tokenizer.model.v1 (v1), not tekken.json (v7): its version is the card's",
    ),
    "two files, and the card names none": (
        with_both(),
        "v7",
        "tokenizer: tekken.json (v7), not tokenizer.model.v1 (v1): tekken first, then the newest",
    ),
    "Mistral's and Hugging Face's": (
        both_kinds,
        "v7",
        "",
    ),
    "only tokenizer.json": (hugging_face(CHATML), "tokenizer.json", ""),
}


@pytest.mark.parametrize("name", GOOD_FILES)
def test_tokenizer_file_right(name: str, desk: Desk) -> None:
    act, version, note = GOOD_FILES[name]
    with desk.load(overrides=act(desk)) as model:
        assert model.tokenizer is not None, model.notes
        assert model.tokenizer.version == version
        assert note in model.notes or not note, model.notes
        [answer] = model.generate("Hello", max_tokens=0)
        assert "Hello" in model.tokenizer.decode(answer.prompt_ids, special=True)


@pytest.mark.parametrize("template", ["{{ bos_token }}" + CHATML, "{{ bos_token }}{{ bos_token }}" + CHATML, CHATML])
def test_a_template_that_writes_the_first_token_itself(desk: Desk, template: str) -> None:
    """However often template and tokenizer add it, the beginning-of-sequence id stands there at most once."""
    hugging_face(template)(desk)
    with desk.load() as model:
        ids = model.generate("Hello", max_tokens=0)[0].prompt_ids
        assert ids.count(1) == min(template.count("bos_token"), 1)
        assert ids[0] == 1 or template == CHATML


def test_no_template(desk: Desk) -> None:
    """A tokenizer without a chat template takes raw text and refuses messages."""
    hugging_face(None)(desk)
    with desk.load() as model:
        said = ["a base model without a chat format", "Send raw text, or name a chat format in the card (text.chat)"]
        desk.refused(TextError, said, lambda: model.chat([user()]))
        assert model.generate("Hello", max_tokens=1)[0].usage.completion_tokens == 1


# --- characters ---------------------------------------------------------------------------------------------------

SAID = "🦒 한漢é."
"""Thirteen tokens of tekken's small vocabulary, most of them single bytes."""


def test_characters_split_over_tokens(desk: Desk, parrot: Callable[[str], Path]) -> None:
    with desk.load(parrot(SAID)) as model:
        chunks = [*model.stream([1])]
        assert [chunk.text for chunk in chunks if chunk.text] == ["🦒", " ", "한", "漢", "é", "."]
        assert chunks[-1].completion is not None
        assert chunks[-1].completion.text == SAID


@pytest.mark.parametrize("count", [1, 2, 3, 7, 9])
def test_an_answer_cut_inside_a_character(desk: Desk, parrot: Callable[[str], Path], count: int) -> None:
    """A lone byte at the end shows as the replacement character, streamed as in the whole."""
    with desk.load(parrot(SAID)) as model:
        chunks = [*model.stream([1], max_tokens=count)]
        answer = chunks[-1].completion
        assert answer is not None
        assert "".join(chunk.text for chunk in chunks) == answer.text
        assert answer.text == bytes(SAID, "utf-8")[:count].decode(errors="replace")
        assert (answer.finish_reason, len(answer.tokens)) == ("length", count)


@pytest.mark.parametrize("version", ["v1", "v3", "v7-tekken"])
def test_special_ids_are_read(opened: Open, version: str) -> None:
    """Decoding control ids, and ids that no tokenizer knows, neither fails nor shows them unasked."""
    tokenizer = opened(version).tokenizer
    assert tokenizer is not None
    ids = [1, *tokenizer.encode("Hello", bos=False), 2, tokenizer.vocab_size + 7]
    assert tokenizer.decode(ids) == "Hello"
    assert tokenizer.decode(ids, special=True).startswith("<s>")
    assert f"</s><id {tokenizer.vocab_size + 7}>" in tokenizer.decode(ids, special=True)
