"""From samples to the spectrogram that Whisper's encoders read."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from zoo.components.audio.spec import HOP, SAMPLING_RATE, WINDOW, WhisperSpec

FLOOR = 1e-10
"""Least energy of a band, so that it has a logarithm."""

DEPTH = 8.0
"""How many powers of ten below the loudest band of a sound the quietest is taken for."""


def spectrogram(samples_N: Tensor, spec: WhisperSpec) -> Tensor:
    """(num_mel_bins, frames) in float32 of mono samples at SAMPLING_RATE, silence added up to whole chunks.

    Energies of a short-time Fourier transform in mel bands, as logarithms bounded below by what is DEPTH under the
    loudest of the whole sound (whisper: audio.py, log_mel_spectrogram).
    """
    samples_N = samples_N.float()
    missing = -len(samples_N) % spec.chunk_samples
    samples_N = torch.nn.functional.pad(samples_N, (0, missing))
    window_N = torch.hann_window(WINDOW, device=samples_N.device)
    waves = torch.stft(samples_N, WINDOW, HOP, window=window_N, return_complex=True)
    energies = waves[:, :-1].abs().square()
    bands = mel_bands(spec.num_mel_bins).to(samples_N.device) @ energies
    logs = bands.clamp(min=FLOOR).log10()
    return (logs.maximum(logs.max() - DEPTH) + 4.0) / 4.0


@cache
def mel_bands(count: int) -> Tensor:
    """(count, frequencies) weights of mel bands from 0 to half of the sampling rate, on Slaney's scale and with his
    norm, as mistral-common makes them."""
    from mistral_common.audio import mel_filter_bank

    bins = WINDOW // 2 + 1
    weights = mel_filter_bank(bins, count, 0.0, SAMPLING_RATE / 2, SAMPLING_RATE)
    return torch.from_numpy(weights.T.astype("float32"))
