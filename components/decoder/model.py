"""The skeleton of every language model."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from zoo.components.block.sharing import connect
from zoo.components.build import make
from zoo.components.decoder.spec import DecoderSpec
from zoo.components.linear import Linear, product
from zoo.components.rope.rotary import LeRoPE
from zoo.components.step import EMBEDDINGS, Step


class Decoder(nn.Module):
    """Embedding, blocks, norm, head. stages: of how many the whole model is made, where this is one of them."""

    stages: int = 1

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed = Embedding(spec.vocab_size, spec.dim)
        self.layers = nn.ModuleList(make(layer) for layer in spec.layers)
        connect(self.layers)
        self.norm = make(spec.norm)
        self.lerope = LeRoPE(spec.parameters()["lerope.alpha"].shape[0]) if spec.lerope else None
        for name, encoder in spec.encoders().items():
            self.add_module(name, make(encoder))
        self.head = None if spec.tied_embeddings else Linear(spec.dim, spec.vocab_size)

    def forward(self, tokens_T: Tensor, step: Step, rows: Tensor | None = None) -> Tensor:
        """Float32 logits (R, V) of the given rows of the step (int64), of all rows when None."""
        x_TD = self.hidden(tokens_T, step)
        return self.logits(x_TD if rows is None else x_TD[rows])

    def hidden(self, tokens_T: Tensor, step: Step) -> Tensor:
        """The normalised output of the last block, (T, D)."""
        x_TD = self.entered(tokens_T, step)
        for layer, state in zip(self.layers, step.states, strict=True):
            x_TD = layer(x_TD, step, state)
        normed_TD: Tensor = self.norm(x_TD)
        return normed_TD

    def entered(self, tokens_T: Tensor, step: Step) -> Tensor:
        """What the first block reads, (T, D)."""
        x_TD: Tensor = self.embed(tokens_T)
        if self.spec.embedding_scale is not None:
            x_TD = x_TD * _rounded(self.spec.embedding_scale, x_TD.dtype)
        if step.media is not None:
            x_TD = x_TD.index_copy(0, step.media.rows_N, step.media.values_ND.to(x_TD.dtype))
        if self.lerope is not None:
            self.lerope(step)
        if self.spec.shared:
            step.memo[EMBEDDINGS] = x_TD
        return x_TD

    def pieces(self, rows: int, device: torch.device) -> int:
        """Into how many pieces a step of so many rows is best cut, which are computed one after the other."""
        return 1

    def turns(self, rows: int, device: torch.device) -> int:
        """In how many groups so many sequences that decode are best computed, whose steps begin one after the other."""
        return 1

    def brought(self, x_TD: Tensor) -> Tensor:
        """What `hidden` gave, where it is asked for: here."""
        return x_TD

    def logits(self, x_RD: Tensor) -> Tensor:
        """Float32 logits (R, V) of normalised rows."""
        logits_RV = (product(x_RD, self.embed.weight) if self.head is None else self.head(x_RD)).float()
        if self.spec.logits_divisor is not None:
            logits_RV = logits_RV / self.spec.logits_divisor
        if self.spec.logits_softcap is not None:
            logits_RV = self.spec.logits_softcap * torch.tanh(logits_RV / self.spec.logits_softcap)
        return logits_RV


@cache
def _rounded(value: float, dtype: torch.dtype) -> float:
    """A factor as the models were trained with it: in their own precision."""
    return float(torch.tensor(value, dtype=dtype, device="cpu"))


class Embedding(nn.Module):
    """A table of one vector per token id."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))

    def forward(self, tokens_T: Tensor) -> Tensor:
        """(T,) to (T, D)."""
        return nn.functional.embedding(tokens_T, self.weight)
