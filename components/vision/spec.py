"""Settings of image encoders, and how many tokens an image becomes. Imports no torch."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from zoo.components.encoder import EncoderSpec
from zoo.components.ffn.spec import Activation, GatedSpec
from zoo.components.fields import Count, Flag, Positive
from zoo.registry.errors import RequestError
from zoo.registry.spec import Inherited, Param, Part, Rotary, Slot, Spec

CHANNELS = 3
"""Red, green, blue."""


class ProjectorSpec(Spec):
    """out(activation(in(x))), to the decoder's size; before it, where the card says so, a norm, and a linear map that
    makes one row of each square of patches (mistral-inference: vision_encoder.py).
    """

    module: ClassVar[str] = "zoo.components.vision.projector:Projector"

    kind: Literal["mlp"] = "mlp"
    in_dim: Annotated[Count, Inherited()] = Field(description="Size of the encoder's rows.")
    out_dim: Annotated[Count, Inherited()] = Field(description="Size of the decoder's residual stream.")
    bias: Flag = Field(description="Whether both projections add a bias.")
    activation: Activation = Field(default="gelu", description="Function between the projections.")
    norm: Annotated[Spec | None, Slot("norm", bind={"dim": "in_dim"})] = Field(
        default=None, description="Norm of the encoder's rows; null for none."
    )
    merge: Count | None = Field(
        default=None, description="Side, in patches, of the squares that become one row; null for no such map."
    )

    def parameters(self) -> dict[str, Param]:
        found = {"in.weight": Param((self.out_dim, self.in_dim)), "out.weight": Param((self.out_dim, self.out_dim))}
        if self.bias:
            biases = ("in.bias", "out.bias")
            found |= {name: Param((self.out_dim,), init="zeros", product=False) for name in biases}
        if self.merge is not None:
            found["merge.weight"] = Param((self.in_dim, self.in_dim * self.merge**2))
        return found


class VisionBlockSpec(Spec):
    """x + attention(norm(x)), then x + ffn(norm(x)), where patches see all patches of their own image."""

    module: ClassVar[str] = "zoo.components.vision.pixtral:VisionBlock"

    kind: Literal["pixtral_block"] = "pixtral_block"
    dim: Count
    num_heads: Count
    ffn: GatedSpec
    norm: Spec

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def parameters(self) -> dict[str, Param]:
        dim, turned = self.dim, Rotary(self.head_dim, self.head_dim)
        parts = {
            "q.weight": Part(((0, dim),), turned),
            "k.weight": Part(((dim, 2 * dim),), turned),
            "v.weight": Part(((2 * dim, 3 * dim),)),
        }
        return {"qkv.weight": Param((3 * dim, dim), shard=0, parts=parts), "o.weight": Param((dim, dim), shard=1)}

    def children(self) -> dict[str, Spec]:
        return {"mixer_norm": self.norm, "ffn_norm": self.norm, "ffn": self.ffn}


class PixtralSpec(EncoderSpec):
    """Pixtral's: images of any size, in patches, with rope of two dimensions (Agrawal et al., arXiv 2410.07073)."""

    module: ClassVar[str] = "zoo.components.vision.pixtral:Pixtral"
    medium: ClassVar[str] = "image"

    kind: Literal["pixtral"] = "pixtral"
    dim: Count = Field(description="Size of the encoder's residual stream.")
    num_layers: Count = Field(description="Blocks of the encoder.")
    num_heads: Count = Field(description="Heads; dim / num_heads is their size.")
    hidden_dim: Count = Field(description="Size between the projections of the feed-forward.")
    activation: Activation = Field(default="silu", description="Function of the feed-forward's gate.")
    patch_size: Count = Field(description="Side of a patch in pixels.")
    max_image_size: Count = Field(description="Longest side in pixels to which larger images are reduced.")
    theta: Positive = Field(description="Base of the rope's wavelengths, in patches.")
    norm: Annotated[Spec, Slot("norm")] = Field(description="Norm of the patches, and before each half of a block.")
    projector: Annotated[ProjectorSpec, Slot("projector", default="mlp", bind={"in_dim": "dim"})] = Field(
        description="From the encoder's rows to the decoder's."
    )

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.dim % (4 * self.num_heads):
            raise ValueError(
                "heads turn by row and by column, in pairs of lanes, so dim must be a multiple of 4 num_heads; "
                f"found dim {self.dim} and num_heads {self.num_heads}"
            )
        return self

    @property
    def merge(self) -> int:
        """Side, in patches, of the square that becomes one row."""
        return self.projector.merge or 1

    @property
    def cell(self) -> int:
        """Side, in pixels, of the square that becomes one row."""
        return self.patch_size * self.merge

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Columns and rows of tokens of an image of so many pixels, as mistral-common counts them."""
        ratio = max(height / self.max_image_size, width / self.max_image_size)
        if ratio > 1:
            width, height = max(round(width / ratio), 1), max(round(height / ratio), 1)
        return (width - 1) // self.cell + 1, (height - 1) // self.cell + 1

    def image_tokens(self, width: int, height: int) -> int:
        """Tokens of an image in a prompt: one for each cell, and one that ends each row of them."""
        columns, rows = self.grid(width, height)
        return (columns + 1) * rows

    def rows_of(self, shape: tuple[int, ...]) -> int:
        """Cells of a prepared image, (3, height, width) in whole cells."""
        longest = -(-self.max_image_size // self.cell) * self.cell
        fits = len(shape) == 3 and shape[0] == CHANNELS
        if not fits or any(side % self.cell or not 0 < side <= longest for side in shape[1:]):
            raise RequestError(
                "a tensor of another shape than this model's images",
                where="images",
                found=str(tuple(shape)),
                expected=f"({CHANNELS}, height, width), both multiples of {self.cell} and at most {longest}",
                hint="give the picture itself, as a file or a PIL image: zoo prepares it",
            )
        return (shape[1] // self.cell) * (shape[2] // self.cell)

    def parameters(self) -> dict[str, Param]:
        return {"patch.weight": Param((self.dim, CHANNELS, self.patch_size, self.patch_size))}

    def children(self) -> dict[str, Spec]:
        ffn = GatedSpec(dim=self.dim, hidden_dim=self.hidden_dim, activation=self.activation)
        block = VisionBlockSpec(dim=self.dim, num_heads=self.num_heads, ffn=ffn, norm=self.norm)
        layers: dict[str, Spec] = {f"layers.{i}": block for i in range(self.num_layers)}
        return {"norm": self.norm, **layers, "projector": self.projector}
