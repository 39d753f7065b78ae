"""What attention layers keep of a sequence: every token, or the last `window` ones."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from zoo.components.fields import Count
from zoo.registry.spec import Inherited, StateSpec


class FullCacheSpec(StateSpec):
    """Keys and values of every token."""

    module: ClassVar[str] = "zoo.components.cache.kv:KVStore"

    kind: Literal["full"] = "full"
    num_kv_heads: Annotated[Count, Inherited()] = Field(description="Key and value heads.")
    head_dim: Annotated[Count, Inherited()] = Field(description="Size of a head.")

    def elements(self, tokens: int) -> int:
        return 2 * self.num_kv_heads * self.head_dim * tokens


class WindowCacheSpec(StateSpec):
    """Keys and values of the last `window` tokens, in a ring: constant memory once it is full."""

    module: ClassVar[str] = "zoo.components.cache.kv:KVStore"

    kind: Literal["window"] = "window"
    num_kv_heads: Annotated[Count, Inherited()] = Field(description="Key and value heads.")
    head_dim: Annotated[Count, Inherited()] = Field(description="Size of a head.")
    window: Annotated[int | None, Inherited()] = Field(description="How many tokens are kept: the mixer's window.")

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

    def elements(self, tokens: int) -> int:
        return 2 * self.num_kv_heads * self.head_dim * min(tokens, self.slots)
