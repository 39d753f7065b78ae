"""A picture on its way to an encoder: how many tokens it takes, and its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zoo.components.vision.spec import PixtralSpec
from zoo.images.opening import open_image
from zoo.registry.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the colours of the pictures that the encoders were trained with (mistral-common: tokens/tokenizers/image.py)."""

LARGEST = 10.0
"""Larger numbers are no colours less their mean, over their deviation: those lie within 3."""


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """content: a PIL image in RGB, or a prepared tensor. spec: the encoder's. columns, rows: of its tokens."""

    content: Any
    spec: PixtralSpec
    columns: int
    rows: int

    def prepared(self) -> Tensor:
        """(3, height, width) float32: resized to whole cells, colours less their mean, over their deviation."""
        import torch

        if isinstance(self.content, torch.Tensor):
            prepared: Tensor = self.content
            return prepared
        return pixels(self.content, self.columns * self.spec.cell, self.rows * self.spec.cell)


def picture(source: Any, spec: PixtralSpec, where: str) -> Picture:
    """A picture from whatever `open_image` opens, or from a float tensor (3, height, width), taken as prepared.

    Raises RequestError and FetchError as `open_image`, and for a tensor that cannot be a prepared picture.
    """
    if type(source).__module__.partition(".")[0] == "torch":
        _check_tensor(source, spec, where)
        rows, columns = source.shape[1] // spec.cell, source.shape[2] // spec.cell
        return Picture(source.detach().cpu().float(), spec, columns, rows)
    image = open_image(source, where)
    return Picture(image, spec, *spec.grid(*image.size))


def pictures(sources: Sequence[Any], spec: PixtralSpec) -> list[Picture]:
    """As `picture`, one for each source, numbered from 1 in messages."""
    return [picture(source, spec, f"image {number}") for number, source in enumerate(sources, 1)]


def pixels(image: Any, width: int, height: int) -> Tensor:
    """A PIL image in RGB as mistral-common prepares it, (3, height, width) float32.

    torch's bicubic interpolation without smoothing is OpenCV's, which mistral-common uses: Pillow's is another one.
    """
    import numpy as np
    import torch

    raw = torch.from_numpy(np.asarray(image).astype(np.float32)).permute(2, 0, 1)
    sized = torch.nn.functional.interpolate(raw[None], size=(height, width), mode="bicubic", align_corners=False)[0]
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    prepared: Tensor = (sized / 255 - mean) / std
    return prepared


def _check_tensor(tensor: Tensor, spec: PixtralSpec, where: str) -> None:
    if not tensor.is_floating_point():
        raise RequestError(
            "a tensor of whole numbers is no prepared image",
            where=where,
            found=str(tensor.dtype),
            expected="a float tensor (3, height, width), resized and normalised",
            hint="`PIL.Image.fromarray(tensor.permute(1, 2, 0).numpy())` makes a picture of bytes, which zoo prepares",
        )
    spec.rows_of(tuple(tensor.shape))
    largest = float(tensor.abs().max())
    if not largest <= LARGEST:
        raise RequestError(
            "this tensor is no prepared image: its numbers are too large",
            where=where,
            found=f"values up to {largest:g}",
            expected="(colour / 255 - mean) / deviation, which lies within 3 of zero",
            hint="give the picture itself, as a file or a PIL image: zoo prepares it",
        )
