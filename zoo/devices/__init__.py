"""One model over several devices: the plan, each rank's share, the processes, and what they say to each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.device import Placement
    from zoo.devices.run import Run, Spread
    from zoo.registry.plan import Plan


@contextmanager
def running(
    spread: Spread | None, plan: Plan, placement: Placement, source: str | Path, quantize: str | None
) -> Iterator[Run | None]:
    """Ranks that load a model together, None for one alone; nobody is left behind when it cannot be loaded."""
    if spread is None:
        yield None
        return
    from zoo.devices.run import open_run

    run = open_run(spread, plan, placement, source, quantize)
    try:
        yield run
    except BaseException:
        run.ranks.close()
        raise
