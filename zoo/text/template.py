"""A checkpoint's own chat template: conversations to text by the template, text to ids by `tokenizer.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

from zoo.images.messages import pictures_of
from zoo.json_file import damaged, read_object
from zoo.registry.errors import TextError, nearest
from zoo.text.answer import THINK, AnswerForm
from zoo.text.conversation import check_messages, fault, joined
from zoo.text.huggingface import HuggingFaceCodec
from zoo.text.pictures import PictureIds
from zoo.text.quoting import Quoting
from zoo.text.sandbox import ChatTemplate
from zoo.text.spec import TemplateChatSpec
from zoo.text.tokenizer import Message, Prompt
from zoo.text.tools import check_tools

DEFAULT, WITH_TOOLS = "default", "tool_use"
OURS = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
END = "zoo-continues-here"
PROBE = "zoo-probe"


class TemplateChat:
    """Templates by name, each with the file that it is from."""

    def __init__(self, codec: HuggingFaceCodec, templates: Mapping[str, tuple[str, str]], folder: Path) -> None:
        self._codec, self._templates, self._folder = codec, templates, folder
        self._compiled: dict[str, ChatTemplate] = {}

    @classmethod
    def open(cls, spec: TemplateChatSpec, codec: Any, folder: Path) -> Self:
        """Raises TextError for a tokenizer of another kind: templates write control tokens as text."""
        if not isinstance(codec, HuggingFaceCodec):
            raise TextError(
                "the chat format 'template' needs a tokenizer of kind 'huggingface'",
                where=str(folder),
                found=f"tokenizer kind {codec.kind!r}",
                hint="write `chat: mistral` in the card",
            )
        return cls(codec, find_templates(folder), folder)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        continue_final: bool,
        merge: bool,
        options: Mapping[str, Any],
    ) -> Prompt:
        checked = joined(check_messages(messages, continue_final=continue_final, merge=merge))
        definitions = check_tools(tools)
        template = self._template(WITH_TOOLS if definitions and WITH_TOOLS in self._templates else DEFAULT)
        _check_options(options, template.variables - OURS - self._codec.names.keys())
        pictures = pictures_of(checked)
        ready = [self._message(template, number, message) for number, message in enumerate(checked, 1)]
        if continue_final:
            ready[-1] = _with_end(ready[-1])
        marked = self._quoting.mark({"messages": ready, "tools": definitions, "options": options})
        text = self._text(template, marked["messages"], marked["tools"], not continue_final, marked["options"])
        if continue_final:
            text = self._before_end(text)
        ids = self._codec.single_bos(self._quoting.encode(text))
        if pictures:
            ids = PictureIds.of(self._codec.control_id).expand(ids, pictures)
        begun = text.rstrip().endswith(THINK)
        form = AnswerForm(thinking=begun or not continue_final, begun=begun, calls=bool(definitions))
        shown = partial(self._quoting.unmark, text)
        return Prompt(ids, shown, tuple(pictures), continues=continue_final, form=form)

    def end_ids(self) -> frozenset[int]:
        """The added token that the template writes right after an answer, found by rendering one."""
        try:
            turns = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE + END}]
            text = self._text(self._template(DEFAULT), turns, None, False, {})
        except TextError:
            return frozenset()
        _, mark, after = text.rpartition(END)
        ids = self._codec.library.encode(after.lstrip(), add_special_tokens=False).ids if mark else []
        ends = self._codec.library.get_added_tokens_decoder().keys() - {self._codec.bos_id}
        return frozenset(i for i in ids[:1] if i in ends)

    @cached_property
    def _quoting(self) -> Quoting:
        return Quoting(self._codec.library, self._codec.special, self._codec.names.get("unk_token"))

    def _template(self, name: str) -> ChatTemplate:
        if name not in self._templates:
            raise TextError(
                "the checkpoint has no chat template",
                where=str(self._folder),
                found=f"templates {', '.join(self._templates)}" if self._templates else None,
                expected="chat_template.jinja, or chat_template in tokenizer_config.json",
                hint="send raw text, or add the template's file",
            )
        if name not in self._compiled:
            self._compiled[name] = ChatTemplate(*self._templates[name])
        return self._compiled[name]

    def _text(
        self,
        template: ChatTemplate,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        answer: bool,
        options: Mapping[str, Any],
    ) -> str:
        given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": answer}
        return template.render({**self._codec.names, **options, **given})

    def _message(self, template: ChatTemplate, number: int, message: dict[str, Any]) -> dict[str, Any]:
        """The message as templates expect it: parts only where the template reads parts."""
        if "reasoning_content" in message:
            message = {**message, "thinking": message["reasoning_content"]}
        content = message.get("content")
        if isinstance(content, list):
            content = [{"type": "image"} if part["type"] == "picture" else part for part in content]
            message = {**message, "content": content}
        if not isinstance(content, list) or self._takes_parts(template):
            return message
        if any(part["type"] != "text" for part in content):
            raise fault(number, message, "the chat template takes no parts but text")
        return {**message, "content": "\n".join(part["text"] for part in content)}

    def _takes_parts(self, template: ChatTemplate) -> bool:
        """Whether a text and the same text as a part give the same prompt; else parts would be printed as a list."""
        try:
            one, other = (
                self._text(template, [{"role": "user", "content": content}], None, True, {})
                for content in (PROBE, [{"type": "text", "text": PROBE}])
            )
        except TextError:
            return False
        return one == other

    def _before_end(self, text: str) -> str:
        """The prompt up to the end of the message to continue; a template that trims messages trims its end."""
        before, mark, after = text.rpartition(END)
        if not mark:
            raise TextError("the chat template leaves out the end of the message to continue", where=str(self._folder))
        return before if after.startswith(" ") else before.rstrip()


def find_templates(folder: Path) -> dict[str, tuple[str, str]]:
    """Templates by name, (source, file): `.jinja` files before `chat_template.json` and `tokenizer_config.json`."""
    found: dict[str, tuple[str, str]] = {}
    for name in ("tokenizer_config.json", "chat_template.json"):
        entry = read_object(folder / name, TextError, missing_ok=True).get("chat_template")
        listed = {DEFAULT: entry} if isinstance(entry, str) else _named(entry, folder / name)
        found |= {key: (source, str(folder / name)) for key, source in listed.items()}
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[file.stem] = (_source(file), str(file))
    file = folder / "chat_template.jinja"
    if file.is_file():
        found[DEFAULT] = (_source(file), str(file))
    return found


def _source(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as wrong:
        raise damaged(file, "a template in UTF-8", wrong, TextError) from wrong


def _named(entry: Any, file: Path) -> dict[str, str]:
    try:
        return {item["name"]: item["template"] for item in entry or ()}
    except (TypeError, KeyError) as wrong:
        raise TextError(
            "chat_template is neither a text nor a list of named templates", where=str(file), found=repr(entry)[:80]
        ) from wrong


def _with_end(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": f"{content}{END} "}
    last = content[-1]
    if last["type"] != "text":
        raise TextError("continue_final needs a message that ends with text", found=f"a part of type {last['type']!r}")
    return {**message, "content": [*content[:-1], {**last, "text": f"{last['text']}{END} "}]}


def _check_options(options: Mapping[str, Any], known: frozenset[str]) -> None:
    for name in options:
        if name not in known:
            raise TextError(
                f"the chat template does not read {name!r}",
                expected=f"one of {', '.join(sorted(known))}" if known else "no options",
                hint=nearest(name, known),
            )
