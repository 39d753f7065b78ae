"""The choice of an earlier layer's indexer, used again."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from zoo.components.indexer.spec import SharedIndexerSpec
from zoo.components.step import Cached, Step

CHOSEN = "chosen keys"
"""Where the last choice of a step stands in its memo."""


class SharedIndexer(nn.Module):
    """Caches nothing and has no weights."""

    def __init__(self, spec: SharedIndexerSpec) -> None:
        super().__init__()
        self.spec = spec

    def choose(self, x_TD: Tensor, cached: Sequence[Cached], step: Step) -> list[Tensor | None]:
        """What the nearest earlier indexer chose in this step."""
        chosen: list[Tensor | None] = step.memo[CHOSEN]
        return chosen
