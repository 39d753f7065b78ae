"""Whisper's encoder and spectrogram against transformers', and the count of tokens against mistral-common's."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from mistral_common.tokens.tokenizers.audio import AudioConfig, AudioEncoder, AudioSpectrogramConfig
from pydantic import ValidationError
from transformers.models.whisper.modeling_whisper import sinusoids as their_sinusoids

from zoo.components.audio.spec import SAMPLING_RATE, WhisperSpec
from zoo.components.audio.spectrogram import spectrogram
from zoo.components.audio.whisper import sinusoids
from zoo.components.build import build
from zoo.components.norm.spec import LayerNormSpec
from zoo.registry.errors import RequestError
from zoo.testing import relative_error

NORM = LayerNormSpec(dim=24, eps=1e-5)
SIZES: dict[str, Any] = {"dim": 24, "num_layers": 2, "num_heads": 3, "hidden_dim": 96, "num_mel_bins": 10}
SPEC = WhisperSpec(**SIZES, out_dim=14, token=24, positions=20, stack=4, norm=NORM)
WHOLE = SPEC.model_copy(update={"num_mel_bins": 128, "positions": 1500})

NAMES = {
    "audio_tower.": "",
    "layer_norm": "norm",
    "self_attn_norm": "mixer_norm",
    "final_norm": "ffn_norm",
    "self_attn.": "",
    "out_proj": "o",
    "_proj.": ".",
    "fc1": "up",
    "fc2": "down",
    "multi_modal_projector.linear_1": "projector.in",
    "multi_modal_projector.linear_2": "projector.out",
}


@cache
def theirs() -> Any:
    """transformers' encoder and projector of the same sizes, with random weights."""
    torch.manual_seed(0)
    audio = {
        "model_type": "voxtral_encoder",
        "hidden_size": SPEC.dim,
        "intermediate_size": SPEC.hidden_dim,
        "num_hidden_layers": SPEC.num_layers,
        "num_attention_heads": SPEC.num_heads,
        "num_mel_bins": SPEC.num_mel_bins,
        "max_source_positions": SPEC.positions,
    }
    text = {"model_type": "llama", "hidden_size": SPEC.out_dim, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = transformers.VoxtralConfig(audio_config=audio, text_config=text | {"vocab_size": 30})
    model = transformers.VoxtralForConditionalGeneration(config).model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2, mean=1.0 if name.endswith("norm.weight") else 0.0)
    table = model.audio_tower.embed_positions.weight
    table.copy_(their_sinusoids(*table.shape))
    return model


@cache
def ours() -> Any:
    """zoo's, with the same weights."""
    module = build(SPEC).to_empty(device="cpu").eval().requires_grad_(False)
    weights = {}
    for name, value in theirs().state_dict().items():
        if name.startswith("language_model.") or "embed_positions" in name:
            continue
        for their, our in NAMES.items():
            name = name.replace(their, our)
        weights[name] = value
    module.load_state_dict(weights)
    return module


def test_rows_equal_transformers() -> None:
    """One sound of a chunk, and one of three whose chunks do not see each other."""
    sounds = [torch.randn(SPEC.num_mel_bins, count * SPEC.chunk_frames) for count in (1, 3)]
    for sound, rows_ND in zip(sounds, ours()(sounds), strict=True):
        chunks = torch.stack(sound.split(SPEC.chunk_frames, 1))
        expected = theirs().get_audio_features(chunks).pooler_output
        assert rows_ND.shape == (SPEC.rows_of(tuple(sound.shape)), SPEC.out_dim) == expected.shape
        assert relative_error(rows_ND, expected) < 1e-4


@pytest.mark.parametrize(("positions", "dim"), [(1500, 1280), (20, 24), (7, 6)])
def test_positions_equal_transformers(positions: int, dim: int) -> None:
    assert torch.equal(sinusoids(positions, dim), their_sinusoids(positions, dim))


@pytest.mark.parametrize("seconds", [0.001, 3.0, 30.0, 30.001, 61.5])
def test_spectrograms_equal_transformers(seconds: float) -> None:
    """Also in their count of rows, which is mistral-common's count of tokens."""
    samples = int(seconds * SAMPLING_RATE)
    sound_N = torch.randn(samples) * torch.linspace(0, 0.3, samples)
    extractor = transformers.WhisperFeatureExtractor(feature_size=128)
    expected = extractor(
        sound_N.numpy(),
        sampling_rate=SAMPLING_RATE,
        padding=True,
        pad_to_multiple_of=WHOLE.chunk_samples,
        truncation=False,
        return_tensors="pt",
    )["input_features"][0]
    found = spectrogram(sound_N, WHOLE)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert WHOLE.rows_of(tuple(found.shape)) == WHOLE.audio_tokens(samples) == _mistral_common_tokens(samples)


@pytest.mark.parametrize("samples", [1, 400, 479_999, 480_000, 480_001, 960_000, 30_000_000])
def test_tokens_equal_mistral_common(samples: int) -> None:
    assert WHOLE.audio_tokens(samples) == _mistral_common_tokens(samples)


def _mistral_common_tokens(samples: int) -> int:
    settings = AudioSpectrogramConfig(num_mel_bins=128, hop_length=160, window_size=400)
    config = AudioConfig(sampling_rate=16_000, frame_rate=12.5, encoding_config=settings, chunk_length_s=30.0)
    encoder = AudioEncoder.__new__(AudioEncoder)
    encoder.audio_config = config
    return config.num_audio_tokens(encoder.next_multiple_of_chunk_frames(samples, 16_000))


def test_the_quietest_band_is_bounded() -> None:
    silent = spectrogram(torch.zeros(5), WHOLE)
    assert silent.unique().tolist() == [-1.5]
    loud = spectrogram(torch.sin(torch.arange(16_000) * 0.3), WHOLE)
    assert loud.max() - loud.min() == pytest.approx(2.0)


OTHER = r"another shape than this model's spectrograms.*\(10, frames\), a multiple of 40"


@pytest.mark.parametrize("shape", [(10,), (9, 40), (10, 0), (10, 41), (10, 20), (1, 10, 40)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match=OTHER):
        SPEC.rows_of(shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_heads": 5}, "multiple of num_heads; found 24 and 5"), ({"stack": 3}, "multiple of stack; found 20 and 3")],
)
def test_sizes_that_do_not_fit(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        WhisperSpec(**SPEC.model_dump() | {"norm": NORM} | change)


@torch.inference_mode()
def test_low_precision_is_close(filled: Callable[..., Any]) -> None:
    sound = torch.randn(SPEC.num_mel_bins, SPEC.chunk_frames)
    (expected,) = filled(SPEC)([sound])
    module = filled(SPEC).bfloat16()
    assert relative_error(module([sound])[0].float(), expected) < 0.05
