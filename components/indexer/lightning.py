"""The lightning indexer: small heads score earlier tokens, of which a query sees the best."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.components.attention.kernels import visible
from zoo.components.attention.scaling import SSMax
from zoo.components.build import make
from zoo.components.indexer.shared import CHOSEN
from zoo.components.indexer.spec import LightningIndexerSpec
from zoo.components.linear import Linear
from zoo.components.step import Cached, Step


class LightningIndexer(nn.Module):
    """Keys to cache, and the choice among cached ones."""

    def __init__(self, spec: LightningIndexerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.q_norm = nn.LayerNorm(spec.dim, eps=spec.norm_eps)
        self.q = Linear(spec.dim, spec.num_heads * spec.head_dim)
        self.k = Linear(spec.dim, spec.head_dim)
        self.k_norm = nn.LayerNorm(spec.head_dim, eps=spec.norm_eps)
        self.weights = Linear(spec.dim, spec.num_heads)
        self.ssmax = SSMax(spec.num_heads) if spec.ssmax else None
        self.rope = None if spec.rope is None else make(spec.rope)

    def keys(self, x_TD: Tensor, step: Step) -> Tensor:
        """What is cached of each token, (T, d)."""
        return self._turned(self.k_norm(self.k(x_TD)).unsqueeze(1), step).squeeze(1)

    def choose(self, x_TD: Tensor, cached: Sequence[Cached], step: Step) -> list[Tensor | None]:
        """Which cached tokens each row sees, (rows, S) bool for every item of `cached`; None where it sees all.

        The last lanes of what is cached are the keys.
        """
        spec, first = self.spec, 0
        q_THd = self.q(self.q_norm(x_TD)).view(-1, spec.num_heads, spec.head_dim)
        q_THd = self._turned(q_THd if self.ssmax is None else self.ssmax(q_THd, step), step)
        weights_TH = self.weights(x_TD.to(self.weights.weight.dtype)).float() * spec.num_heads**-0.5
        chosen: list[Tensor | None] = []
        for item in cached:
            last = first + item.rows * len(item.kept_BSm)
            chosen.append(self._of(item, q_THd[first:last], weights_TH[first:last]))
            first = last
        step.memo[CHOSEN] = chosen
        return chosen

    def _of(self, cached: Cached, q_THd: Tensor, weights_TH: Tensor) -> Tensor | None:
        rows, keys = cached.rows, cached.kept_BSm.shape[1]
        if keys <= self.spec.top_k:
            return None
        k_BSd = cached.kept_BSm[..., -self.spec.head_dim :].float()
        q_BNd = q_THd.float().view(len(k_BSd), -1, self.spec.head_dim)
        scores_BNS = (q_BNd @ k_BSd.transpose(1, 2) * self.spec.head_dim**-0.5).relu_()
        scores_THS = scores_BNS.view(-1, self.spec.num_heads, keys)
        scores_TS = (weights_TH.unsqueeze(1) @ scores_THS).squeeze(1)
        seen_TS = visible(rows, keys - rows, None, q_THd.device) if cached.seen_BS is None else cached.seen_BS
        return best(scores_TS.masked_fill(~seen_TS, float("-inf")), self.spec.top_k) & seen_TS

    def _turned(self, x_THd: Tensor, step: Step) -> Tensor:
        if self.rope is None:
            return x_THd
        lanes = self.spec.rope_head_dim
        return torch.cat((self.rope(x_THd[..., :lanes], step), x_THd[..., lanes:]), -1)


def best(scores_TS: Tensor, count: int) -> Tensor:
    """The `count` largest of every row, as bool; of equal ones the first, however many stand behind them."""
    least_T1 = scores_TS.topk(count).values[:, -1:]
    above_TS, equal_TS = scores_TS > least_T1, scores_TS == least_T1
    room_T1 = count - above_TS.sum(-1, keepdim=True)
    return above_TS | (equal_TS & (equal_TS.cumsum(-1) <= room_T1))
