"""Feed-forward without a gate."""

from __future__ import annotations

from torch import Tensor, nn

from zoo.components.ffn.gated import ACTIVATIONS
from zoo.components.ffn.spec import MLPSpec
from zoo.components.linear import Linear


class MLP(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, spec: MLPSpec) -> None:
        super().__init__()
        self.spec = spec
        self.up = Linear(spec.dim, spec.hidden_dim)
        self.down = Linear(spec.hidden_dim, spec.dim)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) to (T, D)."""
        down: Tensor = self.down(self.between(self.spec, self.up(x_TD)))
        return down

    @staticmethod
    def between(spec: MLPSpec, up_TF: Tensor) -> Tensor:
        """What lies between the projections, (T, F) to (T, F)."""
        return ACTIVATIONS[spec.activation](up_TF)
