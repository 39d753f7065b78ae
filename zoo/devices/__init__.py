"""One model over several devices: the plan, each rank's share, the processes, and what they say to each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from zoo.registry.errors import ZooError

if TYPE_CHECKING:
    from zoo.device import Placement
    from zoo.devices.run import Run, Spread
    from zoo.registry.plan import Plan


P = ParamSpec("P")
R = TypeVar("R")


def reported(function: Callable[P, R]) -> Callable[P, R]:
    """Of the processes that torchrun has started, tells the others of an error before they have met."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except ZooError as error:
            if "WORLD_SIZE" in os.environ:
                from zoo.devices.meet import report

                report(error)
            raise

    return call


@contextmanager
def running(
    spread: Spread | None, plan: Plan, placement: Placement, source: str | Path, quantize: str | None, context: int
) -> Iterator[Run | None]:
    """Ranks that load a model together, None for one alone; nobody is left behind when it cannot be loaded.

    context: the longest sequence."""
    if spread is None:
        yield None
        return
    from zoo.devices.run import open_run

    run = open_run(spread, plan, placement, source, quantize, context)
    try:
        yield run
    except BaseException:
        run.ranks.close()
        raise
