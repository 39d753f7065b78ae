"""Routers: which experts a token uses, and with which weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.components import linear, native
from zoo.components.ffn.spec import SigmoidSpec, SoftmaxSpec, SoftmaxTopkSpec
from zoo.components.native import mixture


class SoftmaxTopk(nn.Module):
    """The largest logits, and the softmax over these alone, in float32."""

    def __init__(self, spec: SoftmaxTopkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.dim))
        self.bias = nn.Parameter(torch.empty(spec.num_experts)) if spec.bias else None

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(T, D) to float32 weights (T, K) that sum to one, and int64 experts (T, K), the best first."""
        by_kernel = _runs(x_TD, self.weight) and (self.bias is None or self.bias.dtype is x_TD.dtype)
        logits_TE = (native if by_kernel else linear).product(x_TD, self.weight, self.bias).float()
        best_TK, experts_TK = logits_TE.topk(self.spec.experts_per_token, dim=-1)
        return best_TK.softmax(dim=-1), experts_TK


class Softmax(nn.Module):
    """The largest values of the softmax over all experts."""

    def __init__(self, spec: SoftmaxSpec) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.dim))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(T, D) to float32 weights (T, K) and int64 experts (T, K), the best first."""
        scores_TE = logits(x_TD, self.weight).softmax(dim=-1)
        _, experts_TK = within_groups(scores_TE, self.spec, best=1).topk(self.spec.experts_per_token, dim=-1)
        return weighted(scores_TE.gather(-1, experts_TK), self.spec), experts_TK


class Sigmoid(nn.Module):
    """The largest values of the sigmoid and a bias; the weights are those of the sigmoid."""

    def __init__(self, spec: SigmoidSpec) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.dim))
        self.bias = nn.Parameter(torch.empty(spec.num_experts))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(T, D) to float32 weights (T, K) and int64 experts (T, K), the best first."""
        scores_TE = logits(x_TD, self.weight).sigmoid()
        biased_TE = within_groups(scores_TE + self.bias, self.spec, best=2)
        _, experts_TK = biased_TE.topk(self.spec.experts_per_token, dim=-1)
        return weighted(scores_TE.gather(-1, experts_TK), self.spec), experts_TK


def logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """x W^T in float32, (T, E)."""
    return mixture.logits(x_TD, weight_ED) if _runs(x_TD, weight_ED) else F.linear(x_TD.float(), weight_ED.float())


def _runs(x_TD: Tensor, weight_ED: Tensor) -> bool:
    """Whether kernels multiply these, however many rows: which experts a row gets must not depend on its neighbours."""
    return mixture.runs(x_TD) and weight_ED.dtype is x_TD.dtype and weight_ED.is_contiguous()


def within_groups(scores_TE: Tensor, spec: SoftmaxSpec | SigmoidSpec, *, best: int) -> Tensor:
    """The scores, minus infinity outside of each token's groups: those whose `best` highest scores add up to most."""
    if spec.groups_per_token == spec.groups:
        return scores_TE
    grouped_TGE = scores_TE.unflatten(-1, (spec.groups, -1))
    _, groups_TK = grouped_TGE.topk(best, dim=-1)[0].sum(-1).topk(spec.groups_per_token, dim=-1)
    outside_TG = torch.ones_like(grouped_TGE[..., 0], dtype=torch.bool).scatter_(-1, groups_TK, False)
    inside_TE: Tensor = grouped_TGE.masked_fill(outside_TG.unsqueeze(-1), float("-inf")).flatten(-2)
    return inside_TE


def weighted(weights_TK: Tensor, spec: SoftmaxSpec | SigmoidSpec) -> Tensor:
    """The weights of the chosen experts, normalised and scaled as the Spec says."""
    if spec.normalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return weights_TK * spec.scale
