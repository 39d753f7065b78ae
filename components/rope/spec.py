"""Settings of rotary position embeddings (Su et al., arXiv 2104.09864) and of their ways to longer contexts.

Every kind turns lanes i and i + rotary_dim / 2 of a head by the same angle ("half" layout). Checkpoints that turn
neighbouring lanes are permuted when they are loaded.
"""

from math import pi
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from zoo.components.fields import Count, Flag, Positive
from zoo.registry.spec import Inherited, Rotary, Spec


class RopeSpec(Spec):
    """What all kinds share; a plugin's kind derives from it."""

    module: ClassVar[str] = "zoo.components.rope.rotary:Rope"
    frequencies: ClassVar[str]
    """Dotted path of a function (spec) -> (float32 angles per position and lane pair, factor of cos and sin)."""

    head_dim: Annotated[Count, Inherited()] = Field(description="Size of a head.")
    theta: Positive = Field(description="Base of the geometric row of wavelengths.")
    rotary_dim: Count | None = Field(
        default=None, description="How many leading lanes of a head are turned; null turns all."
    )

    @model_validator(mode="after")
    def _check_lanes(self) -> Self:
        if self.rotary_dim is not None and self.rotary_dim > self.head_dim:
            raise ValueError(f"rotary_dim must not exceed head_dim; found {self.rotary_dim} and {self.head_dim}")
        if self.lanes % 2:
            name = "head_dim" if self.rotary_dim is None else "rotary_dim"
            raise ValueError(f"rope turns pairs of lanes, so {name} must be even; found {self.lanes}")
        if self.theta <= 1:
            raise ValueError(f"theta must be above 1; found {self.theta}")
        return self

    @property
    def lanes(self) -> int:
        """How many lanes of a head are turned."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def rotary(self) -> Rotary:
        """The rows of a projection that rope turns, for weight layouts."""
        return Rotary(self.head_dim, self.lanes)


class DefaultRopeSpec(RopeSpec):
    """Plain rope: lane pair i turns by position / theta^(2i / rotary_dim)."""

    frequencies: ClassVar[str] = "zoo.components.rope.frequencies:default"

    kind: Literal["default"] = "default"


class LinearRopeSpec(RopeSpec):
    """Position interpolation: every angle divided by `factor` (Chen et al., arXiv 2306.15595)."""

    frequencies: ClassVar[str] = "zoo.components.rope.frequencies:linear"

    kind: Literal["linear"] = "linear"
    factor: Positive = Field(description="How many times longer the context becomes.")


class Llama3RopeSpec(RopeSpec):
    """Llama 3.1's scaling: long wavelengths are stretched, short ones kept, those between blended."""

    frequencies: ClassVar[str] = "zoo.components.rope.frequencies:llama3"

    kind: Literal["llama3"] = "llama3"
    factor: Positive = Field(description="How many times the long wavelengths are stretched.")
    low_freq_factor: Positive = Field(
        description="Wavelengths above original_context / low_freq_factor are stretched in full."
    )
    high_freq_factor: Positive = Field(
        description="Wavelengths below original_context / high_freq_factor are kept as they are."
    )
    original_context: Count = Field(description="Context length in tokens before the stretching.")

    @model_validator(mode="after")
    def _check_factors(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                "high_freq_factor must be above low_freq_factor; "
                f"found {self.high_freq_factor} and {self.low_freq_factor}"
            )
        return self


class YarnRopeSpec(RopeSpec):
    """YaRN: lanes that turn often are kept, lanes that turn rarely are stretched (Peng et al., arXiv 2309.00071)."""

    frequencies: ClassVar[str] = "zoo.components.rope.frequencies:yarn"

    kind: Literal["yarn"] = "yarn"
    factor: Positive = Field(description="How many times longer the context becomes.")
    original_context: Count = Field(description="Context length in tokens before the stretching.")
    beta_fast: Positive = Field(
        default=32.0, description="Lanes that turn more often than this within original_context are kept."
    )
    beta_slow: Positive = Field(
        default=1.0, description="Lanes that turn less often than this within original_context are stretched in full."
    )
    attention_factor: Positive | None = Field(
        default=None, description="Multiplies cos and sin; null takes 0.1 ln(factor) + 1."
    )
    truncate: Flag = Field(default=True, description="Round the borders of the ramp outwards to whole lane pairs.")

    @model_validator(mode="after")
    def _check_betas(self) -> Self:
        if self.factor < 1:
            raise ValueError(f"factor must be at least 1; found {self.factor}")
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast must be above beta_slow; found {self.beta_fast} and {self.beta_slow}")
        if self.original_context <= 2 * pi * self.beta_slow:
            raise ValueError(
                f"original_context must be above 2 pi beta_slow = {2 * pi * self.beta_slow:.4g}; "
                f"found {self.original_context}"
            )
        return self


class LongRopeSpec(RopeSpec):
    """LongRoPE: a divisor for each lane pair, one row of them up to the original context, another beyond it
    (Ding et al., arXiv 2402.13753). The card's context_length says which row, so that a long prompt and its
    continuation are turned alike; transformers goes by the length of each sequence.
    """

    frequencies: ClassVar[str] = "zoo.components.rope.frequencies:longrope"

    kind: Literal["longrope"] = "longrope"
    context_length: Annotated[Count, Inherited()] = Field(description="The longest sequence in tokens.")
    original_context: Count = Field(description="Context length in tokens before the stretching.")
    short_factor: tuple[Positive, ...] = Field(
        description="Divisor of each lane pair's angle, for a context_length up to original_context."
    )
    long_factor: tuple[Positive, ...] = Field(description="Divisor of each lane pair's angle, for a longer one.")
    attention_factor: Positive = Field(description="Multiplies cos and sin.")

    @model_validator(mode="after")
    def _check_lists(self) -> Self:
        for name, factors in (("short_factor", self.short_factor), ("long_factor", self.long_factor)):
            if len(factors) != self.lanes // 2:
                raise ValueError(
                    f"{name} must hold {self.lanes // 2} numbers, one for each lane pair; found {len(factors)}"
                )
        return self

    @property
    def factors(self) -> tuple[float, ...]:
        """The row that is used."""
        return self.long_factor if self.context_length > self.original_context else self.short_factor
