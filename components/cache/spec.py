"""What layers keep of a sequence: every token, the last `window` ones, or a state."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from zoo.components.fields import Count
from zoo.registry.spec import Inherited, Split, StateSpec

Kept = tuple[int, int, tuple[int, ...]]
"""Planes, heads, and lanes of a head of what a layer keeps of a token: neighbouring lanes that belong together."""

CacheDtype = Literal["int8", "fp8"]
"""Codes of eight bits: whole numbers, or floats of four bits of exponent and three of mantissa (e4m3)."""

SCALE_BYTES = 2
"""Bytes of a scale of codes."""


CodedAs = Annotated[
    CacheDtype | None,
    Inherited(),
    Field(description="Codes in which numbers are kept, with a scale for each head of a token; null for none."),
]
"""The model's `cache_dtype`, as the Spec of a cache of keys and values has it."""


def kept_bytes(kept: Kept, itemsize: int, coded: CacheDtype | None) -> int:
    """Bytes that a layer keeps of a token. Codes have a scale for each group of lanes, and fill even rows."""
    planes, heads, lanes = kept
    numbers = sum(lanes)
    row = numbers * itemsize if coded is None else numbers + numbers % 2 + SCALE_BYTES * len(lanes)
    return planes * heads * row


class FullCacheSpec(StateSpec):
    """Keys and values of every token."""

    module: ClassVar[str] = "zoo.components.cache.kv:KVStore"

    kind: Literal["full"] = "full"
    num_kv_heads: Annotated[Count, Inherited(), Split(copies=True)] = Field(description="Key and value heads.")
    head_dim: Annotated[Count, Inherited()] = Field(description="Size of a head.")
    cache_dtype: CodedAs = None

    @property
    def kept(self) -> Kept:
        """Keys and values."""
        return 2, self.num_kv_heads, (self.head_dim,)

    def elements(self, tokens: int) -> int:
        return 2 * self.num_kv_heads * self.head_dim * tokens

    def nbytes(self, tokens: int, itemsize: int) -> int:
        return kept_bytes(self.kept, itemsize, self.cache_dtype) * tokens


class WindowCacheSpec(StateSpec):
    """Keys and values of the last `window` tokens, in a ring: constant memory once it is full."""

    module: ClassVar[str] = "zoo.components.cache.kv:KVStore"

    kind: Literal["window"] = "window"
    num_kv_heads: Annotated[Count, Inherited(), Split(copies=True)] = Field(description="Key and value heads.")
    head_dim: Annotated[Count, Inherited()] = Field(description="Size of a head.")
    window: Annotated[int | None, Inherited()] = Field(description="How many tokens are kept: the mixer's window.")
    cache_dtype: CodedAs = None

    @model_validator(mode="after")
    def _check_window(self) -> Self:
        if self.window is None:
            raise ValueError("a cache of kind 'window' needs a window on its mixer; found none")
        return self

    @property
    def slots(self) -> int:
        """Size of the ring."""
        assert self.window is not None
        return self.window

    @property
    def kept(self) -> Kept:
        """Keys and values."""
        return 2, self.num_kv_heads, (self.head_dim,)

    def elements(self, tokens: int) -> int:
        return 2 * self.num_kv_heads * self.head_dim * min(tokens, self.slots)

    def nbytes(self, tokens: int, itemsize: int) -> int:
        return kept_bytes(self.kept, itemsize, self.cache_dtype) * min(tokens, self.slots)


class LatentCacheSpec(StateSpec):
    """The latent of every token's keys and values, normed, and the key lanes that all heads share, turned by rope.

    Keys of one head are both together, values the latent: nothing is stored twice (DeepSeek-V2, arXiv 2405.04434).
    """

    module: ClassVar[str] = "zoo.components.cache.latent:LatentStore"

    kind: Literal["latent"] = "latent"
    kv_lora_rank: Annotated[Count, Inherited()] = Field(description="Size of a latent.")
    rope_head_dim: Annotated[int, Inherited()] = Field(description="Lanes of a key that rope turns.")
    index_dim: Annotated[int, Inherited()] = Field(default=0, description="Size of the key of the layer's indexer.")
    cache_dtype: CodedAs = None

    @property
    def kept(self) -> Kept:
        """One row: latent, turned lanes, index key."""
        lanes = (self.kv_lora_rank, self.rope_head_dim, self.index_dim)
        return 1, 1, tuple(count for count in lanes if count)

    def elements(self, tokens: int) -> int:
        return (self.kv_lora_rank + self.rope_head_dim + self.index_dim) * tokens

    def nbytes(self, tokens: int, itemsize: int) -> int:
        return kept_bytes(self.kept, itemsize, self.cache_dtype) * tokens

    def serves(self, other: StateSpec) -> bool:
        return self.model_copy(update={"index_dim": 0, "cache_dtype": None}) == other

    def lent(self) -> StateSpec:
        """Without the key of the indexer, which chooses for its own layer."""
        return self.model_copy(update={"index_dim": 0})


class SharedCacheSpec(StateSpec):
    """Nothing but the key of the layer's indexer: latents are read where an earlier layer keeps its own."""

    module: ClassVar[str] = "zoo.components.cache.latent:LatentStore"

    kind: Literal["shared"] = "shared"
    layer: int = Field(ge=0, strict=True, description="The layer whose latents are read, counted from 0.")
    index_dim: Annotated[int, Inherited()] = Field(default=0, description="Size of the key of the layer's indexer.")
    cache_dtype: CodedAs = None

    @property
    def kept(self) -> Kept:
        """One row."""
        return 1, 1, (self.index_dim,)

    def elements(self, tokens: int) -> int:
        return self.index_dim * tokens

    def nbytes(self, tokens: int, itemsize: int) -> int:
        return kept_bytes(self.kept, itemsize, self.cache_dtype) * tokens


class RecurrentCacheSpec(StateSpec):
    """A state of constant size, in float32, and the last inputs of a convolution: what recurrent mixers keep."""

    module: ClassVar[str] = "zoo.components.cache.recurrent:RecurrentStore"

    kind: Literal["recurrent"] = "recurrent"
    conv_channels: Annotated[Count, Inherited()] = Field(description="Channels of the convolution.")
    conv_size: Annotated[Count, Inherited()] = Field(description="How many tokens the convolution sees.")
    inner_dim: Annotated[Count, Inherited()] = Field(description="Channels of the state.")
    state_size: Annotated[Count, Inherited()] = Field(description="Elements of the state for each channel.")

    @property
    def conv_shape(self) -> tuple[int, int]:
        """Of one layer's convolution inputs: tokens, channels."""
        return self.conv_size - 1, self.conv_channels

    @property
    def ssm_shape(self) -> tuple[int, int]:
        """Of one layer's state."""
        return self.inner_dim, self.state_size

    def elements(self, tokens: int) -> int:
        return (self.conv_size - 1) * self.conv_channels + self.inner_dim * self.state_size

    def nbytes(self, tokens: int, itemsize: int) -> int:
        return itemsize * (self.conv_size - 1) * self.conv_channels + 4 * self.inner_dim * self.state_size


class JointStateSpec(StateSpec):
    """What the mixers of one block keep, each in its own way."""

    kind: Literal["joint"] = "joint"
    states: tuple[StateSpec | None, ...] = Field(description="What each mixer keeps; null for one that keeps nothing.")

    def elements(self, tokens: int) -> int:
        return sum(state.elements(tokens) for state in self.states if state)

    def nbytes(self, tokens: int, itemsize: int) -> int:
        return sum(state.nbytes(tokens, itemsize) for state in self.states if state)

    def parts(self) -> tuple[StateSpec | None, ...]:
        return self.states
