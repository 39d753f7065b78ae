"""What encoders of images and sounds say of themselves: the seam by which media reach the decoder. Imports no torch."""

from typing import Annotated, ClassVar, Self

from pydantic import Field

from zoo.components.fields import Count
from zoo.registry.spec import Inherited, Share, Spec


class EncoderSpec(Spec):
    """Turns prepared pieces of one medium into rows of the residual stream. A kind of encoder derives from it.

    Its module is called with the pieces, tensors as `rows_of` takes their shapes, and returns one (N, D) tensor for
    each. The rows take the place of the embeddings of `token` in the prompt, in their order.
    """

    medium: ClassVar[str]
    """What a piece is called in messages: image, or sound."""

    out_dim: Annotated[Count, Inherited()] = Field(description="Size of the decoder's residual stream.")
    token: Annotated[int, Field(strict=True, ge=0)] = Field(
        description="Id of the token whose embeddings give way to the encoder's rows."
    )

    def divided(self, share: Share, where: str = "model") -> Self:
        """Whole: encoders are not shared out."""
        return self

    def rows_of(self, shape: tuple[int, ...]) -> int:
        """How many rows a piece of this shape gives. Raises RequestError for a shape that is none of a piece's."""
        raise NotImplementedError
