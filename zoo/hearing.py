"""From sounds as callers give them to what a model's encoder takes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.components.audio.spec import WhisperSpec
from zoo.components.audio.spectrogram import spectrogram
from zoo.engine.request import Media
from zoo.registry.errors import RequestError
from zoo.registry.plan import Plan
from zoo.text.sound import samples_of

NODE = "audio"
"""The encoder's node in a card."""


def encoder_of(plan: Plan) -> WhisperSpec:
    """The model's encoder of sounds. Raises RequestError for a model without one."""
    encoder = getattr(plan.model, NODE)
    if not isinstance(encoder, WhisperSpec):
        raise RequestError(
            "this model does not hear",
            where=plan.card.name,
            found="a sound",
            expected="text or token ids",
            hint="`zoo list audio` shows the models that do",
        )
    return encoder


def of_prompt(samples: Sequence[Any], plan: Plan) -> list[Media]:
    """The sounds of a rendered prompt, float arrays (N,) at the encoder's rate, as its spectrograms."""
    return [Media(NODE, spectrogram(torch.from_numpy(one), encoder_of(plan))) for one in samples]


def beside_ids(sounds: Sequence[Any], plan: Plan) -> list[Media]:
    """Sounds for the places of token ids: a tensor is a spectrogram already, all else is read as `samples_of` does."""
    return [
        Media(NODE, sound) if isinstance(sound, Tensor) else of_prompt([samples_of(sound)], plan)[0] for sound in sounds
    ]


def user_message(text: str, sounds: Sequence[Any] = ()) -> dict[str, Any]:
    """A user's turn: sounds, then the text, if there is any."""
    if not sounds:
        return {"role": "user", "content": text}
    parts: list[dict[str, Any]] = [{"type": "audio", "audio": sound} for sound in sounds]
    return {"role": "user", "content": [*parts, *([{"type": "text", "text": text}] if text else [])]}


def refuse_loose(sounds: Sequence[Any]) -> None:
    """Raises RequestError for sounds beside messages, which do not say where they belong."""
    if sounds:
        raise RequestError(
            "sounds beside messages have no place",
            where="audio",
            found=f"{len(sounds)} and a list of messages",
            expected='parts of a message: {"type": "audio", "audio": ...}',
        )
