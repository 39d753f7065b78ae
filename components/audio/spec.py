"""Settings of sound encoders, and how many tokens a sound becomes. Imports no torch."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from zoo.components.encoder import EncoderSpec
from zoo.components.fields import Count
from zoo.components.vision.spec import ProjectorSpec
from zoo.registry.errors import RequestError
from zoo.registry.spec import Param, Slot, Spec

SAMPLING_RATE = 16_000
"""Samples per second that Whisper's encoders are trained with."""

HOP, WINDOW = 160, 400
"""Samples from one frame of the spectrogram to the next, and those that a frame sees."""

STRIDE = 2
"""Frames that become one position: the step of the second convolution."""

KERNEL = 3
"""Frames that a convolution sees."""


class WhisperBlockSpec(Spec):
    """x + attention(norm(x)), then x + ffn(norm(x)), where every position of a chunk sees all of them."""

    module: ClassVar[str] = "zoo.components.audio.whisper:WhisperBlock"

    kind: Literal["whisper_block"] = "whisper_block"
    dim: Count
    num_heads: Count
    hidden_dim: Count
    norm: Spec

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def parameters(self) -> dict[str, Param]:
        dim, hidden = self.dim, self.hidden_dim
        # A bias of the keys would move all scores of a query alike, which the softmax takes back.
        biases = {"q": dim, "v": dim, "o": dim, "up": hidden, "down": dim}
        return {
            **{f"{name}.weight": Param((dim, dim)) for name in ("q", "k", "v", "o")},
            "up.weight": Param((hidden, dim)),
            "down.weight": Param((dim, hidden)),
            **{f"{name}.bias": Param((size,), init="zeros", product=False) for name, size in biases.items()},
        }

    def children(self) -> dict[str, Spec]:
        return {"mixer_norm": self.norm, "ffn_norm": self.norm}


class WhisperSpec(EncoderSpec):
    """Whisper's encoder over spectrograms in chunks of 30 seconds (Radford et al., arXiv 2212.04356), then several of
    its positions as one row of the decoder (Liu et al., Voxtral, arXiv 2507.13264).
    """

    module: ClassVar[str] = "zoo.components.audio.whisper:Whisper"
    medium: ClassVar[str] = "sound"

    kind: Literal["whisper"] = "whisper"
    dim: Count = Field(description="Size of the encoder's residual stream.")
    num_layers: Count = Field(description="Blocks of the encoder.")
    num_heads: Count = Field(description="Heads; dim / num_heads is their size.")
    hidden_dim: Count = Field(description="Size between the projections of the feed-forward.")
    num_mel_bins: Count = Field(description="Bands of the spectrogram.")
    positions: Count = Field(description="Positions of a chunk, of two frames of 10 ms each: 1500 are 30 seconds.")
    stack: Count = Field(description="Positions that stand side by side in one row of the decoder.")
    norm: Annotated[Spec, Slot("norm")] = Field(description="Norm before each half of a block, and after the last.")

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.dim % self.num_heads or self.dim % 2:
            raise ValueError(f"dim must be even and a multiple of num_heads; found {self.dim} and {self.num_heads}")
        if self.positions % self.stack:
            raise ValueError(
                f"a chunk must be whole rows: positions a multiple of stack; found {self.positions} and {self.stack}"
            )
        return self

    @property
    def chunk_frames(self) -> int:
        """Frames of the spectrogram that the encoder sees at once."""
        return STRIDE * self.positions

    @property
    def chunk_samples(self) -> int:
        """Samples of a chunk; a sound is filled up with silence to whole chunks."""
        return HOP * self.chunk_frames

    @property
    def samples_per_token(self) -> int:
        """Samples that become one row of the decoder."""
        return HOP * STRIDE * self.stack

    def audio_tokens(self, samples: int) -> int:
        """Rows of a sound of so many samples (at SAMPLING_RATE), as mistral-common counts them."""
        chunks = -(-samples // self.chunk_samples)
        return chunks * (self.positions // self.stack)

    def rows_of(self, shape: tuple[int, ...]) -> int:
        """Rows of a spectrogram, (num_mel_bins, frames) in whole chunks."""
        if len(shape) != 2 or shape[0] != self.num_mel_bins or not shape[1] or shape[1] % self.chunk_frames:
            raise RequestError(
                "a tensor of another shape than this model's spectrograms",
                where="audio",
                found=str(tuple(shape)),
                expected=f"({self.num_mel_bins}, frames), a multiple of {self.chunk_frames} frames",
                hint="give the sound itself, as a file or as its bytes: zoo prepares it",
            )
        return shape[1] // (STRIDE * self.stack)

    def parameters(self) -> dict[str, Param]:
        sizes = {"conv1": self.num_mel_bins, "conv2": self.dim}
        return {
            **{f"{name}.weight": Param((self.dim, size, KERNEL)) for name, size in sizes.items()},
            **{f"{name}.bias": Param((self.dim,), init="zeros", product=False) for name in sizes},
        }

    def children(self) -> dict[str, Spec]:
        dim, hidden, norm = self.dim, self.hidden_dim, self.norm
        block = WhisperBlockSpec(dim=dim, num_heads=self.num_heads, hidden_dim=hidden, norm=norm)
        layers: dict[str, Spec] = {f"layers.{i}": block for i in range(self.num_layers)}
        projector = ProjectorSpec(in_dim=self.stack * self.dim, out_dim=self.out_dim, bias=False)
        return {**layers, "norm": self.norm, "projector": projector}
