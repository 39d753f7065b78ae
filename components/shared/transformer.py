"""A transformer block that several layers use, each with low-rank terms of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.components.build import make
from zoo.components.linear import Linear
from zoo.components.shared.spec import QKV, AdapterSpec, TransformerSpec
from zoo.components.step import Step


class Transformer(nn.Module):
    """ffn(norm(attention(norm((x, embeddings))))) without residual connections."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        children = spec.children()
        self.mixer_norm = make(children["mixer_norm"])
        self.mixer = make(children["mixer"])
        self.ffn_norm = make(children["ffn_norm"])
        self.ffn = make(children["ffn"])
        self.adapters = nn.ModuleDict({str(use): make(children[f"adapters.{use}"]) for use in spec.uses})

    def forward(self, x_TD: Tensor, embeddings_TD: Tensor, step: Step, state: Any, use: int) -> Tensor:
        """(T, D) and (T, D) to (T, D); `state` is the one of this use."""
        adapter = self.adapters[str(use)]
        assert isinstance(adapter, Adapter)
        wide_TI = self.mixer_norm(torch.cat((x_TD, embeddings_TD), dim=1))
        mixed_TD = self.ffn_norm(self.mixer(wide_TI, step, state, adapter.qkv(wide_TI)))
        given_TD: Tensor = self.ffn(mixed_TD, adapter.gate_up(mixed_TD))
        return given_TD


class Adapter(nn.Module):
    """The low-rank terms of one use."""

    def __init__(self, spec: AdapterSpec) -> None:
        super().__init__()
        self.gate_up_down = Linear(spec.dim, spec.rank)
        self.gate_up_up = Linear(spec.rank, 2 * spec.hidden_dim)
        self.qkv_down = Linear(2 * spec.dim, 3 * spec.rank) if spec.widths else None
        for name, width in zip(QKV, spec.widths, strict=False):
            self.add_module(f"{name}_up", Linear(spec.rank, width))

    def gate_up(self, x_TD: Tensor) -> Tensor:
        """What is added to gate and up side by side, (T, 2 F)."""
        up_TF: Tensor = self.gate_up_up(self.gate_up_down(x_TD))
        return up_TF

    def qkv(self, x_TI: Tensor) -> Tensor | None:
        """What is added to queries, keys and values side by side; None for nothing."""
        if self.qkv_down is None:
            return None
        parts = zip(QKV, self.qkv_down(x_TI).chunk(3, dim=1), strict=True)
        return torch.cat([self.get_submodule(f"{name}_up")(down_TL.contiguous()) for name, down_TL in parts], dim=1)
