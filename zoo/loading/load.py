"""Weights into a module: every tensor straight to its final place, type and device, in the order of the files.

Nothing is held but the parameters themselves, those that are stored otherwise for a moment, and a buffer for each
thread: a tensor that arrives as it stays is read into its parameter's own memory, all others pass through buffers. Both
happens in pieces, which several threads read and convert at a time.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from functools import partial
from math import lcm, prod
from threading import Lock
from typing import NamedTuple

import torch
from torch import nn

from zoo.allocator import give_back_memory, return_freed_memory
from zoo.loading.crew import in_order
from zoo.loading.decode import decoded
from zoo.loading.files import WeightSet
from zoo.loading.layouts import layout_named
from zoo.loading.mapping import Placement, plan_mapping
from zoo.loading.pickled import DTYPES
from zoo.loading.pieces import Piece, narrowed, taken
from zoo.loading.reader import Progress
from zoo.loading.reading import Reader, Readers
from zoo.loading.targets import Storing, Targets
from zoo.registry.errors import WeightsError
from zoo.registry.plan import Plan
from zoo.registry.spec import Rotary, Tensor

BUFFER = 4 << 20
"""Bytes that a thread reads at a time and keeps a buffer of, unless one row of a tensor is larger."""

DECODED = 64
"""Bytes to allow for each quantised element: its code, index, float and scale, and as much again."""

DRAW = 1 << 20
"""Elements that are drawn at a time; part of what a seed means."""


class _Job(NamedTuple):
    """Rows of a source, and the place of its tensor; None where they are put. last: the tensor is whole with it."""

    placement: Placement
    place: torch.Tensor | None
    rows: tuple[int, int]
    last: bool


def load_weights(
    module: nn.Module,
    plan: Plan,
    files: WeightSet,
    *,
    device: torch.device | str = "cpu",
    storing: Storing | None = None,
    progress: Progress | None = None,
    pieces: Mapping[str, Piece] | None = None,
) -> None:
    """Fills the module's parameters, made on `device` in the type that they have on the meta device.

    pieces: what the module holds of each tensor of the plan, where it is one rank's share; only that is read.
    storing: what is stored otherwise, each matrix as soon as it is whole. Peak memory is the weights as they are
    stored, the threads' buffers, and matrices that have to be gathered first. `progress` is called with the
    bytes read and the bytes in all.
    Raises WeightsError unless the files hold exactly the plan's tensors; CapacityError when memory does not suffice.
    """
    assert sys.byteorder == "little", "the files' bytes are read as they are"
    placements = plan_mapping(plan.model, layout_named(files.layout), files.headers, files.where)
    if pieces is not None:
        placements = narrowed(placements, pieces)
    zeros = [piece.tensor for piece in (pieces or {}).values() if piece.zeros]
    order = {file: number for number, file in enumerate(files.files)}
    placements.sort(key=lambda placement: (order[placement.source.file], placement.source.start, placement.rows))
    total, done = sum(placement.nbytes for placement in placements), 0
    targets = Targets(module, [*zeros, *(p.tensor for p in placements)], torch.device(device), storing)
    for tensor in zeros:
        _pour(targets, tensor, _constant(0.0, tensor))
    return_freed_memory()
    with closing(Readers(BUFFER, torch.device(device).type == "cuda")) as readers:
        for job in in_order(partial(_do, readers, targets, Lock()), _jobs(placements, targets)):
            if not job.last:
                continue
            targets.filled(job.placement.tensor)
            done += job.placement.nbytes
            if progress:
                progress(done, total)
    give_back_memory()
    targets.check()


def fill_places(places: Iterable[tuple[torch.Tensor, Placement]]) -> None:
    """Fills tensors of the caller's own, of any type, each from its source."""
    with closing(Reader(BUFFER)) as reader:
        for place, placement in places:
            _fill(place, placement, placement.rows, reader)


def _jobs(placements: Iterable[Placement], targets: Targets) -> Iterator[_Job]:
    """The placements in pieces, in their order; in one piece where rows of the file are not those of the matrix."""
    for placement in placements:
        tensor = placement.tensor
        place, (first, last) = targets.place(tensor), placement.rows
        if place is None and (placement.transpose or last - first != tensor.shape[0]):
            yield _Job(placement, None, placement.rows, last=True)
            continue
        lanes, item = (1, 0) if place is not None else (targets.lanes(tensor), _item(targets.like(tensor).dtype))
        for rows in _pieces(placement, placement.rows, lanes, item):
            yield _Job(placement, place, rows, rows[1] == last)


def _do(readers: Readers, targets: Targets, large: Lock, job: _Job) -> None:
    """One job. large: of rows that no buffer holds, so that there is one such job at a time."""
    placement, (first, last) = job.placement, job.rows
    passing = job.place is None or not _arrives_as_it_stays(job.place, placement)
    alone = large if passing and (last - first) * placement.row_bytes > BUFFER else nullcontext()
    start = first - placement.rows[0]
    with alone, readers.one() as reader:
        if job.place is not None:
            place = job.place.transpose(-2, -1) if placement.transpose else job.place
            part = place[start : start + last - first] if placement.tensor.shape else place
            _fill(part.transpose(-2, -1) if placement.transpose else part, placement, job.rows, reader)
            return
        like = targets.like(placement.tensor)
        like = like if job.rows == placement.rows else like[: last - first]
        if _stays(like.dtype, placement):
            values = reader.rows(placement, first, last).view(like.shape)
        else:
            values = reader.scratch(like)
            _fill(values, placement, job.rows, reader)
        targets.put(placement.tensor, start, values)


def random_weights(
    module: nn.Module,
    plan: Plan,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    storing: Storing | None = None,
    pieces: Mapping[str, Piece] | None = None,
) -> None:
    """Fills the module's parameters, made on `device`, with seeded values of a size that keeps logits finite.

    pieces: as of `load_weights`; each rank's numbers are those of its share of the whole.

    A tensor's values follow from the seed and its name alone: not from the order, the device or the type, up to
    rounding. Raises CapacityError when memory does not suffice.
    """
    parameters = plan.model.all_parameters()
    kept = {t.name: Piece(t) for t in plan.model.tensors()} if pieces is None else pieces
    tensors = [tensor for tensor in plan.model.tensors() if tensor.name in kept]
    targets = Targets(module, [kept[t.name].tensor for t in tensors], torch.device(device), storing)

    def draw(tensor: Tensor) -> None:
        piece, init = kept[tensor.name], parameters[tensor.param].init
        if init == "normal" and not piece.zeros:
            _pour(targets, piece.tensor, _drawn(f"{seed}:{tensor.name}", tensor.shape, piece))
        else:
            _pour(targets, piece.tensor, _constant(1.0 if init == "ones" and not piece.zeros else 0.0, piece.tensor))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(draw, tensors):
            pass
    targets.check()


def _drawn(key: str, shape: tuple[int, ...], piece: Piece) -> Iterator[torch.Tensor]:
    """The numbers of a piece of a tensor of this shape, flattened, some at a time."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    for first in range(0, prod(shape), DRAW):
        values = torch.empty(min(DRAW, prod(shape) - first)).normal_(0.0, 0.02, generator=generator)
        yield taken(values, first, shape, piece)


def _constant(value: float, tensor: Tensor) -> Iterator[torch.Tensor]:
    size = prod(tensor.shape)
    for first in range(0, size, DRAW):
        yield torch.full((min(DRAW, size - first),), value)


def _pour(targets: Targets, tensor: Tensor, numbers: Iterable[torch.Tensor]) -> None:
    """Fills a tensor with its numbers, flattened, which come some at a time."""
    place = targets.place(tensor)
    if place is not None:
        flat, filled = place.flatten(), 0
        assert flat.data_ptr() == place.data_ptr(), "a piece of a parameter has its rows together"
        for values in numbers:
            flat[filled : filled + len(values)].copy_(values)
            filled += len(values)
    else:
        _pour_rows(targets, tensor, numbers)
    targets.filled(tensor)


def _pour_rows(targets: Targets, tensor: Tensor, numbers: Iterable[torch.Tensor]) -> None:
    """Of a tensor that has no place: its rows are put, in whole lanes, as soon as they are there."""
    rows, width = tensor.shape
    dtype, lanes, first, rest = targets.like(tensor).dtype, targets.lanes(tensor), 0, torch.empty(0)
    for values in numbers:
        rest = torch.cat((rest, values))
        whole = len(rest) // width
        whole -= whole % lanes if first + whole < rows else 0
        if whole:
            targets.put(tensor, first, rest[: whole * width].to(dtype).view(whole, width))
            first, rest = first + whole, rest[whole * width :].clone()


def _fill(place: torch.Tensor, placement: Placement, rows: tuple[int, int], reader: Reader) -> None:
    """Brings rows of a source to the place that is theirs."""
    info, start = placement.source, rows[0]
    if placement.tensor.shape == ():
        place = place.view(1)
    if _arrives_as_it_stays(place, placement):
        reader.into(place, info, info.start + start * placement.row_bytes)
        return
    view = place.transpose(-2, -1) if placement.transpose else place
    for first, last in _pieces(placement, rows):
        values = reader.rows(placement, first, last)
        if info.coding:
            values = decoded(values.to(place.device), placement, (first, last), reader.raw)
        _put(view[first - start : last - start], values, placement)


def _arrives_as_it_stays(place: torch.Tensor, placement: Placement) -> bool:
    return place.device.type == "cpu" and place.is_contiguous() and _stays(place.dtype, placement)


def _item(dtype: torch.dtype) -> int:
    """Bytes of a number on its way: what is stored otherwise is made of bfloat16 or float32."""
    return 2 if dtype == torch.bfloat16 else 4


def _stays(dtype: torch.dtype, placement: Placement) -> bool:
    """Whether the file's bytes are what is wanted, in their order."""
    info = placement.source
    moved = info.pickled or info.coding or placement.columns or placement.transpose or placement.interleaved
    return not moved and dtype == DTYPES[info.dtype]


def _pieces(placement: Placement, rows: tuple[int, int], lanes: int = 1, item: int = 0) -> Iterator[tuple[int, int]]:
    """Ranges of rows that fit the buffer, in multiples of `lanes`; whole heads where heads are permuted.

    item: bytes of a number that becomes of each of the file's, where it passes a buffer too.
    """
    unit = lcm(placement.interleaved.head_dim if placement.interleaved else 1, lanes)
    numbers = prod(placement.row_shape)
    row_bytes = DECODED * numbers if placement.source.coding else max(placement.row_bytes, item * numbers)
    step = max(1, BUFFER // max(1, unit * row_bytes)) * unit
    for first in range(*rows, step):
        yield first, min(first + step, rows[1])


def _put(view: torch.Tensor, rows: torch.Tensor, placement: Placement) -> None:
    """Copies rows of the file to where they belong, in the type that stands there."""
    if placement.columns and rows.shape[-1] == placement.row_shape[-1]:
        rows = rows[..., slice(*placement.columns)]
    if view.device.type != "cpu":
        rows = rows.to(view.device)
    if placement.interleaved:
        _from_interleaved(view, rows, placement.interleaved)
    else:
        view.copy_(rows)
    if view.dtype == torch.float16 != rows.dtype and not all(most.isfinite() for most in view.aminmax()):
        raise WeightsError(
            f"tensor {placement.source.name!r} does not fit float16",
            where=str(placement.source.file),
            found=f"values up to {rows.abs().max().item():.3g}",
            expected="at most 65504",
            hint="load with dtype bfloat16 or float32",
        )


def _from_interleaved(view: torch.Tensor, rows: torch.Tensor, rotary: Rotary) -> None:
    """Of the rows that rope turns in each head, 2i and 2i + 1 become i and i + rotary_dim / 2; the others stay."""
    heads, source = (t.unflatten(0, (-1, rotary.head_dim)) for t in (view, rows))
    start, middle, stop = (rotary.offset + lanes for lanes in (0, rotary.rotary_dim // 2, rotary.rotary_dim))
    heads[:, :start] = source[:, :start]
    heads[:, start:middle] = source[:, start:stop:2]
    heads[:, middle:stop] = source[:, start + 1 : stop : 2]
    heads[:, stop:] = source[:, stop:]
