"""Pixtral's image encoder: all patches of all images in one packed stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.components.build import make
from zoo.components.linear import Linear, product
from zoo.components.rope.rotary import Angles, rotate
from zoo.components.vision.projector import Grid
from zoo.components.vision.spec import CHANNELS, PixtralSpec, VisionBlockSpec


class Pixtral(nn.Module):
    """Patches, norm, blocks, projector (mistral-inference: vision_encoder.py)."""

    def __init__(self, spec: PixtralSpec) -> None:
        super().__init__()
        self.spec = spec
        self.patch = Patches(spec.dim, spec.patch_size)
        children = spec.children()
        self.norm = make(children["norm"])
        self.layers = nn.ModuleList(make(children[f"layers.{i}"]) for i in range(spec.num_layers))
        self.projector = make(spec.projector)

    def forward(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Prepared images, (3, height, width) each, to (N, D) rows each: one for each cell, row by row."""
        size, cells = self.spec.patch_size, self.spec.merge**2
        grids = [(image.shape[1] // size, image.shape[2] // size) for image in images]
        counts = [rows * columns for rows, columns in grids]
        x_TD = self.norm(self.patch(images))
        angles = axial_angles(grids, self.spec.theta, self.spec.dim // self.spec.num_heads, x_TD.device)
        for layer in self.layers:
            x_TD = layer(x_TD, angles, counts)
        projected_TD: Tensor = self.projector(x_TD, grids)
        return list(torch.split(projected_TD, [count // cells for count in counts]))


class Patches(nn.Module):
    """A convolution whose steps are as long as its kernel: one product for each patch."""

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.empty(dim, CHANNELS, size, size))

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """Images (3, height, width) to (T, D), image after image, row by row."""
        size, weight_DI = self.size, self.weight.flatten(1)
        parts = []
        for image in images:
            squares = image.to(weight_DI).unfold(1, size, size).unfold(2, size, size)
            parts.append(squares.permute(1, 2, 0, 3, 4).reshape(-1, weight_DI.shape[1]))
        return product(torch.cat(parts), weight_DI)


class VisionBlock(nn.Module):
    """Attention within each image, then a feed-forward, each after a norm."""

    mixer_norm: nn.Module
    ffn_norm: nn.Module
    ffn: nn.Module

    def __init__(self, spec: VisionBlockSpec) -> None:
        super().__init__()
        self.spec = spec
        for name, child in spec.children().items():
            self.add_module(name, make(child))
        self.qkv = Linear(spec.dim, 3 * spec.dim)
        self.o = Linear(spec.dim, spec.dim)

    def forward(self, x_TD: Tensor, angles: Angles, counts: Sequence[int]) -> Tensor:
        """(T, D) to (T, D); counts: the patches of each image."""
        heads = self.spec.num_heads
        qkv_TAd = self.qkv(self.mixer_norm(x_TD)).view(len(x_TD), 3 * heads, self.spec.head_dim)
        qk_TAd, v_THd = qkv_TAd.split_with_sizes((2 * heads, heads), 1)
        q_THd, k_THd = rotate(qk_TAd, angles).split_with_sizes((heads, heads), 1)
        x_TD = x_TD + self.o(attend(q_THd, k_THd, v_THd, counts).flatten(1))
        y_TD: Tensor = x_TD + self.ffn(self.ffn_norm(x_TD))
        return y_TD


def axial_angles(grids: Sequence[Grid], theta: float, head_dim: int, device: torch.device) -> Angles:
    """cos and signed sin for every patch: the first half of the lane pairs turns by its row, the second by its column.

    Wavelengths go in turns to rows and to columns, so that both get long and short ones.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies_r = (1.0 / theta**exponents).to(device)
    rows_T, columns_T = (torch.cat(parts) for parts in zip(*(_places(grid, device) for grid in grids), strict=True))
    by_row, by_column = torch.outer(rows_T, frequencies_r[0::2]), torch.outer(columns_T, frequencies_r[1::2])
    angles_Tr = torch.cat((by_row, by_column), -1)
    cos, sin = angles_Tr.cos(), angles_Tr.sin()
    return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)


def _places(grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of every patch of an image."""
    rows, columns = (torch.arange(count, dtype=torch.float32, device=device) for count in grid)
    return rows.repeat_interleave(grid[1]), columns.repeat(grid[0])


def attend(q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, counts: Sequence[int]) -> Tensor:
    """(T, H, d): every patch over all patches of its own image and no other."""
    images = zip(*(torch.split(x.transpose(0, 1), list(counts), 1) for x in (q_THd, k_THd, v_THd)), strict=True)
    outputs = [F.scaled_dot_product_attention(*(x[None] for x in qkv))[0] for qkv in images]
    return torch.cat(outputs, 1).transpose(0, 1)


def attend_reference(q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, counts: Sequence[int]) -> Tensor:
    """The formula in float32, with all images in one matrix of scores and a mask of blocks."""
    numbers_T = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(q_THd.device)
    scores_HTS = torch.einsum("qhd,khd->hqk", q_THd.float(), k_THd.float()) * q_THd.shape[-1] ** -0.5
    scores_HTS = scores_HTS.masked_fill(numbers_T[:, None] != numbers_T, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores_HTS.softmax(-1), v_THd.float()).to(q_THd.dtype)
