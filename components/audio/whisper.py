"""Whisper's encoder, each chunk of a sound on its own, and the step from its positions to the decoder's rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.components.audio.spec import KERNEL, STRIDE, WhisperBlockSpec, WhisperSpec
from zoo.components.build import make
from zoo.components.linear import Linear


class Whisper(nn.Module):
    """Two convolutions, positions, blocks, norm, projector (whisper: model.py, AudioEncoder)."""

    def __init__(self, spec: WhisperSpec) -> None:
        super().__init__()
        self.spec = spec
        self.conv1 = nn.Conv1d(spec.num_mel_bins, spec.dim, KERNEL, padding=KERNEL // 2)
        self.conv2 = nn.Conv1d(spec.dim, spec.dim, KERNEL, stride=STRIDE, padding=KERNEL // 2)
        children = spec.children()
        self.layers = nn.ModuleList(make(children[f"layers.{i}"]) for i in range(spec.num_layers))
        self.norm = make(children["norm"])
        self.projector = make(children["projector"])

    def forward(self, sounds: Sequence[Tensor]) -> list[Tensor]:
        """Spectrograms, (bands, frames) in whole chunks, to (N, D) rows each."""
        return [self._sound(mel) for mel in sounds]

    def _sound(self, mel: Tensor) -> Tensor:
        # One chunk after the other: they do not see each other, and one fills the device.
        chunks = [self._chunk(chunk) for chunk in mel.split(self.spec.chunk_frames, 1)]
        stacked_NI = torch.cat(chunks).view(-1, self.spec.stack * self.spec.dim)
        rows_ND: Tensor = self.projector(stacked_NI, [])
        return rows_ND

    def _chunk(self, mel: Tensor) -> Tensor:
        """(bands, frames of a chunk) to (T, D), a row for each position."""
        seen = F.gelu(self.conv1(mel.to(self.conv1.weight)[None]))
        x_TD = F.gelu(self.conv2(seen))[0].T
        places_TD = sinusoids(self.spec.positions, self.spec.dim).to(x_TD.device)
        x_TD = (x_TD + places_TD).to(x_TD.dtype)
        for layer in self.layers:
            x_TD = layer(x_TD)
        normed_TD: Tensor = self.norm(x_TD)
        return normed_TD


class WhisperBlock(nn.Module):
    """Attention within a chunk, then a feed-forward, each after a norm."""

    mixer_norm: nn.Module
    ffn_norm: nn.Module

    def __init__(self, spec: WhisperBlockSpec) -> None:
        super().__init__()
        self.spec = spec
        for name, child in spec.children().items():
            self.add_module(name, make(child))
        self.q = Linear(spec.dim, spec.dim, bias=True)
        self.k = Linear(spec.dim, spec.dim)
        self.v = Linear(spec.dim, spec.dim, bias=True)
        self.o = Linear(spec.dim, spec.dim, bias=True)
        self.up = Linear(spec.dim, spec.hidden_dim, bias=True)
        self.down = Linear(spec.hidden_dim, spec.dim, bias=True)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) to (T, D): all rows of one chunk."""
        normed_TD = self.mixer_norm(x_TD)
        q_HTd, k_HTd, v_HTd = (self._heads(part(normed_TD)) for part in (self.q, self.k, self.v))
        mixed_HTd = F.scaled_dot_product_attention(q_HTd[None], k_HTd[None], v_HTd[None])[0]
        x_TD = x_TD + self.o(mixed_HTd.transpose(0, 1).flatten(1))
        added_TD: Tensor = self.down(F.gelu(self.up(self.ffn_norm(x_TD))))
        return x_TD + added_TD

    def _heads(self, x_TD: Tensor) -> Tensor:
        """(T, D) to (H, T, d)."""
        return x_TD.view(len(x_TD), self.spec.num_heads, self.spec.head_dim).transpose(0, 1)


@cache
def sinusoids(positions: int, dim: int) -> Tensor:
    """(T, D) in float32 on the CPU: sines, then cosines, of wavelengths from 2 pi to 20000 pi positions.

    Whisper's files hold this table, Mistral's do not: it follows from its sizes (whisper: model.py, sinusoids).
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device="cpu") * (math.log(10_000) / (half - 1))
    angles = torch.outer(torch.arange(positions, dtype=torch.float32, device="cpu"), torch.exp(-steps))
    return torch.cat((angles.sin(), angles.cos()), 1)
