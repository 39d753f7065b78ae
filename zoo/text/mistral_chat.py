"""Mistral's chat format: conversations to ids by mistral-common, as the tokenizer's version has it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from zoo.images.messages import pictures_of
from zoo.images.picture import Picture
from zoo.registry.errors import TextError, nearest
from zoo.text import mistral_pictures, mistral_sound
from zoo.text.answer import AnswerForm
from zoo.text.conversation import check_messages, fault
from zoo.text.detokenize import decode
from zoo.text.mistral import MistralCodec
from zoo.text.spec import MistralChatSpec
from zoo.text.tokenizer import Message, Prompt
from zoo.text.tools import check_tools, short_id

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.base import Tokenized

WITHOUT_TOOLS = ("v1",)
SHORT_IDS = ("v3", "v7", "v11")
NEEDS_IDS = ("v3", "v7", "v11", "v13", "v15")
OPTIONS = ("reasoning_effort",)
THINKING_IDS = ("v13", "v15")


class MistralChat:
    """Renders to ids, never by way of text, so that nothing written in a message becomes a control id."""

    def __init__(self, codec: MistralCodec) -> None:
        self._codec = codec

    @classmethod
    def open(cls, spec: MistralChatSpec, codec: Any, folder: Path) -> Self:
        """Raises TextError for a tokenizer of another kind: this format exists only inside mistral-common."""
        if not isinstance(codec, MistralCodec):
            raise TextError(
                "the chat format 'mistral' needs a tokenizer of kind 'mistral'",
                where=str(folder),
                found=f"tokenizer kind {codec.kind!r}",
                hint="write `chat: template` in the card to use the checkpoint's own template",
            )
        return cls(codec)

    def end_ids(self) -> frozenset[int]:
        return self._codec.eos_ids

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        continue_final: bool,
        merge: bool,
        options: Mapping[str, Any],
    ) -> Prompt:
        hears = self._codec.library.instruct_tokenizer.audio_encoder is not None
        checked = check_messages(
            messages, continue_final=continue_final, merge=merge, takes=mistral_sound.KINDS if hears else ()
        )
        self._check_options(options)
        definitions = self._tools(tools, checked)
        addressed = mistral_pictures.as_addresses(self._codec, checked)
        encoded = self._encode(
            [self._message(*item) for item in enumerate(addressed, 1)], definitions, continue_final, options
        )
        plain = self._codec.version not in THINKING_IDS and not continue_final
        form = AnswerForm(thinking=plain)
        return self._prompt(encoded, pictures_of(checked), continues=continue_final, form=form)

    def transcription(self, sound: Any, language: str | None) -> Prompt:
        """The prompt that asks for what is said in a sound. Raises TextError for a tokenizer without sound."""
        return self._prompt(mistral_sound.transcription(self._codec, sound, language))

    def _prompt(self, encoded: Tokenized, pictures: Sequence[Picture] = (), **details: Any) -> Prompt:
        ids, images = [*encoded.tokens], tuple(pictures[int(number)] for number in encoded.images)
        sounds = tuple(audio.audio_array for audio in encoded.audios)
        return Prompt(ids, lambda: decode(self._codec, ids, special=True), images, sounds, **details)

    def _check_options(self, options: Mapping[str, Any]) -> None:
        for name in options:
            if name not in OPTIONS:
                raise TextError(
                    f"unknown option {name!r} of the chat format 'mistral'",
                    expected=f"one of {', '.join(OPTIONS)}",
                    hint=nearest(name, OPTIONS),
                )

    def _tools(self, tools: Any, messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
        definitions = check_tools(tools)
        uses = any(message["role"] == "tool" or "tool_calls" in message for message in messages)
        if self._codec.version in WITHOUT_TOOLS and (definitions or uses):
            raise TextError(f"Mistral's tokenizer {self._codec.version} has no tools", expected="v2 or newer")
        return definitions

    def _message(self, number: int, message: dict[str, Any]) -> dict[str, Any]:
        """The message in mistral-common's terms: arguments as JSON text, call ids as the version demands."""
        ready = dict(message)
        if isinstance(message.get("content"), list):
            ready["content"] = [self._part(number, message, *item) for item in enumerate(message["content"], 1)]
        if "tool_calls" in message:
            ready["tool_calls"] = [self._call(number, message, call) for call in message["tool_calls"]]
        if message["role"] == "tool":
            ready["tool_call_id"] = self._id(number, message, message.get("tool_call_id"))
        return ready

    def _part(self, number: int, message: dict[str, Any], place: int, part: dict[str, Any]) -> dict[str, Any]:
        where = f"message {number} ({message['role']}), part {place}"
        return mistral_sound.sound_part(part, where) if part["type"] in mistral_sound.KINDS else part

    def _call(self, number: int, message: dict[str, Any], call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        ready: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        name = self._id(number, message, call.get("id"))
        return ready if name is None else ready | {"id": name}

    def _id(self, number: int, message: dict[str, Any], name: str | None) -> str | None:
        version = self._codec.version
        if name is None and version in NEEDS_IDS:
            field = "tool_call_id" if message["role"] == "tool" else "id of the tool call"
            raise fault(number, message, f"the {field} is missing, which Mistral's tokenizer {version} needs")
        return short_id(name) if name is not None and version in SHORT_IDS else name

    def _encode(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        continue_final: bool,
        options: Mapping[str, Any],
    ) -> Tokenized:
        from mistral_common.exceptions import MistralCommonException
        from mistral_common.protocol.instruct.request import ChatCompletionRequest

        try:
            request: Any = ChatCompletionRequest.from_openai(
                messages, tools, continue_final_message=continue_final, **options
            )
            encoded: Tokenized = self._codec.library.encode_chat_completion(request)
        except (MistralCommonException, ValueError, AssertionError, NotImplementedError) as refusal:
            raise TextError(
                f"Mistral's tokenizer {self._codec.version} cannot express the conversation", found=_reason(refusal)
            ) from refusal
        return encoded


def _reason(refusal: Exception) -> str:
    """mistral-common's reason in one line; pydantic's address lines are dropped."""
    lines = [line.strip() for line in str(refusal).splitlines() if "errors.pydantic.dev" not in line]
    return " ".join(line for line in lines if line)[:300] or type(refusal).__name__
