"""States that keep nothing: every sequence is whole within the step. For training and for one-off logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.components.attention.kernels import Memo, Scores, attention


class FreshKV:
    """Attention over the rows of the step alone; gradients flow through it."""

    def __init__(self, rows: Sequence[int]) -> None:
        self.rows = list(rows)
        self.memo: Memo = {}

    def attend(
        self,
        q_THd: Tensor,
        k_TGd: Tensor,
        v_TGd: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """Causal attention within each sequence, (T, H, d)."""
        parts = zip(
            torch.split(q_THd, self.rows), torch.split(k_TGd, self.rows), torch.split(v_TGd, self.rows), strict=True
        )
        how: Scores = {"scale": scale, "window": window, "softcap": softcap, "sinks_H": sinks_H}
        return torch.cat(
            [attention(q, k.transpose(0, 1), v.transpose(0, 1), past=0, memo=self.memo, **how) for q, k, v in parts]
        )
