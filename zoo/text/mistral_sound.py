"""Sounds in Mistral's prompts: as parts of messages, and as requests for a transcription. By mistral-common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zoo.attached import from_base64
from zoo.registry.errors import RequestError, TextError
from zoo.text.sound import wav_of

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.base import Tokenized

    from zoo.text.mistral import MistralCodec

KINDS = ("audio", "input_audio", "audio_url")


def check_sounds(codec: MistralCodec, where: str) -> None:
    """Raises TextError for a tokenizer file without tokens for sound."""
    if codec.library.instruct_tokenizer.audio_encoder is None:
        raise TextError(
            "the model's tokenizer has no tokens for sound",
            where=where,
            found=f"Mistral's tokenizer {codec.version} without `audio` in its file",
            hint="`zoo list audio` shows the models that hear",
        )


def sound_part(part: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A message's part that is a sound, as mistral-common takes it.

    {"type": "audio", "audio": sound} holds whatever `wav_of` reads. The others are OpenAI's and mistral-common's own:
    {"type": "input_audio", "input_audio": {"data": base64, "format": ...}}, and "audio_url" with {"url": ...} in it.
    """
    kind = part["type"]
    if set(part) != {"type", kind}:
        raise RequestError(
            f"not a part of type {kind}", where=where, found=", ".join(part), expected=f"type and {kind}"
        )
    return {"type": "input_audio", "input_audio": wav_of(_source(kind, part[kind], where), where)}


def _source(kind: str, given: Any, where: str) -> Any:
    if kind == "audio":
        return given
    key = "data" if kind == "input_audio" else "url"
    value = given.get(key) if isinstance(given, Mapping) else given
    if kind == "input_audio" and isinstance(value, str) and not value.startswith("data:"):
        return from_base64(value, "sound", where)
    if not isinstance(value, str | bytes):
        expected = f"a text, or a mapping with {key!r}"
        raise RequestError(f"the part has no {kind}", where=where, found=repr(given)[:60], expected=expected)
    return value


def transcription(codec: MistralCodec, sound: Any, language: str | None) -> Tokenized:
    """The prompt that asks for what is said in a sound; language: two letters, or None to let the model find out."""
    check_sounds(codec, "transcription")
    from mistral_common.exceptions import MistralCommonException
    from mistral_common.protocol.transcription.request import TranscriptionRequest
    from pydantic import ValidationError

    wave = wav_of(sound)
    try:
        request: Any = TranscriptionRequest.model_validate({"audio": wave, "language": language})
    except ValidationError:
        raise RequestError(
            "unknown language", where="language", found=repr(language), expected="two letters, such as en, or None"
        ) from None
    try:
        encoded: Tokenized = codec.library.encode_transcription(request)
    except MistralCommonException as refusal:
        raise TextError(
            f"Mistral's tokenizer {codec.version} cannot ask for a transcription", found=str(refusal)
        ) from refusal
    return encoded
