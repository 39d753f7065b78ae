"""Mixture of experts, computed on tokens grouped by expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.components.build import load, make
from zoo.components.ffn.spec import MoESpec
from zoo.components.linear import product
from zoo.components.matrix import Holder, Index, Matrix
from zoo.components.native import mixture
from zoo.components.quantised import grouped, stacked


class MoE(Holder):
    """sum_k weight_k expert_k(x) over the experts that the router chooses for each token."""

    MATRICES: ClassVar[tuple[str, ...]] = ("experts_in", "experts_down")

    def __init__(self, spec: MoESpec) -> None:
        super().__init__()
        self.spec = spec
        hidden, width = spec.form.hidden_dim, sum(spec.form.inputs.values())
        self.between: Callable[[Any, Tensor], Tensor] = load(spec.form.module).between
        self.first, end = spec.experts
        self.count = end - self.first
        self.experts_in = nn.Parameter(torch.empty(self.count, width, spec.dim))
        self.experts_down = nn.Parameter(torch.empty(self.count, spec.dim, hidden))
        self.experts_in_bias = nn.Parameter(torch.empty(self.count, width)) if spec.biased else None
        self.experts_down_bias = nn.Parameter(torch.empty(self.count, spec.dim)) if spec.biased else None
        self.router = make(spec.router)
        self.shared = None if spec.shared is None else make(spec.shared)
        self._known: dict[str, mixture.Experts | None] = {}

    def put(self, name: str, matrices: Sequence[Matrix]) -> None:
        """Takes ready matrices of all experts in the place of a parameter."""
        super().put(name, matrices)
        self._settle(name)

    def replace(self, name: str, index: Index, value: Tensor) -> None:
        """Changes a piece of one expert."""
        super().replace(name, index, value)
        if name in self.stored:
            self._settle(name)

    def _settle(self, name: str) -> None:
        """Arranges new matrices as kernels want them."""
        self.stored[name] = stacked(self.stored[name])
        self._known[name] = mixture.Experts.of(self.stored[name])

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) to (T, D)."""
        weights_TK, experts_TK = self.router(x_TD)
        if self.count < self.spec.num_experts:
            experts_TK = self._own(experts_TK)
        known = [self._known.get(name) for name in self.MATRICES]
        if mixture.runs(x_TD) and None not in known:
            way = self._by_kernels
        else:
            way = self._by_expert if x_TD.device.type == "cpu" else self._grouped
        routed_TD = way(x_TD, weights_TK, experts_TK)
        return routed_TD if self.shared is None else routed_TD + self.shared(x_TD)

    def _own(self, experts_TK: Tensor) -> Tensor:
        """Experts by their place among those that are held here; the number behind the last for all others."""
        places_TK = experts_TK - self.first
        return places_TK.masked_fill((places_TK < 0) | (places_TK >= self.count), self.count)

    def _expert(self, index: int, x_TD: Tensor) -> Tensor:
        first, down = self.matrix("experts_in", index), self.matrix("experts_down", index)
        in_bias, down_bias = _of(self.experts_in_bias, index), _of(self.experts_down_bias, index)
        return product(self.between(self.spec.form, product(x_TD, first, in_bias)), down, down_bias)

    def _by_kernels(self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        """All experts by kernels that read the choices themselves, so that the host need not know them."""
        into, down = (self._known[name] for name in self.MATRICES)
        assert into is not None and down is not None
        order = mixture.order(experts_TK, self.count)
        first_NR = mixture.products(into, x_TD, order, self.experts_in_bias, ordered=False)
        hidden_NF = self.between(self.spec.form, first_NR)
        y_ND = mixture.products(down, hidden_NF, order, self.experts_down_bias, ordered=True)
        return mixture.weighted(y_ND, order, weights_TK)

    def _by_expert(self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        """One product per chosen expert, for matrices of any kind. Choices become numbers of the host."""
        if len(x_TD) == 1 and self.count == self.spec.num_experts:
            y_KD = torch.cat([self._expert(e, x_TD) for e in experts_TK[0].tolist()])
            return (y_KD * weights_TK.view(-1, 1)).sum(0, keepdim=True).to(x_TD.dtype)
        order_N, tokens_N = _sorted(experts_TK)
        counts = torch.bincount(experts_TK.flatten(), minlength=self.count).tolist()[: self.count]
        order_N, tokens_N = order_N[: sum(counts)], tokens_N[: sum(counts)]
        x_ND, weights_N1 = x_TD[tokens_N], weights_TK.flatten()[order_N].unsqueeze(1)
        groups = [self._expert(e, rows) for e, rows in enumerate(torch.split(x_ND, counts)) if len(rows)]
        return _combined(x_TD, torch.cat(groups) if groups else x_ND, weights_N1, tokens_N)

    def _grouped(self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        """All experts in one grouped product; group borders stay on the device."""
        order_N, tokens_N = _sorted(experts_TK)
        counts_E = torch.zeros(self.count + 1, dtype=torch.int32, device=x_TD.device)
        counts_E.index_add_(0, experts_TK.flatten(), torch.ones_like(tokens_N, dtype=torch.int32))
        ends_E = counts_E[: self.count].cumsum(0, dtype=torch.int32)
        experts_N = experts_TK.flatten()[order_N].clamp(max=self.count - 1)
        first_NR = self._each("experts_in", x_TD[tokens_N], ends_E)
        hidden_NF = self.between(self.spec.form, _plus(first_NR, self.experts_in_bias, experts_N))
        y_ND = self._each("experts_down", hidden_NF, ends_E)
        y_ND = _plus(y_ND, self.experts_down_bias, experts_N)
        # Back in the tokens' order and added up there: a device adds to one place in no certain order.
        y_TKD = y_ND[order_N.argsort()].unflatten(0, experts_TK.shape)
        if self.count < self.spec.num_experts:
            y_TKD = y_TKD.masked_fill((experts_TK == self.count).unsqueeze(-1), 0)
        total_TD: Tensor = (y_TKD * weights_TK.unsqueeze(-1)).sum(1)
        return total_TD.to(x_TD.dtype)

    def _each(self, name: str, x_NI: Tensor, ends_E: Tensor) -> Tensor:
        """Rows that stand expert by expert, each times the matrix of its expert."""
        if name in self.stored:
            return grouped(self.stored[name], x_NI, ends_E)
        return F.grouped_mm(x_NI, self.get_parameter(name).transpose(1, 2), offs=ends_E)


def moe_reference(moe: MoE, x_TD: Tensor) -> Tensor:
    """Every expert on every token, weighted with what the router gives it, else with zero."""
    weights_TK, experts_TK = moe.router(x_TD)
    total_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    for e in range(moe.spec.num_experts):
        share_T1 = (weights_TK * (experts_TK == e)).sum(-1, keepdim=True)
        first_TR = F.linear(x_TD, moe.experts_in[e], _of(moe.experts_in_bias, e))
        hidden_TF = moe.between(moe.spec.form, first_TR)
        total_TD = total_TD + share_T1 * F.linear(hidden_TF, moe.experts_down[e], _of(moe.experts_down_bias, e))
    routed_TD = total_TD.to(x_TD.dtype)
    return routed_TD if moe.shared is None else routed_TD + moe.shared(x_TD)


def _of(bias_EO: Tensor | None, expert: int) -> Tensor | None:
    return None if bias_EO is None else bias_EO[expert]


def _plus(y_NO: Tensor, bias_EO: Tensor | None, experts_N: Tensor) -> Tensor:
    """Each row with the bias of its expert, where experts have biases."""
    return y_NO if bias_EO is None else y_NO + bias_EO[experts_N]


def _sorted(experts_TK: Tensor) -> tuple[Tensor, Tensor]:
    """The (token, choice) pairs ordered by expert: their places in the flat (T K) list, and their tokens."""
    order_N = experts_TK.flatten().argsort(stable=True)
    return order_N, order_N // experts_TK.shape[1]


def _combined(x_TD: Tensor, y_ND: Tensor, weights_N1: Tensor, tokens_N: Tensor) -> Tensor:
    """Each token's weighted sum, in the weights' float32 or in what is wider."""
    weighted_ND = y_ND * weights_N1
    total_TD = torch.zeros_like(x_TD, dtype=weighted_ND.dtype)
    return total_TD.index_add(0, tokens_N, weighted_ND).to(x_TD.dtype)
