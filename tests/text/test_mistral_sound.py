"""Sounds in Mistral's prompts: the same ids and samples as mistral-common's, whatever form they are given in."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import soundfile
from mistral_common.protocol.instruct.chunk import AudioChunk, TextChunk
from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.transcription.request import TranscriptionRequest

from zoo.registry.errors import RequestError, TextError
from zoo.text.sound import wav_of
from zoo.text.tokenizer import Tokenizer

Mistral = Callable[[str], Tokenizer]
RATE = 16_000


def tone(seconds: float, rate: int = RATE) -> Any:
    times = numpy.arange(int(seconds * rate)) / rate
    return (0.4 * numpy.sin(2 * numpy.pi * 440 * times)).astype("float32")


def file_of(samples: Any, rate: int = RATE, form: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=form)
    return buffer.getvalue()


@pytest.mark.parametrize("seconds", [0.3, 30.0, 31.0])
@pytest.mark.parametrize("language", [None, "en", "fr"])
def test_transcription_equals_mistral_common(
    seconds: float, language: Any, mistral: Mistral, mistral_common: Callable[[str], Any]
) -> None:
    data = file_of(tone(seconds))
    expected = mistral_common("v7-audio").encode_transcription(
        TranscriptionRequest.model_validate({"audio": data, "language": language})
    )
    prompt = mistral("v7-audio").transcription(data, language)
    assert prompt.ids == expected.tokens
    (ours,), (theirs,) = prompt.sounds, expected.audios
    assert numpy.array_equal(ours, theirs.audio_array)
    assert prompt.ids.count(24) == 375 * -(-len(tone(seconds)) // 480_000)
    assert ("lang:" in prompt.text) == (language is not None)
    assert prompt.text.endswith("[TRANSCRIBE]")


def test_conversations_equal_mistral_common(mistral: Mistral, mistral_common: Callable[[str], Any]) -> None:
    one, two = file_of(tone(0.2)), file_of(tone(0.1, 8000), 8000)
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "audio", "audio": one}, {"type": "text", "text": "Who speaks?"}]},
        {"role": "assistant", "content": "Nobody."},
        {"role": "user", "content": [{"type": "text", "text": "And here?"}, {"type": "audio", "audio": two}]},
    ]
    request: Any = ChatCompletionRequest(
        messages=[
            UserMessage(content=[AudioChunk(input_audio=one), TextChunk(text="Who speaks?")]),
            AssistantMessage(content="Nobody."),
            UserMessage(content=[TextChunk(text="And here?"), AudioChunk(input_audio=two)]),
        ]
    )
    expected = mistral_common("v7-audio").encode_chat_completion(request)
    prompt = mistral("v7-audio").render(messages)
    assert prompt.ids == expected.tokens
    for ours, theirs in zip(prompt.sounds, expected.audios, strict=True):
        assert numpy.array_equal(ours, theirs.audio_array)


def test_every_form_of_a_sound_is_the_same(mistral: Mistral, tmp_path: Path) -> None:
    samples = numpy.round(tone(0.1) * 32767) / 32768  # what sixteen bits can hold
    data, path = file_of(samples), tmp_path / "my sound ü.wav"
    path.write_bytes(data)
    coded = base64.b64encode(data).decode()
    stereo = file_of(numpy.stack([samples, samples], 1), form="FLAC")
    expected = mistral("v7-audio").render([user({"type": "audio", "audio": data})])
    for part in (
        *({"type": "audio", "audio": sound} for sound in (path, str(path), path.as_uri(), stereo, (samples, RATE))),
        {"type": "audio", "audio": f"data:audio/wav;base64,{coded}"},
        {"type": "input_audio", "input_audio": {"data": coded, "format": "wav"}},
        {"type": "input_audio", "input_audio": coded},
        {"type": "audio_url", "audio_url": {"url": path.as_uri()}},
        {"type": "audio_url", "audio_url": f"data:audio/wav;base64,{coded}"},
    ):
        prompt = mistral("v7-audio").render([user(part)])
        assert prompt.ids == expected.ids
        assert numpy.array_equal(prompt.sounds[0], expected.sounds[0])


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [*parts]}


def test_samples_keep_all_of_their_bits() -> None:
    samples = tone(0.01) / 7
    assert numpy.array_equal(soundfile.read(io.BytesIO(wav_of((samples, 44_100))), dtype="float32")[0], samples)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "audio"}, "part 1 is a sound, but has no 'audio'"),
        ({"type": "image", "image": "x"}, "part 1 is an image, which this tokenizer cannot take$"),
        ({"type": "audio", "audio": b""}, r"message 1 \(user\), part 1: the sound is empty; found 0 bytes"),
        ({"type": "audio", "audio": b"x", "format": "wav"}, "not a part of type audio; found type, audio, format"),
        ({"type": "audio", "audio": 7}, "this is no sound; found int; expected a path, an http"),
        ({"type": "input_audio", "input_audio": {"data": "??"}}, r"the sound is not in base64; found '\?\?'"),
        (
            {"type": "input_audio", "input_audio": {"format": "wav"}},
            "the part has no input_audio.*a mapping with 'data'",
        ),
        ({"type": "audio_url", "audio_url": {"uri": "x"}}, "the part has no audio_url.*a mapping with 'url'"),
    ],
)
def test_parts_that_are_no_sounds(part: dict[str, Any], message: str, mistral: Mistral) -> None:
    with pytest.raises((TextError, RequestError), match=message.replace("$", r"\.$")):
        mistral("v7-audio").render([user(part)])


def test_what_the_format_cannot_express(mistral: Mistral) -> None:
    sound = {"type": "audio", "audio": file_of(tone(0.1))}
    with pytest.raises(TextError, match=r"part 1 is a sound, which this tokenizer cannot take: it reads text only"):
        mistral("v7-tekken").render([user(sound)])
    with pytest.raises(TextError, match=r"no tokens for sound.*v7 without `audio` in its file"):
        mistral("v7-tekken").transcription(file_of(tone(0.1)))
    with pytest.raises(TextError, match="which only a user's message may hold"):
        mistral("v7-audio").render([user(sound), {"role": "assistant", "content": [sound]}, user(sound)])
    with pytest.raises(TextError, match=r"cannot express the conversation; found Found system messages"):
        mistral("v7-audio").render([{"role": "system", "content": "Be short."}, user(sound)])
    with pytest.raises(RequestError, match=r"language: unknown language; found 'english'; expected two letters"):
        mistral("v7-audio").transcription(file_of(tone(0.1)), "english")
