"""What blocks do with the residual stream between their parts: add to it, and norm the sum."""

from __future__ import annotations

from torch import Tensor, nn

from zoo.components.native import small
from zoo.components.norm.rms import RMS


def added(x_TD: Tensor, y_TD: Tensor) -> Tensor:
    """x + y of (T, D) rows."""
    alike = y_TD.dtype is x_TD.dtype and y_TD.shape == x_TD.shape and y_TD.stride(-1) == 1
    return small.add(x_TD, y_TD) if alike and small.runs(x_TD) else x_TD + y_TD


def added_and_normed(x_TD: Tensor, y_TD: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """x + y, and its norm, in one pass where there is a kernel for both."""
    if isinstance(norm, RMS):
        return norm.added(x_TD, y_TD)
    total_TD = added(x_TD, y_TD)
    return total_TD, norm(total_TD)
