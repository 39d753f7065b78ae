"""The squared-ReLU feed-forward."""

from __future__ import annotations

from torch import Tensor, nn

from zoo.components.linear import Linear
from zoo_primer.spec import ReluSquaredSpec


class ReluSquared(nn.Module):
    """down(relu(up(x))^2)."""

    def __init__(self, spec: ReluSquaredSpec) -> None:
        super().__init__()
        self.up = Linear(spec.dim, spec.hidden_dim)
        self.down = Linear(spec.hidden_dim, spec.dim)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) to (T, D)."""
        projected_TD: Tensor = self.down(self.up(x_TD).relu().square())
        return projected_TD
