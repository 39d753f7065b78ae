"""Weights into a module: every tensor straight to its final place, type and device, in the order of the files.

Nothing is held but the parameters themselves, those that are stored otherwise for a moment, and one buffer: a tensor
that arrives as it stays is read into its parameter's own memory, all others pass through the buffer in pieces.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import nn

from zoo.loading.ahead import STEP, ReadAhead, Span
from zoo.loading.decode import decoded
from zoo.loading.files import WeightSet
from zoo.loading.layouts import layout_named
from zoo.loading.mapping import Placement, plan_mapping
from zoo.loading.pickled import DTYPES, open_archive
from zoo.loading.pieces import Piece, narrowed, taken
from zoo.loading.reader import Progress, TensorInfo
from zoo.loading.targets import Storing, Targets
from zoo.registry.errors import WeightsError
from zoo.registry.plan import Plan
from zoo.registry.spec import Rotary, Tensor

BUFFER = 32 << 20
"""Bytes that pass through the buffer at a time, unless one row of a tensor is larger."""

DECODED = 64
"""Bytes to allow for each quantised element: its code, index, float and scale, and as much again."""

DRAW = 1 << 20
"""Elements that are drawn at a time; part of what a seed means."""


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
    stored, one buffer, and the matrices of which a part is still to come. `progress` is called with the bytes read
    and the bytes in all.
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
        targets.place(tensor).zero_()
        targets.filled(tensor)
    with ReadAhead(map(_span, placements)) as ahead, _Reader(torch.device(device).type == "cuda", ahead) as reader:
        for placement in placements:
            _fill(targets.place(placement.tensor), placement, reader)
            targets.filled(placement.tensor)
            done += placement.nbytes
            if progress:
                progress(done, total)
    targets.check()


def fill_places(places: Iterable[tuple[torch.Tensor, Placement]]) -> None:
    """Fills tensors of the caller's own, of any type, each from its source."""
    with _Reader(pinned=False, ahead=ReadAhead()) as reader:
        for place, placement in places:
            _fill(place, placement, reader)


def _span(placement: Placement) -> Span:
    """The bytes that fill a tensor; none of an archive, which is mapped, nor of some columns alone."""
    info, (first, last) = placement.source, placement.rows
    if info.pickled or placement.columns:
        return Span(info.file, 0, 0)
    return Span(info.file, info.start + first * placement.row_bytes, info.start + last * placement.row_bytes)


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
        place = targets.place(piece.tensor)
        if init == "normal" and not piece.zeros:
            _draw(place, f"{seed}:{tensor.name}", tensor.shape, piece)
        else:
            place.fill_(1.0 if init == "ones" and not piece.zeros else 0.0)
        targets.filled(piece.tensor)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(draw, tensors):
            pass
    targets.check()


def _draw(place: torch.Tensor, key: str, shape: tuple[int, ...], piece: Piece) -> None:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    flat = place.flatten()
    assert flat.data_ptr() == place.data_ptr(), "a piece of a parameter has its rows together"
    filled = 0
    for first in range(0, prod(shape), DRAW):
        values = torch.empty(min(DRAW, prod(shape) - first)).normal_(0.0, 0.02, generator=generator)
        values = taken(values, first, shape, piece)
        flat[filled : filled + len(values)].copy_(values)
        filled += len(values)


class _Reader:
    """Reads from one file at a time, and keeps the buffer."""

    def __init__(self, pinned: bool, ahead: ReadAhead) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self.pinned, self.ahead = pinned, ahead
        self.path: Path | None = None
        self.file: FileIO | None = None
        self.archive: dict[str, torch.Tensor] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self.file:
            self.file.close()
        self.path, self.file, self.archive = None, None, {}

    def _turn_to(self, info: TensorInfo) -> None:
        if self.path == info.file:
            return
        self._close()
        try:
            if info.pickled:
                self.archive = open_archive(info.file)
            else:
                self.file = info.file.open("rb", buffering=0)
        except OSError as error:
            raise WeightsError("cannot read the weights", where=str(info.file), found=error.strerror) from None
        self.path = info.file

    def into(self, place: torch.Tensor, info: TensorInfo, offset: int) -> None:
        """Fills contiguous memory on the CPU with the file's bytes from `offset` on."""
        self._turn_to(info)
        assert self.file is not None
        view = place.flatten().view(torch.uint8).numpy().data
        try:
            self.file.seek(offset)
            while view:
                count = self.file.readinto(view[:STEP])
                if not count:
                    raise OSError(0, f"it ends {len(view)} bytes too early: it has changed since its header was read")
                view = view[count:]
                self.ahead.has_read(count)
        except OSError as error:
            found = error.strerror
            raise WeightsError(f"cannot read tensor {info.name!r}", where=str(info.file), found=found) from None

    def rows(self, placement: Placement, first: int, last: int) -> torch.Tensor:
        """Those rows of a source, in its own type on the CPU, of a quantised one as bytes; good until the next call."""
        info, shape = placement.source, (last - first, *placement.row_shape)
        if info.pickled:
            self._turn_to(info)
            return self.archive[info.name].reshape(-1, *placement.row_shape)[first:last]
        if placement.columns and not info.coding and len(shape) == 2:
            return self._columns(placement, first, last, placement.columns)
        piece = self._room((last - first) * placement.row_bytes, info)
        self.into(piece, info, info.start + first * placement.row_bytes)
        return piece if info.coding else piece.view(DTYPES[info.dtype]).view(shape)

    def _columns(self, placement: Placement, first: int, last: int, columns: tuple[int, int]) -> torch.Tensor:
        """Some columns of those rows, read row by row: other ranks read the others."""
        info, width = placement.source, columns[1] - columns[0]
        item = placement.row_bytes // placement.row_shape[0]
        piece = self._room((last - first) * width * item, info).view(-1, width * item)
        start = info.start + columns[0] * item
        for row in range(first, last):
            self.into(piece[row - first], info, start + row * placement.row_bytes)
        return piece.view(DTYPES[info.dtype]).view(last - first, width)

    def _room(self, size: int, info: TensorInfo) -> torch.Tensor:
        """The buffer's first `size` bytes."""
        if len(self.buffer) < size:
            room = size if info.coding else max(size, min(BUFFER, info.nbytes))
            self.buffer = torch.empty(room, dtype=torch.uint8, pin_memory=self.pinned)
        return self.buffer[:size]

    def raw(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Bytes of a small tensor, from `start` to `stop` within it."""
        piece = torch.empty(stop - start, dtype=torch.uint8)
        self.into(piece, info, info.start + start)
        return piece


def _fill(place: torch.Tensor, placement: Placement, reader: _Reader) -> None:
    """Brings one tensor to its place."""
    if placement.tensor.shape == ():
        place = place.view(1)
    if _arrives_as_it_stays(place, placement):
        reader.into(place, placement.source, placement.source.start + placement.rows[0] * placement.row_bytes)
        return
    view = place.transpose(-2, -1) if placement.transpose else place
    start = placement.rows[0]
    for first, last in _pieces(placement):
        rows = reader.rows(placement, first, last)
        if placement.source.coding:
            rows = decoded(rows.to(place.device), placement, (first, last), reader.raw)
        _put(view[first - start : last - start], rows, placement)


def _arrives_as_it_stays(place: torch.Tensor, placement: Placement) -> bool:
    info = placement.source
    moved = info.pickled or info.coding or placement.columns or placement.transpose or placement.interleaved
    return not moved and place.device.type == "cpu" and place.dtype == DTYPES[info.dtype] and place.is_contiguous()


def _pieces(placement: Placement) -> Iterator[tuple[int, int]]:
    """Ranges of rows that fit the buffer; whole heads where heads are permuted."""
    unit = placement.interleaved.head_dim if placement.interleaved else 1
    row_bytes = DECODED * prod(placement.row_shape) if placement.source.coding else placement.row_bytes
    step = max(1, BUFFER // max(1, unit * row_bytes)) * unit
    for first in range(*placement.rows, step):
        yield first, min(first + step, placement.rows[1])


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
    if view.dtype == torch.float16 != rows.dtype and not view.isfinite().all():
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
