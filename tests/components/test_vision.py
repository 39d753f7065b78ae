"""Image encoders by themselves: blocks of patches, rope by rows and columns, squares, and how large images become."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from zoo.components.norm.spec import RMSSpec
from zoo.components.vision.pixtral import attend, attend_reference, axial_angles
from zoo.components.vision.projector import _squares
from zoo.components.vision.spec import PixtralSpec, ProjectorSpec
from zoo.registry.errors import CardError, RequestError

NORM = RMSSpec(dim=24, eps=1e-5)
SIZES = [(12, 24), (6, 6), (18, 12)]
"""Of images, (height, width): all multiples of the cell."""


@pytest.fixture
def spec() -> PixtralSpec:
    return make()


def make(merge: int | None = 2, **changes: Any) -> PixtralSpec:
    projector = ProjectorSpec(in_dim=24, out_dim=16, bias=False, norm=NORM, merge=merge)
    fields: dict[str, Any] = {
        "out_dim": 16,
        "token": 10,
        "dim": 24,
        "num_layers": 2,
        "num_heads": 3,
        "hidden_dim": 20,
        "patch_size": 3,
        "max_image_size": 24,
        "theta": 100.0,
        "norm": NORM,
        "projector": projector,
    }
    return PixtralSpec(**fields | changes)


def pictures(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *size, generator=generator) for size in SIZES]


def test_images_of_one_stream_do_not_see_each_other(
    spec: PixtralSpec, filled: Callable[..., Any], close: Callable[..., None]
) -> None:
    encoder, images = filled(spec), pictures()
    together = encoder(images)
    assert [len(rows) for rows in together] == [spec.rows_of(tuple(image.shape)) for image in images] == [8, 1, 6]
    for image, rows in zip(images, together, strict=True):
        close(rows, encoder([image])[0])


def test_attention_is_the_formula_with_a_mask_of_blocks(close: Callable[..., None]) -> None:
    q_THd, k_THd, v_THd = torch.randn(3, 15, 4, 8)
    close(attend(q_THd, k_THd, v_THd, [4, 1, 10]), attend_reference(q_THd, k_THd, v_THd, [4, 1, 10]))
    assert not torch.allclose(attend(q_THd, k_THd, v_THd, [5, 10]), attend(q_THd, k_THd, v_THd, [15]))


def test_an_image_is_read_by_rows_and_columns(spec: PixtralSpec, filled: Callable[..., Any]) -> None:
    encoder, image = filled(spec), pictures()[0]
    (rows,), (turned,) = encoder([image]), encoder([image.transpose(1, 2)])
    assert not torch.allclose(rows.view(2, 4, -1), turned.view(4, 2, -1).transpose(0, 1))


def test_lane_pairs_turn_by_row_then_by_column() -> None:
    cos, sin = axial_angles([(2, 3), (1, 2)], theta=100.0, head_dim=8, device=torch.device("cpu"))
    frequencies = 100.0 ** -(torch.arange(0, 8, 2) / 8)
    places = torch.tensor([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 0), (0, 1)])
    angles = torch.cat((places[:, :1] * frequencies[0::2], places[:, 1:] * frequencies[1::2]), 1)
    torch.testing.assert_close(cos[:, 0], torch.cat((angles, angles), 1).cos())
    torch.testing.assert_close(sin[:, 0], torch.cat((-angles, angles), 1).sin())


def test_squares_stand_as_unfold_makes_them() -> None:
    image = torch.randn(5, 4, 6)
    expected = F.unfold(image[None], 2, stride=2)[0].T
    torch.testing.assert_close(_squares(image.flatten(1).T.contiguous(), (4, 6), 2), expected)


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((1, 1), (1, 1)),
        ((6, 6), (1, 1)),
        ((7, 6), (2, 1)),
        ((24, 24), (4, 4)),
        ((25, 24), (4, 4)),
        ((1000, 1), (4, 1)),
        ((1, 1000), (1, 4)),
        ((37, 11), (4, 2)),
    ],
)
def test_larger_images_are_reduced_to_the_longest_side(
    spec: PixtralSpec, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    assert spec.grid(*size) == grid
    assert spec.image_tokens(*size) == (grid[0] + 1) * grid[1]


@pytest.mark.parametrize("shape", [(3, 12), (1, 12, 12), (12, 12, 3), (3, 12, 13), (3, 30, 12), (3, 0, 12)])
def test_tensors_of_other_shapes_are_refused(spec: PixtralSpec, shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match=r"expected \(3, height, width\), both multiples of 6 and at most 24"):
        spec.rows_of(shape)


def test_heads_must_turn_by_rows_and_columns(small: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="dim must be a multiple of 4 num_heads; found dim 24 and num_heads 4"):
        make(num_heads=4)
    with pytest.raises(CardError, match="vision"):
        small(vision={"kind": "pixtral"})
