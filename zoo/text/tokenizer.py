"""What a tokenizer is to the rest of zoo, and how a card's tokenizer and chat format are opened from a folder."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

from zoo.images.picture import Picture
from zoo.registry.errors import TextError
from zoo.registry.spec import Spec
from zoo.text.answer import PLAIN, AnswerForm
from zoo.text.detokenize import Vocabulary, decode
from zoo.text.pictures import PictureIds
from zoo.text.stop_ids import configured_stop_ids
from zoo.text.unicode import check_text

Message = Mapping[str, Any]
NO_OPTIONS: Mapping[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the model reads it.

    ids: token ids, the beginning-of-sequence id included. shown: makes `text`, which few callers want.
    images: pictures in the order of their places in `ids`.
    sounds: the same of sounds, float arrays (samples,) of one channel at 16 kHz.
    continues: what is generated goes on from the prompt's last word (see `Detokenizer`).
    form: how the answer to it is to be read.
    """

    ids: list[int]
    shown: Callable[[], str] = field(repr=False, compare=False)
    images: tuple[Picture, ...] = ()
    sounds: tuple[Any, ...] = ()
    continues: bool = False
    form: AnswerForm = PLAIN

    @property
    def text(self) -> str:
        """The prompt for people, control tokens by name."""
        return self.shown()


class Codec(Protocol):
    """One kind of tokenizer: the target of a tokenizer Spec's `module`."""

    kind: str
    version: str
    notes: tuple[str, ...]

    @classmethod
    def open(cls, spec: Any, folder: Path) -> Self: ...
    @property
    def vocabulary(self) -> Vocabulary: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_ids(self) -> frozenset[int]: ...
    def encode(self, text: str, *, bos: bool) -> list[int]: ...
    def fill(self, prefix: str, suffix: str) -> list[int]: ...
    def control_id(self, name: str) -> int | None:
        """The id of a control token, such as [IMG]; None where the tokenizer has none of that name."""


class ChatFormat(Protocol):
    """One kind of chat format: the target of a chat Spec's `module`."""

    @classmethod
    def open(cls, spec: Any, codec: Any, folder: Path) -> Self: ...

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        continue_final: bool,
        merge: bool,
        options: Mapping[str, Any],
    ) -> Prompt: ...

    def end_ids(self) -> frozenset[int]:
        """The control ids that end an assistant's turn."""


@runtime_checkable
class Transcribing(Protocol):
    """A chat format that can also ask for what is said in a sound."""

    def transcription(self, sound: Any, language: str | None) -> Prompt: ...


class Tokenizer:
    """A checkpoint's tokenizer with its chat format.

    kind, version: as in the card, for example "mistral" and "v3". notes: choices to tell the user.
    stop_ids: ids that end a generation, the union of the tokenizer's own end of sequence, `eos_token_id` of
    `generation_config.json` and of `config.json`, and the control ids with which the chat format ends a turn.
    """

    def __init__(self, codec: Codec, chat: ChatFormat, stop_ids: frozenset[int]) -> None:
        self._codec, self._chat = codec, chat
        self.kind, self.version, self.notes = codec.kind, codec.version, codec.notes
        self.vocabulary = codec.vocabulary
        self.vocab_size = codec.vocabulary.size
        self.bos_id = codec.bos_id
        self.stop_ids = stop_ids

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Ids of raw text, after the ids that the tokenizer puts before every text (never a doubled one)."""
        check_text(text)
        return self._codec.encode(text, bos=bos)

    def decode(self, ids: Iterable[int], *, special: bool = False, continues: bool = False) -> str:
        """The text of `ids`. `special` writes control ids by name; `continues` keeps the first space."""
        return decode(self, ids, special=special, continues=continues)

    def piece(self, token: int) -> str:
        """One id for people: a control id's name, else its text with `▁` for a space and `<0xE4>` for a lone byte."""
        name = self.vocabulary.control(token)
        return readable(self.vocabulary.surface(token, False)) if name is None else name

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final: bool = False,
        merge: bool = False,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> Prompt:
        """A conversation as the prompt for the assistant's next turn.

        messages: dicts with `role` (system, user, assistant, tool) and `content` (a text or a list of parts),
            in OpenAI's form, also for `tool_calls`, `tool_call_id` and `tools`. A part that is an image has been
            opened by then: `{"type": "picture", "picture": Picture}`.
        continue_final: the last message is an assistant's and is continued.
        merge: consecutive messages of one role are joined by an empty line; they are refused otherwise.
        options: settings of the chat format, such as `reasoning_effort` (Mistral v15) or a template's variables.
        Text in messages never becomes control ids. Raises TextError naming the message at fault.
        """
        if not isinstance(options, Mapping):
            expected = 'a dict such as {"reasoning_effort": "high"}'
            raise TextError("not settings", where="chat_options", found=repr(options), expected=expected)
        return self._chat.render(messages, tools=tools, continue_final=continue_final, merge=merge, options=options)

    def fill(self, prefix: str, suffix: str) -> list[int]:
        """Ids that ask for the text between `prefix` and `suffix`. Raises TextError if there is no such layout."""
        check_text(prefix, "prefix")
        check_text(suffix, "suffix")
        return self._codec.fill(prefix, suffix)

    def transcription(self, sound: Any, language: str | None = None) -> Prompt:
        """The prompt that asks for what is said in a sound (see zoo.text.sound), in a language of two letters or any.

        Raises TextError if there is no such prompt, RequestError for a sound that cannot be read.
        """
        if not isinstance(self._chat, Transcribing):
            raise TextError("the model's chat format cannot ask for a transcription", expected="a model that hears")
        return self._chat.transcription(sound, language)

    def show(self, pictures: Sequence[Picture], text: str) -> Prompt:
        """Raw text after pictures. Raises TextError for a tokenizer that cannot write images."""
        ids, bos = self.encode(text), self.encode(text, bos=False)
        picture_ids = PictureIds.of(self._codec.control_id)
        shown = [number for picture in pictures for number in picture_ids.row(picture.columns, picture.rows)]
        first = len(ids) - len(bos)
        whole = [*ids[:first], *shown, *ids[first:]]
        return Prompt(whole, lambda: self.decode(whole, special=True), tuple(pictures), continues=True)


class NoChat:
    """The chat format of a base model."""

    @classmethod
    def open(cls, spec: Any, codec: Any, folder: Path) -> Self:
        return cls()

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        continue_final: bool,
        merge: bool,
        options: Mapping[str, Any],
    ) -> Prompt:
        raise TextError(
            "this is a base model without a chat format: it cannot take messages",
            hint="send raw text, or name a chat format in the card (text.chat)",
        )

    def end_ids(self) -> frozenset[int]:
        return frozenset()


def open_tokenizer(spec: Spec, chat: Spec | None, folder: Path, *, vocab_size: int | None = None) -> Tokenizer:
    """Open the tokenizer files of a checkpoint's `folder` as the card's Specs say.

    vocab_size: rows of the model's embedding; a tokenizer with more ids is refused, one with fewer is usual.
    Raises TextError: no such file, another version than the card's, a damaged file, ids that the model lacks.
    """
    codec: Codec = _component(spec).open(spec, folder)
    size = codec.vocabulary.size
    if vocab_size is not None and size > vocab_size:
        raise TextError(
            "the tokenizer does not fit the model: some of its ids have no embedding",
            where=str(folder),
            found=f"{size} token ids for a vocabulary of {vocab_size}",
            hint="use the tokenizer that belongs to these weights",
        )
    form: ChatFormat = NoChat() if chat is None else _component(chat).open(chat, codec, folder)
    return Tokenizer(codec, form, codec.eos_ids | configured_stop_ids(folder) | form.end_ids())


def _component(spec: Spec) -> Any:
    return pkgutil.resolve_name(spec.module)


def readable(data: bytes) -> str:
    """Bytes for people: spaces as `▁`, line ends and other unprintable characters escaped, broken bytes as `<0xE4>`."""
    text = data.decode(errors="surrogateescape").replace(" ", "▁")
    return "".join(_shown(char) for char in text)


def _shown(char: str) -> str:
    if "\udc80" <= char <= "\udcff":
        return f"<0x{ord(char) - 0xDC00:02X}>"
    return char if char.isprintable() else char.encode("unicode_escape").decode()
