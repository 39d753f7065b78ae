"""Gated feed-forward with limits: gpt-oss's."""

from __future__ import annotations

from torch import Tensor, nn

from zoo.components.ffn.spec import ClampedSpec
from zoo.components.linear import Linear


class Clamped(nn.Module):
    """down(g sigmoid(gain g) (u + 1)), with gate g at most `limit` and up u within +- `limit`."""

    def __init__(self, spec: ClampedSpec) -> None:
        super().__init__()
        self.spec = spec
        self.gate_up = Linear(spec.dim, 2 * spec.hidden_dim, bias=True)
        self.down = Linear(spec.hidden_dim, spec.dim, bias=True)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) to (T, D)."""
        down: Tensor = self.down(self.between(self.spec, self.gate_up(x_TD)))
        return down

    @staticmethod
    def between(spec: ClampedSpec, gate_up_T2F: Tensor) -> Tensor:
        """What lies between the projections, (T, 2 F) of alternating gates and ups to (T, F)."""
        gate_TF, up_TF = gate_up_T2F.unflatten(-1, (-1, 2)).unbind(-1)
        gate_TF, up_TF = gate_TF.clamp(max=spec.limit), up_TF.clamp(-spec.limit, spec.limit)
        hidden_TF: Tensor = gate_TF * (gate_TF * spec.gain).sigmoid() * (up_TF + 1)
        return hidden_TF
