"""Sounds as callers give them -> what mistral-common takes: a WAV file of one channel, its samples in float32.

Reading is mistral-common's own, by way of soundfile and soxr, which come with the extra `audio`.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.attached import bytes_of
from zoo.components.audio.spec import SAMPLING_RATE
from zoo.registry.errors import RequestError

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.audio import Audio


def wav_of(sound: Any, where: str = "audio") -> bytes:
    """The sound as a WAV file of one channel, float32, at its own rate; channels are averaged.

    sound: a path, an http(s), file or data URL, a file's bytes, or a pair of samples (one channel) and their rate.
    where: what messages call it. Raises RequestError for what cannot be read, is empty, or needs the extra `audio`,
    and FetchError as `bytes_of`.
    """
    _check_extra(where)
    found = _audio(sound, where)
    import numpy
    import soundfile

    if not len(found.audio_array):
        raise RequestError("the sound is empty", where=where, found="no samples", expected="at least one")
    if not numpy.isfinite(found.audio_array).all():
        raise RequestError("the sound has samples that are not finite", where=where, expected="numbers")
    buffer = io.BytesIO()
    soundfile.write(buffer, found.audio_array, found.sampling_rate, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def samples_of(sound: Any, where: str = "audio") -> Any:
    """Samples (N,) in float32 at SAMPLING_RATE, as mistral-common resamples them; `sound` as `wav_of`."""
    from mistral_common.tokens.tokenizers.audio import Audio

    read = Audio.from_bytes(wav_of(sound, where))
    read.resample(SAMPLING_RATE)
    return read.audio_array


def _check_extra(where: str) -> None:
    from mistral_common.imports import is_soundfile_installed, is_soxr_installed

    parts = {"soundfile": is_soundfile_installed(), "soxr": is_soxr_installed()}
    missing = [name for name, there in parts.items() if not there]
    if missing:
        raise RequestError(
            "sounds need packages that are not installed",
            where=where,
            found=f"no {' and no '.join(missing)}",
            expected="the extra `audio`",
            hint='install them: pip install "zoo-inference[audio]"',
        )


def _audio(sound: Any, where: str) -> Audio:
    if isinstance(sound, tuple) and len(sound) == 2:
        return _of_samples(*sound, where)
    # A message on what a file holds names the file.
    named = str(sound) if isinstance(sound, str | Path) and not str(sound).startswith("data:") else where
    return _decoded(bytes_of(sound, "sound", where), named)


def _of_samples(samples: Any, rate: Any, where: str) -> Audio:
    import numpy
    from mistral_common.tokens.tokenizers.audio import Audio

    values = numpy.asarray(samples, dtype=numpy.float32)
    if values.ndim != 1 or not isinstance(rate, int) or rate < 1:
        found = f"an array {values.shape} and {rate!r}"
        raise RequestError("not the samples of a sound", where=where, found=found, expected="one channel and its rate")
    return Audio(values, rate, "wav")


def _decoded(data: bytes, where: str) -> Audio:
    from mistral_common.tokens.tokenizers.audio import Audio

    if not data:
        raise RequestError("the sound is empty", where=where, found="0 bytes", expected="a sound file")
    try:
        return Audio.from_bytes(data, strict=False)
    except (RuntimeError, ValueError) as refusal:
        raise RequestError(
            "this is not a sound that can be read",
            where=where,
            found=getattr(refusal, "error_string", None) or " ".join(str(refusal).split())[:200],
            expected="WAV, FLAC, Ogg, MP3 or another format of libsndfile",
        ) from None
