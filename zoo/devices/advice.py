"""On how many devices a model would fit that does not fit on those that it was to run on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from zoo.costs.memory import MemoryPlan
from zoo.device import memory_free
from zoo.devices.cut import Load
from zoo.devices.mesh import Wish, lay_out
from zoo.devices.shares import Part
from zoo.registry.errors import RequestError
from zoo.registry.plan import Plan

if TYPE_CHECKING:
    from zoo.devices.run import Spread

MACHINES = 64
"""Up to how many machines are thought of."""

Advice = Callable[[MemoryPlan], list[str]]


def elsewhere(plan: Plan, spread: Spread | None, device: torch.device) -> Advice | None:
    """What names the devices over which a run would fit; None where more of them add no memory, as on one CPU.

    spread: how the run is laid out now.
    """
    if spread is not None and not spread.own:
        near, size = spread.near, spread.mesh.size
        if size == near:
            return None
        frees = [free_for_each(spread, device)] * (MACHINES * near)
        return partial(fewest, plan=plan, frees=frees, counts=range(size + near, len(frees) + 1, near), near=near)
    size, count = 1 if spread is None else spread.mesh.size, torch.cuda.device_count()
    if device.type != "cuda" or count <= size:
        return None
    frees = [memory_free(torch.device("cuda", number)) for number in range(count)]
    return partial(fewest, plan=plan, frees=frees, counts=range(size + 1, count + 1))


def free_for_each(spread: Spread | None, device: torch.device) -> int:
    """Bytes that a rank on this device may take: of a machine's main memory, its share."""
    sharing = spread.near if spread is not None and device.type == "cpu" else 1
    return memory_free(device) // sharing


def fewest(
    short: MemoryPlan, *, plan: Plan, frees: Sequence[int], counts: Iterable[int], near: int | None = None
) -> list[str]:
    """The fewest devices over which a run fits that does not fit as it is, or else those with the longest context;
    nothing where it fits nowhere.

    plan: the whole model's. frees: bytes that each device has for itself. counts: numbers of devices to try.
    near: how many of them are on one machine of several.
    """
    best, length = "", 0
    for count in counts:
        found = _longest(short, plan, frees[:count], near)
        if found > length:
            best = f"--devices {count}" if near is None else f"torchrun over {count // near} machines"
            best, length = best if count > 1 else "--device cuda", found
        if length == short.context:
            return [best]
    return [f"{best} with --max-context {length}"] if length else []


def _longest(short: MemoryPlan, plan: Plan, frees: Sequence[int], near: int | None) -> int:
    """The longest context that these devices together hold."""
    work = short.work
    if len(frees) == 1:
        return replace(short, work=replace(work, plan=plan), free=frees[0]).largest_context(short.context)
    from zoo.devices.run import Spread

    wanted = Wish(len(frees))
    try:
        spread = Spread(lay_out(plan.model, wanted, near), wanted, 0, own=True)
    except RequestError:
        return 0
    mesh = spread.cut(plan, Load(work.dtype, work.quantize, short.context), "cpu", frees).mesh
    parts = [replace(work, plan=Part.of(plan, mesh, rank).local) for rank in range(mesh.size)]
    needs = [replace(short, work=part, free=free) for part, free in zip(parts, frees, strict=True)]
    # The model that guesses is on the first one only.
    needs = [needs[0], *(replace(need, guesser=None) for need in needs[1:])]
    return min(need.largest_context(short.context) for need in needs)
