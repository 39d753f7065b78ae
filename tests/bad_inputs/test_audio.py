"""Sounds as users have them, before a small model that hears and before models that do not."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy
import pytest
import soundfile
import torch

import zoo
from zoo.components.audio.spectrogram import spectrogram
from zoo.registry.errors import FetchError, RequestError, TextError, ZooError

if TYPE_CHECKING:
    from tests.bad_inputs.conftest import Desk
    from zoo.model import Model

RATE, AUDIO, ROWS = 16_000, 24, 375
Ask = Callable[["Model"], Any]


def wave(seconds: float = 0.5, rate: int = RATE, channels: int = 1, form: str = "WAV") -> bytes:
    times = numpy.arange(int(seconds * rate)) / rate
    tone = 0.4 * numpy.sin(2 * numpy.pi * 440 * times)
    buffer = io.BytesIO()
    soundfile.write(buffer, tone if channels == 1 else numpy.stack([tone] * channels, 1), rate, format=form)
    return buffer.getvalue()


def card_in(folder: Path) -> dict[str, Any]:
    """A card like Voxtral's, with few and small layers."""
    norm = {"kind": "rms", "eps": 1e-5}
    audio = {"kind": "whisper", "token": AUDIO, "dim": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": 12}
    audio |= {"num_mel_bins": 128, "positions": 1500, "stack": 4, "norm": {"kind": "layer", "eps": 1e-5}}
    mixer = {"kind": "attention", "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "rope": {"theta": 1e4}}
    layers = [{"repeat": 2, "mixer": mixer, "ffn": {"kind": "gated", "hidden_dim": 24}}]
    return {
        "name": "listener",
        "context_length": 1000,
        "source": {"path": str(folder)},
        "text": {"tokenizer": {"kind": "mistral", "version": "v7"}, "chat": "mistral", "features": ["chat", "audio"]},
        "model": {"dim": 16, "vocab_size": 1400, "norm": norm, "audio": audio, "layers": layers},
    }


@pytest.fixture(scope="module")
def listener(tekken: Callable[[str, int], Path]) -> Iterator[Model]:
    folder = tekken("v7-audio", 1400)
    with zoo.load(card_in(folder), weights="random", device="cpu", dtype="float32") as model:
        yield model


def part(sound: Any) -> dict[str, Any]:
    return {"type": "audio", "audio": sound}


def say(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts]}]


TEXT = {"type": "text", "text": "Who speaks?"}
FORMATS = "expected WAV, FLAC, Ogg, MP3 or another format of libsndfile"

FAULTS: dict[str, tuple[Ask, type[ZooError], str]] = {
    "no such file": (
        lambda m: m.transcribe("none.wav"),
        RequestError,
        "audio: the sound cannot be read; found none.wav (No such file or directory); expected a path, an http",
    ),
    "a folder": (lambda m: m.transcribe(Path()), RequestError, "audio: the sound cannot be read; found . (Is a direct"),
    "a sound without its list": (
        lambda m: m.generate("Who speaks?", audio="a.wav"),
        RequestError,
        "audio: sounds are given as a list; found str; expected [sound, ...]",
    ),
    "a number for sounds": (
        lambda m: m.logits([1, AUDIO], audio=cast(Any, 5)),
        RequestError,
        "audio: sounds are given as a list; found int",
    ),
    "a text file": (
        lambda m: m.transcribe(b"This is no sound at all, but a text."),
        RequestError,
        f"audio: this is not a sound that can be read; found Format not recognised.; {FORMATS}",
    ),
    "a file that was cut": (lambda m: m.transcribe(wave()[:30]), RequestError, "this is not a sound that can be read"),
    "no bytes": (lambda m: m.transcribe(b""), RequestError, "audio: the sound is empty; found 0 bytes"),
    "no samples": (lambda m: m.transcribe(wave(0)), RequestError, "audio: the sound is empty; found no samples"),
    "samples that are no numbers": (
        lambda m: m.transcribe((numpy.full(9, numpy.nan), RATE)),
        RequestError,
        "audio: the sound has samples that are not finite",
    ),
    "samples without a rate": (
        lambda m: m.transcribe(numpy.zeros(9)),
        RequestError,
        "audio: this is no sound; found ndarray; expected a path, an http, https or data: address, a file's bytes",
    ),
    "two channels of samples": (
        lambda m: m.transcribe((numpy.zeros((9, 2)), RATE)),
        RequestError,
        "audio: not the samples of a sound; found an array (9, 2) and 16000; expected one channel and its rate",
    ),
    "an address of nothing": (
        lambda m: m.transcribe("http://127.0.0.1:9/a.wav"),
        FetchError,
        "audio: the sound's address gives no sound; found http://127.0.0.1:9/a.wav: ",
    ),
    "a language by its name": (
        lambda m: m.transcribe(wave(), language="English"),
        RequestError,
        "language: unknown language; found 'English'; expected two letters, such as en, or None",
    ),
    "an unknown option": (lambda m: m.transcribe(wave(), lang="en"), RequestError, "lang: unknown option"),
    "a sound in a message that is broken": (
        lambda m: m.chat(say(part(wave()), part(b"x"), TEXT)),
        RequestError,
        "message 1 (user), part 2: this is not a sound that can be read",
    ),
    "a sound and a system message": (
        lambda m: m.chat([{"role": "system", "content": "Be short."}, *say(part(wave()))]),
        TextError,
        "Mistral's tokenizer v7 cannot express the conversation; found Found system messages at indexes [0] and audio",
    ),
    "a sound beside messages": (
        lambda m: m.generate(say(TEXT), audio=[wave()]),
        RequestError,
        'sounds beside messages have no place; found 1 and a list of messages; expected parts of a message: {"type"',
    ),
    "a sound beside raw text": (
        lambda m: m.generate("Who?", raw=True, audio=[wave()]),
        RequestError,
        "the prompt's sound tokens are not those of its sounds; found 0 tokens of id 24 for 1 sound",
    ),
    "ids without their sound": (
        lambda m: m.generate([1, AUDIO, 4]),
        RequestError,
        "found 1 tokens of id 24 for 0 sounds",
    ),
    "a spectrogram of another length": (
        lambda m: m.logits([1, AUDIO], audio=[torch.zeros(128, 100)]),
        RequestError,
        "another shape than this model's spectrograms; found (128, 100); expected (128, frames), a multiple of 3000",
    ),
    "a sound longer than the context": (
        lambda m: m.transcribe(wave(61)),
        RequestError,
        "the prompt is longer than the context; found 1130 tokens; expected at most 1000",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault(name: str, listener: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call, error, words = FAULTS[name]
    with pytest.raises(ZooError) as caught:
        call(listener)
    assert type(caught.value) is error
    assert words in str(caught.value)
    assert not listener.engine.busy


WORKS: dict[str, Any] = {
    "two channels": wave(channels=2),
    "six channels": wave(channels=6),
    "a low rate": wave(rate=8_000),
    "an odd rate": wave(rate=11_025),
    "a high rate": wave(rate=96_000),
    "FLAC": wave(form="FLAC"),
    "Ogg": wave(form="OGG"),
    "MP3": wave(form="MP3"),
    "one sample": (numpy.zeros(1), RATE),
    "half a minute to the sample": (numpy.zeros(480_000), RATE),
    "one sample more": (numpy.zeros(480_001), RATE),
}


@pytest.mark.parametrize("name", WORKS)
def test_works(name: str, listener: Model) -> None:
    answer = listener.transcribe(WORKS[name], max_tokens=3, ignore_eos=True)
    assert len(answer.tokens) == 3
    chunks = 2 if name == "one sample more" else 1
    assert answer.usage.prompt_tokens == ROWS * chunks + 5


def test_every_way_to_ask_is_the_same(listener: Model) -> None:
    """A question on a sound as messages, as a text with a sound, as ids with a spectrogram; streamed; in a batch."""
    options: dict[str, Any] = {"max_tokens": 6, "logprobs": 0, "ignore_eos": True}
    asked = listener.chat(say(part(wave()), TEXT), **options)
    samples = torch.from_numpy(soundfile.read(io.BytesIO(wave()), dtype="float32")[0])
    assert listener.module.spec.audio is not None
    mel = spectrogram(samples, listener.module.spec.audio)  # type: ignore[arg-type]
    others = [
        listener.generate("Who speaks?", audio=[wave()], **options)[0],
        listener.generate(asked.prompt_ids, audio=[mel], **options)[0],
        listener.generate(asked.prompt_ids, audio=[wave()], **options)[0],
        listener.generate(["Who speaks?", "Who listens?"], audio=[wave()], **options)[0],
        [*listener.stream("Who speaks?", audio=[wave()], **options)][-1].completion,
        [*listener.stream_chat(say(part(wave()), TEXT), **options)][-1].completion,
    ]
    for other in others:
        assert other is not None
        assert (other.prompt_ids, other.tokens) == (asked.prompt_ids, asked.tokens)
        assert other.logprobs == pytest.approx(asked.logprobs, abs=1e-4)
    assert [*listener.stream_transcribe(wave(), max_tokens=4)][-1].completion is not None
    heard = [listener.logits(asked.prompt_ids, audio=[sound]) for sound in (mel, mel.flip(1))]
    assert torch.equal(heard[0][:3], heard[1][:3])
    assert not torch.allclose(heard[0][-1], heard[1][-1])


def test_the_language_is_a_part_of_the_prompt(listener: Model) -> None:
    plain, english = (listener.transcribe(wave(), language=language, max_tokens=1) for language in (None, "en"))
    assert len(english.prompt_ids) > len(plain.prompt_ids)


DEAF = "this model does not hear; found a sound; expected text or token ids. `zoo list audio` shows the models that do"


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.transcribe(wave()),
        lambda model: model.generate("Hello", audio=[wave()]),
        lambda model: model.generate([1, 5], audio=[wave()]),
        lambda model: model.logits([1, 5], audio=[wave()]),
        lambda model: next(model.stream("Hello", audio=[wave()])),
    ],
)
def test_models_that_do_not_hear_say_so(call: Ask, opened: Callable[[str], Model]) -> None:
    with pytest.raises(RequestError) as caught:
        call(opened("v7-tekken"))
    assert DEAF in str(caught.value)
    with pytest.raises(TextError, match=r"part 1 is a sound, which this tokenizer cannot take: it reads text only"):
        opened("v7-tekken").chat(say(part(wave()), TEXT))


def test_the_commands_say_it_too(desk: Desk) -> None:
    desk.become("v7-tekken")
    Path("a.wav").write_bytes(wave())
    for arguments in (("transcribe", "model", "a.wav"), ("run", "model", "--audio", "a.wav", "--prompt", "Who?")):
        found = desk.command(*arguments, "--device", "cpu", "--dtype", "float32")
        assert (found.code, found.out) == (2, "")
        assert DEAF in found.err
    found = desk.command("run", "model", "--raw", "--audio", "a.wav", "--prompt", "Who?")
    assert "--audio needs the chat format; found --raw as well" in found.err


def test_a_sounds_address_is_not_asked_offline(listener: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_OFFLINE", "1")
    with pytest.raises(
        FetchError, match=r"audio: a sound's address cannot be asked offline; found ZOO_OFFLINE=1, http"
    ):
        listener.transcribe("http://127.0.0.1:9/a.wav")


def test_the_extra_is_named_where_it_is_missing(listener: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mistral_common.imports.is_soundfile_installed", lambda: False)
    with pytest.raises(RequestError) as caught:
        listener.transcribe(wave())
    assert str(caught.value) == (
        "audio: sounds need packages that are not installed; found no soundfile; expected the extra `audio`. "
        'Install them: pip install "zoo-inference[audio]".'
    )
