"""The short convolution over time in front of a state-space mixer's scan."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.components.mamba import single
from zoo.components.native import recurrent
from zoo.components.native.recurrent import Places, moved


class CausalConv(nn.Module):
    """silu(conv(x)): each channel's weighted sum of its last `size` tokens.

    A few shifted products in float32 rather than a library's convolution: packed rows need no transposition, and
    one row costs as little as it should.
    """

    def __init__(self, channels: int, size: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, size))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(self, past_BkW: Tensor | None, x_BTW: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, W) and the last size - 1 inputs (B, k, W), given those before this step; None: there are none."""
        if self.moves(x_BTW):
            return moved(self, past_BkW, (self.weight.shape[2] - 1, x_BTW.shape[2]), x_BTW.dtype, x_BTW)
        return self.reference(past_BkW, x_BTW)

    def reference(self, past_BkW: Tensor | None, x_BTW: Tensor) -> tuple[Tensor, Tensor]:
        """The formula."""
        rows, (weight_kW, size) = x_BTW.shape[1], (self.weight.squeeze(1).t().float(), self.weight.shape[2])
        if past_BkW is None:
            past_BkW = x_BTW.new_zeros(x_BTW.shape[0], size - 1, x_BTW.shape[2])
        window_BTW = torch.cat((past_BkW, x_BTW), dim=1)
        y_BTW = window_BTW[:, :rows] * weight_kW[0]
        for tap in range(1, size):
            y_BTW = torch.addcmul(y_BTW, window_BTW[:, tap : tap + rows].float(), weight_kW[tap])
        if self.bias is not None:
            y_BTW = y_BTW + self.bias
        return F.silu(y_BTW).to(x_BTW.dtype), window_BTW[:, rows:]

    def in_place(self, pool_PkW: Tensor, places_B: Tensor, x_BW: Tensor) -> Tensor:
        """(B, W), of one row of each sequence whose last inputs stand at these places of the pool."""
        return single.conv(pool_PkW, places_B, x_BW, self.weight, self.bias)

    def moves(self, x: Tensor) -> bool:
        """Whether the native kernel takes such rows."""
        fits = x.dtype is self.weight.dtype and self.weight.shape[2] <= recurrent.MOST_TAPS
        return fits and recurrent.runs(x)

    def move(self, places: Places, x_TW: Tensor) -> Tensor:
        """(T, W), of the rows of a step; the last inputs of each sequence are replaced."""
        return recurrent.convolution(places, x_TW, self.weight, self.bias)
