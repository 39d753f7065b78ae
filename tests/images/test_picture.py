"""Pictures in tokens and numbers equal mistral-common's; prepared tensors are checked and left as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from mistral_common.protocol.instruct.chunk import ImageChunk
from mistral_common.tokens.tokenizers.image import ImageConfig, ImageEncoder, SpecialImageIDs
from PIL import Image

from zoo.components.norm.spec import RMSSpec
from zoo.components.vision.spec import PixtralSpec, ProjectorSpec
from zoo.images.picture import picture
from zoo.registry.errors import RequestError

SIZES = [(1, 1), (28, 28), (29, 28), (500, 3), (3, 500), (1541, 700), (2000, 1999), (4000, 10), (333, 777)]


def spec(patch: int, merge: int | None, largest: int) -> PixtralSpec:
    norm = RMSSpec(dim=24, eps=1e-5)
    sizes: dict[str, Any] = {"dim": 24, "num_layers": 1, "num_heads": 3, "hidden_dim": 20, "theta": 1e4, "token": 10}
    projector = ProjectorSpec(in_dim=24, out_dim=16, bias=False, merge=merge)
    return PixtralSpec(**sizes, out_dim=16, patch_size=patch, max_image_size=largest, norm=norm, projector=projector)


def theirs(made: PixtralSpec) -> ImageEncoder:
    config = ImageConfig(made.patch_size, made.max_image_size, made.merge)
    return ImageEncoder(config, SpecialImageIDs(img=10, img_break=12, img_end=13))


@pytest.mark.parametrize(("patch", "merge", "largest"), [(16, None, 1024), (14, 2, 1540)])
@pytest.mark.parametrize("size", SIZES)
def test_tokens_and_pixels_are_mistral_commons(patch: int, merge: int | None, largest: int, size: Any) -> None:
    made = spec(patch, merge, largest)
    colours = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    expected = theirs(made)(ImageChunk(image=Image.fromarray(colours)))
    found = picture(Image.fromarray(colours), made, "image 1")
    assert made.image_tokens(*size) == len(expected.tokens)
    assert found.columns * found.rows == expected.tokens.count(10)
    prepared = found.prepared()
    assert made.rows_of(tuple(prepared.shape)) == found.columns * found.rows
    # In steps of a colour: OpenCV rounds its weights.
    assert float((prepared - torch.from_numpy(expected.image)).abs().max()) * 255 * 0.27 < 0.1


def test_every_size_up_to_the_largest_counts_alike() -> None:
    made = spec(14, 2, 140)
    encoder = theirs(made)
    for width in range(1, 300, 7):
        for height in range(1, 300, 11):
            assert made.grid(width, height) == encoder._image_to_num_tokens(Image.new("1", (width, height)))


def test_prepared_tensors_stay_as_they_are() -> None:
    made, tensor = spec(14, 2, 1540), torch.randn(3, 56, 84)
    found = picture(tensor, made, "image 1")
    assert (found.columns, found.rows) == (3, 2)
    assert torch.equal(found.prepared(), tensor)
    assert picture(torch.rand(3, 28, 28, dtype=torch.float64), made, "image 1").prepared().dtype is torch.float32


def test_tensors_that_are_not_prepared_are_refused() -> None:
    made = spec(14, 2, 1540)
    for tensor, message in (
        (torch.zeros(3, 28, 28, dtype=torch.uint8), "whole numbers is no prepared image; found torch.uint8"),
        (torch.rand(3, 28, 28) * 255, "its numbers are too large; found values up to 25"),
        (torch.full((3, 28, 28), torch.nan), "its numbers are too large; found values up to nan"),
        (torch.zeros(3, 28, 30), r"found \(3, 28, 30\); expected \(3, height, width\), both multiples of 28"),
        (torch.zeros(28, 28, 3), r"another shape than this model's images; found \(28, 28, 3\)"),
    ):
        with pytest.raises(RequestError, match=message):
            picture(tensor, made, "image 1")
