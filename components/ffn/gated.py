"""Gated feed-forward: SwiGLU and its kin."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from zoo.components import few, fused
from zoo.components.ffn.spec import Activation, GatedSpec
from zoo.components.linear import Linear
from zoo.components.native import small

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}


class Gated(nn.Module):
    """down(activation(gate(x)) * up(x)), with gate and up in one product."""

    def __init__(self, spec: GatedSpec) -> None:
        super().__init__()
        self.spec = spec
        self.gate_up = Linear(spec.dim, 2 * spec.hidden_dim)
        self.down = Linear(spec.hidden_dim, spec.dim)

    def forward(self, x_TD: Tensor, added_T2F: Tensor | None = None) -> Tensor:
        """(T, D) to (T, D). added: what is added to gate and up, by one that shares the weights with others."""
        down: Tensor = self.down(self._gated(x_TD, added_T2F))
        return down

    def _gated(self, x_TD: Tensor, added_T2F: Tensor | None) -> Tensor:
        """Gate and up in one product, and the gate applied to it: by one kernel where there is one and nothing is added
        in between."""
        weight = self.gate_up.matrix("weight")
        plain = added_T2F is None and not self.gate_up._forward_hooks and self.spec.activation == "silu"
        if plain and isinstance(weight, Tensor) and few.runs(x_TD, weight):
            return few.product(x_TD, weight, gated=True)
        gate_up_T2F = self.gate_up(x_TD)
        return gate(gate_up_T2F if added_T2F is None else gate_up_T2F + added_T2F, self.spec.activation)

    @staticmethod
    def between(spec: GatedSpec, gate_up_T2F: Tensor) -> Tensor:
        """What lies between the projections, (T, 2 F) to (T, F)."""
        return gate(gate_up_T2F, spec.activation)


def gate(gate_up_T2F: Tensor, activation: Activation) -> Tensor:
    """activation(first half) * second half, (T, 2 F) to (T, F)."""
    if activation == "silu" and gate_up_T2F.ndim == 2 and fused.runs(gate_up_T2F, "gate"):
        return fused.gate(gate_up_T2F)
    if activation == "silu" and gate_up_T2F.ndim == 2 and small.runs(gate_up_T2F):
        return small.gate(gate_up_T2F)
    gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate_TF).mul_(up_TF)
