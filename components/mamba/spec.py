"""Settings of the state-space mixers."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from zoo.components.cache.spec import RecurrentCacheSpec
from zoo.components.fields import Count, Flag, Positive
from zoo.components.norm.spec import RMSSpec
from zoo.registry.spec import IndivisibleError, Inherited, Param, Share, Spec, Split, StateSpec

_UPDATE = 6
"""Operations on each element of the state per token: decay, input, their sum, and the product that reads it."""

_CHUNK = 64
"""Tokens that a scan with one decay for each head takes at once."""


class Mamba2Spec(Spec):
    """State-space duality: heads with one decay each, groups of heads share B and C (Dao, Gu, arXiv 2405.21060)."""

    module: ClassVar[str] = "zoo.components.mamba.mamba2:Mamba2"

    kind: Literal["mamba2"] = "mamba2"
    dim: Annotated[Count, Inherited()] = Field(description="Size of the residual stream.")
    num_heads: Annotated[Count, Split()] = Field(description="Heads of the state.")
    head_dim: Count = Field(description="Size of a head.")
    num_groups: Annotated[Count, Split(copies=True)] = Field(
        description="Groups of heads that share B and C and are normalised together; a divisor of num_heads."
    )
    state_size: Count = Field(description="Elements of the state for each element of a head.")
    conv_size: Count = Field(description="How many tokens the convolution sees, itself included.")
    norm_eps: Positive = Field(description="Added to the mean square in the gated norm before the output projection.")
    bias: Flag = Field(default=False, description="Whether the input and output projections add a bias.")
    conv_bias: Flag = Field(default=True, description="Whether the convolution adds a bias.")

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if self.num_heads % self.num_groups:
            raise ValueError(
                "num_heads must be a multiple of num_groups; "
                f"found num_heads {self.num_heads} and num_groups {self.num_groups}"
            )
        return self

    @property
    def inner_dim(self) -> int:
        """Size of all heads."""
        return self.num_heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        """What the convolution mixes over time: the heads' inputs, then B, then C."""
        return self.inner_dim + 2 * self.num_groups * self.state_size

    def parameters(self) -> dict[str, Param]:
        inner, heads, shared = self.inner_dim, (self.num_heads,), self.num_groups * self.state_size
        mixed = (inner, shared, shared)
        return {
            **_inward("in_proj", (inner, *mixed, self.num_heads), self.dim, self.bias),
            **_convolution(mixed, self.conv_size, self.conv_bias),
            "a_log": Param(heads, shard=0, product=False, dtype="float32"),
            "d": Param(heads, shard=0, init="ones", product=False, dtype="float32"),
            "dt_bias": Param(heads, shard=0, product=False, dtype="float32"),
            "norm.weight": Param((inner,), shard=0, init="ones", product=False),
            **_outward("out_proj", self.dim, inner, self.bias),
        }

    def working(self, rows: int, seen: int, itemsize: int) -> int:
        """Also the scan in float32: its inputs and outputs, each chunk's decays between its tokens, and states."""
        scan = 4 * rows * (4 * self.inner_dim + 2 * self.conv_channels + 4 * self.num_heads * _CHUNK)
        states = 4 * 3 * self.inner_dim * self.state_size * max(1, rows // _CHUNK)
        return super().working(rows, seen, itemsize) + scan + states

    def pace(self) -> str:
        return self.kind

    def means(self, share: Share) -> tuple[str, ...]:
        """The gated norm, where its one group is all ranks'."""
        if self.num_groups % share.ranks == 0:
            return ()
        if self.num_groups > 1:
            raise IndivisibleError("num_groups", f"{self.num_groups} is neither 1 nor a multiple of {share.ranks}")
        return ("norm",)

    def state(self) -> StateSpec:
        return RecurrentCacheSpec(
            conv_channels=self.conv_channels,
            conv_size=self.conv_size,
            inner_dim=self.inner_dim,
            state_size=self.state_size,
        )

    def flops(self, context: int) -> float:
        return super().flops(context) + float(_UPDATE * self.inner_dim * self.state_size)


class BCDtNorm(BaseModel):
    """A root-mean-square norm for each of B, C and the step's projection."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    eps: Positive = Field(description="Added to the mean square before the root.")
    weights: Flag = Field(description="Whether the norms multiply with weights.")


class Mamba1Spec(Spec):
    """The selective state space: every channel has decays of its own (Gu, Dao, arXiv 2312.00752)."""

    module: ClassVar[str] = "zoo.components.mamba.mamba1:Mamba1"

    kind: Literal["mamba1"] = "mamba1"
    dim: Annotated[Count, Inherited()] = Field(description="Size of the residual stream.")
    inner_dim: Annotated[Count, Split()] = Field(description="Channels of the state.")
    state_size: Count = Field(description="Elements of the state for each channel.")
    dt_rank: Count = Field(description="Size from which the step sizes of all channels are projected.")
    conv_size: Count = Field(description="How many tokens the convolution sees, itself included.")
    bias: Flag = Field(default=False, description="Whether the input and output projections add a bias.")
    conv_bias: Flag = Field(default=True, description="Whether the convolution adds a bias.")
    bcdt_norm: BCDtNorm | None = Field(
        default=None, description="Norms of B, C and of the step's projection, with eps and weights; null for none."
    )

    def parameters(self) -> dict[str, Param]:
        inner = self.inner_dim
        return {
            **_inward("in_proj", (inner, inner), self.dim, self.bias),
            **_convolution((inner,), self.conv_size, self.conv_bias),
            "x_proj.weight": Param((self.dt_rank + 2 * self.state_size, inner), shard=1, exact=True),
            "dt_proj.weight": Param((inner, self.dt_rank), shard=0, exact=True),
            "a_log": Param((inner, self.state_size), shard=0, product=False, dtype="float32"),
            "d": Param((inner,), shard=0, init="ones", product=False, dtype="float32"),
            "dt_bias": Param((inner,), shard=0, product=False, dtype="float32"),
            **_outward("out_proj", self.dim, inner, self.bias),
        }

    def children(self) -> dict[str, Spec]:
        if self.bcdt_norm is None or not self.bcdt_norm.weights:
            return {}
        sizes = {"b_norm": self.state_size, "c_norm": self.state_size, "dt_norm": self.dt_rank}
        return {name: RMSSpec(dim=size, eps=self.bcdt_norm.eps) for name, size in sizes.items()}

    def working(self, rows: int, seen: int, itemsize: int) -> int:
        """Also the scan in float32: its inputs and outputs, and some states."""
        scan = 4 * rows * (6 * self.inner_dim + 2 * self.state_size)
        return super().working(rows, seen, itemsize) + scan + 4 * 4 * self.inner_dim * self.state_size

    def pace(self) -> str:
        return self.kind

    def state(self) -> StateSpec:
        return RecurrentCacheSpec(
            conv_channels=self.inner_dim,
            conv_size=self.conv_size,
            inner_dim=self.inner_dim,
            state_size=self.state_size,
        )

    def flops(self, context: int) -> float:
        return super().flops(context) + float(_UPDATE * self.inner_dim * self.state_size)


def _inward(name: str, pieces: tuple[int, ...], columns: int, bias: bool) -> dict[str, Param]:
    """A projection of the stream to several pieces side by side."""
    rows = sum(pieces)
    found = {f"{name}.weight": Param((rows, columns), shard=0, segments=pieces)}
    added = Param((rows,), shard=0, segments=pieces, init="zeros", product=False)
    return found | {f"{name}.bias": added} if bias else found


def _outward(name: str, rows: int, columns: int, bias: bool) -> dict[str, Param]:
    """A projection back to the stream."""
    found = {f"{name}.weight": Param((rows, columns), shard=1)}
    return found | {f"{name}.bias": Param((rows,), once=True, init="zeros", product=False)} if bias else found


def _convolution(pieces: tuple[int, ...], size: int, bias: bool) -> dict[str, Param]:
    channels = sum(pieces)
    found = {"conv.weight": Param((channels, 1, size), shard=0, segments=pieces, exact=True)}
    added = Param((channels,), shard=0, segments=pieces, init="zeros", product=False)
    return found | {"conv.bias": added} if bias else found
