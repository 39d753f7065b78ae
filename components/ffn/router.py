"""Routers: which experts a token uses, and with which weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.components.ffn.spec import SoftmaxTopkSpec
from zoo.components.linear import product


class SoftmaxTopk(nn.Module):
    """The largest logits, and the softmax over these alone, in float32."""

    def __init__(self, spec: SoftmaxTopkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.dim))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(T, D) to float32 weights (T, K) that sum to one, and int64 experts (T, K), the best first."""
        logits_TE = product(x_TD, self.weight).float()
        best_TK, experts_TK = logits_TE.topk(self.spec.experts_per_token, dim=-1)
        return best_TK.softmax(dim=-1), experts_TK
