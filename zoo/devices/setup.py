"""What every rank is told so that it can build its part of the model, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zoo.device import Placement, choose
from zoo.devices.mesh import Mesh, device_of
from zoo.devices.shares import Part
from zoo.registry.card import Card
from zoo.registry.plan import Plan
from zoo.registry.resolve import resolve


@dataclass(frozen=True)
class Setup:
    """A run over several devices.

    card: the card as a mapping. mesh: tp, pp, ep.
    device, dtype: as `zoo.load` has chosen them for the first rank.
    names: the devices by rank, where they were named. weights: a folder or file, or "random".
    quantize: as `zoo.load` takes it.
    threads: of a rank on a CPU. traits: what the first rank has, as `zoo.devices.likeness` says it, and all must have.
    """

    card: Mapping[str, Any]
    mesh: Sequence[int]
    device: str
    dtype: str
    weights: str
    quantize: str | None
    threads: int
    names: Sequence[str] = ()
    traits: Mapping[str, str] = field(default_factory=dict)

    def plan(self) -> Plan:
        """The whole model's."""
        return resolve(Card.from_dict(self.card))

    def part(self, plan: Plan, rank: int, borders: Sequence[int]) -> Part:
        """What one rank holds of it. borders: of stages, by layers."""
        tp, pp, ep = self.mesh
        return Part.of(plan, Mesh(tp, pp, ep, tuple(borders)), rank)

    def placement(self, rank: int) -> Placement:
        """Where one rank computes."""
        name = self.names[rank] if self.names else device_of(self.device, rank)
        return choose(name, self.dtype, self.dtype)
