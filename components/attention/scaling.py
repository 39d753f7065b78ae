"""What multiplies queries by their positions, so that attention stays sharp over long contexts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.components.attention.spec import QueryScaling
from zoo.components.step import Step


def scaled(q_THd: Tensor, scaling: QueryScaling, step: Step) -> Tensor:
    """Queries times what `query_scale` says of their rows, in their own dtype."""
    return (q_THd * query_scale(scaling, step)).to(q_THd.dtype)


def query_scale(scaling: QueryScaling, step: Step) -> Tensor:
    """1 + beta ln(1 + floor(position / original_context)) of every row, (T, 1, 1) float32."""

    def make_scale() -> Tensor:
        passed_T = torch.floor(step.positions_T / scaling.original_context)
        return (1 + scaling.beta * torch.log1p(passed_T)).view(-1, 1, 1)

    return step.once(("query_scaling", scaling), make_scale)


class SSMax(nn.Module):
    """Scalable softmax: queries times s ln(position + 1) + b, learned for each head (arXiv 2501.19399)."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(num_heads))
        self.bias = nn.Parameter(torch.empty(num_heads))

    def forward(self, q_THd: Tensor, step: Step) -> Tensor:
        """(T, H, d) in its own dtype; the arithmetic is float32."""
        log_T1 = step.once("ssmax", lambda: torch.log1p(step.positions_T.float()).unsqueeze(1))
        factor_TH = self.scale.float() * log_T1 + self.bias.float()
        return (q_THd * factor_TH.unsqueeze(-1)).to(q_THd.dtype)
