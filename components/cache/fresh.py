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
        # The native kernels read the positions of a head side by side, as caches keep them.
        k_GTd, v_GTd = (x.transpose(0, 1).contiguous() for x in (k_TGd, v_TGd))
        parts = zip(torch.split(q_THd, self.rows), k_GTd.split(self.rows, 1), v_GTd.split(self.rows, 1), strict=True)
        how: Scores = {"scale": scale, "window": window, "softcap": softcap, "sinks_H": sinks_H}
        return torch.cat([attention(q, k, v, past=0, memo=self.memo, **how) for q, k, v in parts])
