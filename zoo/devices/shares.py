"""Tensor parallelism: one rank's share of a model, the pieces of the checkpoint that it holds, and what ranks add up.

Components say how their parameters are split (`Split`, `Param.shard`, `Spec.sums`, `Spec.means`); this file does it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn

from zoo.components.decoder.model import Decoder
from zoo.components.decoder.spec import DecoderSpec
from zoo.devices.group import Group
from zoo.devices.mesh import Mesh, check
from zoo.devices.stage import Stage, StageSpec
from zoo.loading.pieces import Piece
from zoo.registry.plan import Plan
from zoo.registry.spec import Param, Share, Spec, StateSpec
from zoo.registry.spec import Tensor as Stored


@dataclass(frozen=True)
class Part:
    """One rank's part of a model: the plan of the whole, and of what it holds."""

    whole: Plan
    local: Plan
    mesh: Mesh
    rank: int

    @classmethod
    def of(cls, plan: Plan, mesh: Mesh, rank: int) -> Self:
        """The part of a rank. Raises IndivisibleError naming the size that cannot be shared out."""
        share = mesh.share(rank)
        check(plan.model, share)
        local = plan.model.divided(share)
        assert isinstance(local, DecoderSpec)
        if mesh.pp > 1:
            local = StageSpec.of(local, *mesh.layers(plan.model, rank))
        return cls(plan, replace(plan, model=local), mesh, rank)

    @property
    def share(self) -> Share:
        """Its share of each layer that it has."""
        return self.mesh.share(self.rank)

    @property
    def model(self) -> DecoderSpec:
        """The whole."""
        assert isinstance(self.whole.model, DecoderSpec)
        return self.whole.model

    @property
    def pieces(self) -> dict[str, Piece]:
        """What it keeps of the checkpoint's tensors."""
        return pieces(self.model, self.local.model, self.share)

    @property
    def fronted(self) -> Plan:
        """The plan that the first rank's engine sees: its own part, with the vocabulary of the whole."""
        return replace(self.local, model=self.local.model.model_copy(update={"vocab_size": self.model.vocab_size}))

    @property
    def states(self) -> tuple[StateSpec | None, ...]:
        """What each of its layers keeps of a sequence."""
        assert isinstance(self.local.model, DecoderSpec)
        return self.local.model.states()

    @property
    def widths(self) -> list[int]:
        """Rows of the vocabulary that each rank of a stage has."""
        bounds = [rank * self.model.vocab_size // self.mesh.tp for rank in range(self.mesh.tp + 1)]
        return [stop - start for start, stop in pairwise(bounds)]


def pieces(whole: Spec, local: Spec, share: Share) -> dict[str, Piece]:
    """What a rank keeps of each of the checkpoint's tensors that it holds any of, by its name in the whole model."""
    params, own, known = whole.all_parameters(), local.all_parameters(), known_as(local)
    shapes = {tensor.name: tensor.shape for tensor in whole.tensors()}
    return {
        name: _piece(tensor, shapes[name], params[known(tensor.param)], own[tensor.param], share)
        for name, tensor in ((known(tensor.name), tensor) for tensor in local.tensors())
    }


def known_as(local: Spec) -> Callable[[str], str]:
    """What a rank's modules, parameters and tensors are called in the whole model."""
    return local.whole if isinstance(local, StageSpec) else str


def _piece(tensor: Stored, shape: tuple[int, ...], param: Param, own: Param, share: Share) -> Piece:
    """The piece that becomes `tensor`. shape, param: of the whole; own: of this rank."""
    if own.once and share.rank > 0:
        return Piece(tensor, zeros=True)
    axes = [axis for axis, size in enumerate(tensor.shape) if size != shape[axis]]
    assert len(axes) <= 1, f"{tensor.name} is split along several axes"
    if not axes:
        return Piece(tensor)
    if param.segments and not param.parts:
        return Piece(tensor, axes[0], tuple(_ranges(param.segments, own.segments, share)))
    return Piece(tensor, axes[0], tuple(_ranges((shape[axes[0]],), (tensor.shape[axes[0]],), share)))


def _ranges(sizes: tuple[int, ...], own: tuple[int, ...], share: Share) -> Iterator[tuple[int, int]]:
    """Of each stretch of these sizes, the range that is this rank's, of the size that it has of it."""
    at = 0
    for size, kept in zip(sizes, own, strict=True):
        start = at + _start(size, kept, share)
        yield start, start + kept
        at += size


def _start(size: int, kept: int, share: Share) -> int:
    """Where this rank's part begins: equal parts one after the other, each for as many ranks as there are copies."""
    count, rest = divmod(size, kept)
    if not rest and share.ranks % count == 0:
        return share.rank * count // share.ranks * kept
    return share.rank * size // share.ranks


def join(module: Decoder, part: Part, world: Group, near: Group, dtype: torch.dtype) -> None:
    """Lets the module of one rank work together with the others': only the first rank has what comes out.

    world: all ranks. near: those of its stage. dtype: of the residual stream.
    """
    if part.mesh.tp > 1:
        _join_stage(module, part, near)
    if part.mesh.pp > 1:
        _join_stages(module, part, world, dtype)
    elif part.mesh.tp > 1:
        own = module.logits
        _replace(module, logits=lambda x_RD: near.join(own(x_RD), part.widths))


def _join_stage(module: Decoder, part: Part, near: Group) -> None:
    """What ranks that share out layers add up."""
    local, split = part.local.model, _split(part.model, part.local.model)
    specs, known = dict(part.model.walk()), known_as(local)
    for path, _ in local.walk():
        for name in specs[known(path)].means(part.share):
            _replace(module.get_submodule(f"{path}.{name}"), across=_mean(near))
    for path in _summed(local, ""):
        if any(name.startswith(f"{path}.") for name in split):
            module.get_submodule(path).register_forward_hook(lambda _, inputs, y: near.sum(y))
    if not isinstance(local, StageSpec) or local.begins:
        _share_embedding(module, part, near)


def _join_stages(module: Decoder, part: Part, world: Group, dtype: torch.dtype) -> None:
    """How the stream goes from stage to stage, and what comes out back to the first rank."""
    assert isinstance(module, Stage)
    stages, last, own = part.mesh.tp, part.mesh.near(part.mesh.size - 1), module.logits
    most = 4 * part.mesh.pp * (1 + len(module.given))
    module.link = link = Chain(world, part.rank, stages, part.model.dim, dtype, most)
    module.stages = part.mesh.pp

    def logits(x_RD: Tensor) -> Tensor:
        if part.rank in last:
            if len(x_RD):
                link.send(own(x_RD), 0)
            return x_RD
        if part.rank:
            return x_RD
        shape, device = len(x_RD), x_RD.device
        places = zip(last, part.widths, strict=True)
        return torch.cat([_received(torch.empty(shape, w, device=device), rank, world) for rank, w in places], dim=1)

    def brought(x_TD: Tensor) -> Tensor:
        if part.rank == last[0]:
            link.send(x_TD, 0)
        return _received(torch.empty_like(x_TD), last[0], world) if part.rank == 0 else x_TD

    _replace(module, logits=logits, brought=brought)


@dataclass(frozen=True)
class Chain:
    """The link between stages: each rank takes from the one with its share in the stage before. dim: of the stream.

    most: tensors that may be under way. With fewer than of some steps, ranks would wait for each other in a circle.
    """

    world: Group
    rank: int
    step: int
    dim: int
    dtype: torch.dtype
    most: int
    under_way: deque[Callable[[], None]] = field(default_factory=deque)

    def take(self, rows: int, widths: Sequence[int], device: torch.device) -> list[Tensor]:
        """The stream (T, D) of the stage before, and what comes with it."""
        places = [torch.empty(rows, width, dtype=self.dtype, device=device) for width in (self.dim, *widths)]
        return [self.world.receive(place, self.rank - self.step) for place in places]

    def give(self, x_TD: Tensor, others: Sequence[Tensor]) -> None:
        """The stream to the stage behind, and what goes with it."""
        for x in (x_TD, *others):
            self.send(x, self.rank + self.step)

    def send(self, x: Tensor, rank: int) -> None:
        """Without waiting until it has gone."""
        self.under_way.append(self.world.send(x, rank))
        while len(self.under_way) > self.most:
            self.under_way.popleft()()


def _received(x: Tensor, rank: int, world: Group) -> Tensor:
    return world.receive(x, rank) if x.numel() else x


def _split(whole: Spec, local: Spec) -> list[str]:
    """The parameters of which a rank holds a part: what is whole on every rank needs no sum."""
    params, known = whole.all_parameters(), known_as(local)
    return [name for name, param in local.all_parameters().items() if param.shape != params[known(name)].shape]


def _mean(group: Group) -> Callable[[Tensor], Tensor]:
    return lambda mean: group.sum(mean) / group.size


def _summed(spec: Spec, path: str) -> Iterator[str]:
    """Paths of the modules whose outputs are parts of a sum; nothing below one that is summed itself."""
    names = spec.sums()
    yield from (f"{path}.{name}".strip(".") for name in names)
    if "" not in names:
        for name, child in spec.children().items():
            yield from _summed(child, f"{path}.{name}".strip("."))


def _share_embedding(module: Decoder, part: Part, near: Group) -> None:
    """Takes each row from the rank that has it."""
    start, embed = sum(part.widths[: part.share.rank]), module.embed.forward
    stop = start + part.widths[part.share.rank]

    def embedded(tokens_T: Tensor) -> Tensor:
        inside_T = (tokens_T >= start) & (tokens_T < stop)
        x_TD = embed(torch.where(inside_T, tokens_T - start, 0))
        return near.sum(x_TD.masked_fill(~inside_T.unsqueeze(1), 0))

    _replace(module.embed, forward=embedded)


def _replace(module: nn.Module, **methods: Any) -> None:
    for name, method in methods.items():
        setattr(module, name, method)
