"""Starts a run over several devices: from what a user asks for to ranks that have loaded their parts."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from zoo.components.decoder.model import Decoder
from zoo.components.decoder.spec import DecoderSpec
from zoo.costs.memory import CACHE_SHARE
from zoo.device import Placement, memory_free
from zoo.devices.channel import Channel
from zoo.devices.cut import Load, cut
from zoo.devices.lead import Ranks
from zoo.devices.likeness import traits
from zoo.devices.meet import join_started, start, started
from zoo.devices.mesh import Mesh, Wanted, Wish, device_of, lay_out, wish
from zoo.devices.setup import Setup
from zoo.devices.shares import Part, join
from zoo.engine.engine import Engine
from zoo.inspection import Inspection
from zoo.registry.environment import whole
from zoo.registry.errors import RequestError
from zoo.registry.plan import Plan
from zoo.units import human_bytes


@dataclass(frozen=True)
class Spread:
    """How a model is laid out over devices, before anything is started. rank: this process's."""

    mesh: Mesh
    wish: Wish
    rank: int
    own: bool

    def part(self, plan: Plan) -> Part:
        """What this process holds."""
        return Part.of(plan, self.mesh, self.rank)

    def device(self, name: str) -> str:
        """Where this process computes, for `device`. Raises RequestError where there are fewer devices than ranks."""
        if self.wish.names:
            return self.wish.device(name, self.rank)
        kind = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        if kind not in ("cpu", "cuda"):
            raise RequestError(
                "one device cannot be several",
                where="device",
                found=repr(name),
                expected="cpu or cuda, and devices for how many",
                hint='name them: devices=["cuda:0", "cuda:2"]',
            )
        if kind == "cuda" and torch.cuda.device_count() < self.near:
            raise RequestError(
                "there are fewer devices than asked for",
                where="devices",
                found=f"{torch.cuda.device_count()} CUDA devices",
                expected=str(self.near),
                hint="`--device cpu` runs each rank as a process on the CPU",
            )
        return device_of(kind, self.rank)

    def laid(self, plan: Plan, placement: Placement, quantize: str | None, context: int) -> Self:
        """With the stages cut for what their devices hold, and have free where that is known."""
        return self.cut(plan, load_of(placement, quantize, context), str(placement.device))

    def cut(self, plan: Plan, load: Load, device: str, frees: Sequence[int] | None = None) -> Self:
        """With the stages cut for what their devices hold, and have free where that is known.

        device: where this process computes. frees: bytes by rank; None: those of this machine's devices.
        """
        mesh = self.mesh
        if mesh.pp == 1:
            return self
        if frees is None and self.own and torch.device(device).type == "cuda":
            frees = [
                memory_free(torch.device(self.wish.names[r] if self.wish.names else f"cuda:{r}")) for r in self._all
            ]
        room = None if frees is None else [min(frees[r] for r in mesh.near(s * mesh.tp)) for s in range(mesh.pp)]
        model = plan.model.divided(mesh.share(0))
        assert isinstance(model, DecoderSpec)
        return replace(self, mesh=replace(mesh, borders=cut(model, mesh.pp, load, room)))

    def describe(self, plan: Plan, placement: Placement, quantize: str | None, context: int) -> str:
        """The layout, and what each rank holds, in words."""
        load = load_of(placement, quantize, context)
        needs = [_need(Part.of(plan, self.mesh, rank), load) for rank in self._all]
        whole = f"{self.mesh.size} devices ({self.mesh})"
        if self.mesh.pp == 1:
            return f"{whole}, {_between(needs)} on each"
        stages = []
        for first in range(0, self.mesh.size, self.mesh.tp):
            start, stop = self.mesh.layers(plan.model, first)
            stages.append(f"layers {start} to {stop - 1}: {_between([needs[r] for r in self.mesh.near(first)])}")
        return f"{whole}; {'; '.join(stages)}"

    @property
    def _all(self) -> range:
        return range(self.mesh.size)

    @property
    def near(self) -> int:
        """Ranks on this machine."""
        return self.mesh.size if self.own else whole("LOCAL_WORLD_SIZE", self.mesh.size)


def load_of(placement: Placement, quantize: str | None, context: int) -> Load:
    """What is reckoned as a device's load."""
    return Load(placement.dtype_name, quantize, context)


def _need(part: Part, load: Load) -> tuple[int, int, int]:
    """Bytes of a rank's weights, and of its cache for a sequence of so many tokens."""
    plan = Inspection(part.whole.card, part.local, load.dtype, None, {}, load.quantize)
    return plan.weight_bytes, plan.cache_bytes(load.context), load.context


def _between(needs: Sequence[tuple[int, int, int]]) -> str:
    """What ranks that are alike need."""
    weights, caches, (tokens, *_) = zip(*needs, strict=True)
    return f"{_span(weights)} of weights and {_span(caches)} of cache for {tokens} tokens"


def _span(sizes: Sequence[int]) -> str:
    low, high = human_bytes(min(sizes)), human_bytes(max(sizes))
    return low if low == high else f"{low} to {high}"


def spread(plan: Plan, wanted: Wanted) -> Spread | None:
    """The layout for `devices`, or for the processes that torchrun has started; None for one device.

    Raises RequestError for what means nothing, does not divide, or is not as torchrun has it.
    """
    found, asked = started(), wish(wanted)
    if found is None or (asked.count == 1 and wanted is not None):
        return None if asked.count == 1 else Spread(lay_out(plan.model, asked), asked, 0, own=True)
    rank, size = found
    if wanted is None:
        asked = Wish(size)
    if asked.count != size:
        raise RequestError(
            "as many devices as processes are needed",
            where="devices",
            found=f"{asked.count} devices and {size} processes",
            hint="leave devices out, or start as many processes: torchrun --nproc-per-node",
        )
    near = whole("LOCAL_WORLD_SIZE", size)
    return None if size == 1 else Spread(lay_out(plan.model, asked, near), asked, rank, own=False)


@dataclass
class Run:
    """Ranks that have met. part: what this one holds."""

    spread: Spread
    part: Part
    ranks: Ranks
    placement: Placement
    quantize: str | None
    frees: list[int] = field(default_factory=list)

    def loaded(self, module: Decoder) -> None:
        """Joins the loaded module with the others'."""
        assert self.ranks.groups is not None
        join(module, self.part, *self.ranks.groups, self.placement.dtype)
        frees = [memory_free(self.placement.device), *self.ranks.hear("loaded")]
        self.frees = [free // (1 if self.placement.device.type == "cuda" else self.spread.near) for free in frees]

    def begin(self, sizes: Mapping[str, Any]) -> tuple[Ranks, dict[str, Any]]:
        """All make their engines; the first one's sizes. Of a stage's devices, the one with the least room counts."""
        mesh, whole = self.spread.mesh, self.part.whole
        stages = [mesh.near(stage * mesh.tp) for stage in range(mesh.pp)]
        budgets = [int(CACHE_SHARE * min(self.frees[rank] for rank in ranks)) for ranks in stages]
        for rank, channel in self.ranks.channels.items():
            channel.send({**sizes, "memory_bytes": budgets[mesh.stage(rank)]})
        kept = (Part.of(whole, mesh, ranks[0]).states for ranks in stages)
        self.ranks.elsewhere = [*zip(kept, budgets, strict=True)][1:]
        return self.ranks, {**sizes, "memory_bytes": budgets[0]}

    def ends_with(self, engine: Engine) -> None:
        """Ends the other ranks when nobody has the engine any more, if it was not closed before."""
        # A process that ends takes them along as it is.
        weakref.finalize(engine, self.ranks.close).atexit = False

    def __str__(self) -> str:
        return f"{self.spread.mesh.size} devices ({self.spread.mesh})"


def open_run(
    spread: Spread, plan: Plan, placement: Placement, weights: str | Path, quantize: str | None, context: int
) -> Run:
    """Starts the other ranks, or meets those that torchrun has started, and tells them what to build.

    In a process that torchrun has started as another rank, follows the first one to its end and raises SystemExit.
    """
    size = spread.mesh.size
    threads = max(1, torch.get_num_threads() // spread.near)
    has = {} if spread.own else traits(plan, placement.dtype_name, quantize, weights)
    met: Ranks | Channel
    meeting, met = start(size, threads) if spread.own else join_started(spread.rank, size)
    if isinstance(met, Channel):
        from zoo.devices.worker import serve

        sys.exit(serve(meeting, met, weights, has))
    if placement.device.type == "cpu":
        met.at_end.append(partial(torch.set_num_threads, torch.get_num_threads()))
        torch.set_num_threads(threads)
    mesh = (spread.mesh.tp, spread.mesh.pp, spread.mesh.ep)
    setup = Setup(
        plan.card.to_dict(),
        mesh,
        placement.device.type,
        placement.dtype_name,
        str(weights),
        quantize,
        threads,
        [*spread.wish.names],
        has,
    )
    met.tell(asdict(setup))
    frees = [memory_free(placement.device), *met.hear("ready")]
    if not spread.own:
        frees = [free // spread.near for free in frees] if placement.device.type == "cpu" else frees
        spread = spread.cut(plan, load_of(placement, quantize, context), str(placement.device), frees)
    met.tell({"borders": [*spread.mesh.borders]})
    met.groups = meeting.groups(spread.mesh, placement.device)
    return Run(spread, spread.part(plan), met, placement, quantize)
