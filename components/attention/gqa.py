"""Grouped-query attention; multi-head and multi-query attention are cases of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.components.attention.scaling import scaled
from zoo.components.attention.spec import AttentionSpec
from zoo.components.build import make
from zoo.components.linear import Linear
from zoo.components.step import KVState, Step


class Attention(nn.Module):
    """Projects to queries, keys and values in one product, turns them, attends, projects back."""

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
        self.heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        self.qkv = Linear(spec.dim, sum(self.heads) * spec.head_dim, bias=spec.qkv_bias)
        self.o = Linear(spec.num_heads * spec.head_dim, spec.output, bias=spec.o_bias)
        children = spec.children()
        self.q_norm = make(children["q_norm"]) if "q_norm" in children else None
        self.k_norm = make(children["k_norm"]) if "k_norm" in children else None
        self.rope = None if spec.rope is None else make(spec.rope)
        self.sinks = nn.Parameter(torch.empty(spec.num_heads)) if spec.sinks else None

    def forward(self, x_TD: Tensor, step: Step, state: KVState, added_TI: Tensor | None = None) -> Tensor:
        """(T, D) to (T, D); appends this step's keys and values to `state`.

        added: what is added to queries, keys and values side by side, by one that shares the weights with others.
        """
        spec, qkv_TI = self.spec, self.qkv(x_TD)
        qkv_TAd = (qkv_TI if added_TI is None else qkv_TI + added_TI).view(-1, sum(self.heads), spec.head_dim)
        qk_TAd, v_TGd = qkv_TAd.split_with_sizes((spec.num_heads + spec.num_kv_heads, spec.num_kv_heads), 1)
        if self.q_norm is not None and self.k_norm is not None:
            q_THd, k_TGd = qk_TAd.split_with_sizes(self.heads[:2], 1)
            qk_TAd = torch.cat((self._normed(self.q_norm, q_THd), self._normed(self.k_norm, k_TGd)), dim=1)
        if self.rope is not None:
            qk_TAd = self.rope(qk_TAd, step)
        q_THd, k_TGd = qk_TAd.split_with_sizes(self.heads[:2], 1)
        if spec.query_scaling is not None:
            q_THd = scaled(q_THd, spec.query_scaling, step)
        o_THd = state.attend(
            q_THd, k_TGd, v_TGd, scale=self.scale, window=spec.window, softcap=spec.softcap, sinks_H=self.sinks
        )
        o_TD: Tensor = self.o(o_THd.flatten(1))
        return o_TD

    def _normed(self, norm: nn.Module, x_THd: Tensor) -> Tensor:
        whole = self.spec.qk_norm_span == "projection"
        normed_THd: Tensor = norm(x_THd.flatten(1)).view(x_THd.shape) if whole else norm(x_THd)
        return normed_THd
