"""What multiplies queries by their positions, so that attention stays sharp over long contexts."""

from __future__ import annotations

import torch
from torch import Tensor

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
