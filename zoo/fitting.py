"""Whether a model fits where it is to run, before anything of it is read."""

from __future__ import annotations

from typing import Literal

from zoo.costs.memory import PROCESS_BYTES, MemoryPlan
from zoo.costs.work import Work
from zoo.device import Placement
from zoo.devices.advice import elsewhere, free_for_each
from zoo.devices.run import Spread
from zoo.loading.fill import storing
from zoo.machine import resident_memory
from zoo.registry.plan import Plan


def fitting(
    plan: Plan,
    spread: Spread | None,
    placement: Placement,
    context: int,
    quantize: str | None,
    guesser: Literal["lookup"] | Plan | None = None,
    *,
    asked: bool,
) -> MemoryPlan:
    """What one sequence of `context` tokens needs, beside what the device has free: on each of several devices, its
    part. guesser: what guesses tokens. asked: whether somebody asked for so many tokens.

    Raises CapacityError for a model that does not run, or not as asked, and RequestError for matrices that the device
    cannot store so.
    """
    here, local = placement.device, plan if spread is None else spread.part(plan).local
    storing(local, here, quantize)
    found = MemoryPlan(
        Work(local, placement.dtype_name, quantize),
        context,
        free_for_each(spread, here),
        device=here.type,
        process=max(0, PROCESS_BYTES - resident_memory()) if here.type == "cpu" else 0,
        guesser=Work(guesser, placement.dtype_name, quantize) if isinstance(guesser, Plan) else None,
        asked=asked,
        elsewhere=elsewhere(plan, spread, here),
    )
    if not found.runs:
        raise found.refusal(str(here))
    return found
