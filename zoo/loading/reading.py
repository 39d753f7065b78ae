"""Bytes of checkpoints into memory, a piece at a time; what cannot be read is told by its tensor and its file."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from queue import LifoQueue

import torch

from zoo.loading.mapped import Mapped
from zoo.loading.mapping import Placement
from zoo.loading.pickled import DTYPES, open_archive
from zoo.loading.reader import TensorInfo
from zoo.registry.errors import WeightsError


class Reader:
    """Reads from one file at a time. Keeps a buffer of `size` bytes for what is read, one for what it becomes."""

    def __init__(self, size: int, pinned: bool = False) -> None:
        self.buffer = self.made = torch.empty(0, dtype=torch.uint8)
        self.size, self.pinned = size, pinned
        self.path: Path | None = None
        self.file: FileIO | None = None
        self.mapped: Mapped | None = None
        self.archive: dict[str, torch.Tensor] = {}

    def close(self) -> None:
        """Lets go of the file."""
        for opened in (self.mapped, self.file):
            if opened is not None:
                opened.close()
        self.path, self.file, self.mapped, self.archive = None, None, None, {}

    def shrink(self) -> None:
        """Lets go of what was read last, and of buffers that one large row has made large."""
        if self.mapped is not None:
            self.mapped.let_go()
        if max(len(self.buffer), len(self.made)) > self.size:
            self.buffer = self.made = torch.empty(0, dtype=torch.uint8)

    def scratch(self, like: torch.Tensor) -> torch.Tensor:
        """Memory on the CPU for values of that shape and type; good until the next call."""
        size = like.numel() * like.itemsize
        if len(self.made) < size:
            self.made = torch.empty(max(size, self.size), dtype=torch.uint8)
        return self.made[:size].view(like.dtype).view(like.shape)

    def into(self, place: torch.Tensor, info: TensorInfo, offset: int) -> None:
        """Fills contiguous memory on the CPU with the file's bytes from `offset` on."""
        flat = place.flatten().view(torch.uint8)
        if (found := self._as_it_lies(info, offset, len(flat))) is not None:
            flat.copy_(found)
        else:
            self._read(flat, info, offset)

    def _as_it_lies(self, info: TensorInfo, offset: int, size: int) -> torch.Tensor | None:
        """The file's bytes in the system's own memory; None where they have to be read. Good until the next call."""
        self._turn_to(info)
        assert self.mapped is not None
        address = self.mapped.read(offset, size)
        if address is None:
            return None
        return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=torch.uint8)

    def _read(self, flat: torch.Tensor, info: TensorInfo, offset: int, ask: bool = True) -> None:
        """ask: the system is asked for all bytes first, which has disks work on many requests at a time."""
        self._turn_to(info)
        assert self.file is not None
        view = flat.numpy().data
        try:
            if ask and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self.file.fileno(), offset, len(view), os.POSIX_FADV_WILLNEED)
            self.file.seek(offset)
            while view:
                count = self.file.readinto(view)
                if not count:
                    raise OSError(0, f"it ends {len(view)} bytes too early: it has changed since its header was read")
                view = view[count:]
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
        start, size = info.start + first * placement.row_bytes, (last - first) * placement.row_bytes
        found = None if self.pinned else self._as_it_lies(info, start, size)
        piece = self._room(size, info) if found is None else found
        if found is None:
            self.into(piece, info, start)
        return piece if info.coding else piece.view(DTYPES[info.dtype]).view(shape)

    def raw(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Bytes of a small tensor, from `start` to `stop` within it."""
        piece = torch.empty(stop - start, dtype=torch.uint8)
        self.into(piece, info, info.start + start)
        return piece

    def _columns(self, placement: Placement, first: int, last: int, columns: tuple[int, int]) -> torch.Tensor:
        """Some columns of those rows, read row by row: other ranks read the others."""
        info, width = placement.source, columns[1] - columns[0]
        item = placement.row_bytes // placement.row_shape[0]
        piece = self._room((last - first) * width * item, info).view(-1, width * item)
        start = info.start + columns[0] * item
        for row in range(first, last):
            self._read(piece[row - first].view(torch.uint8), info, start + row * placement.row_bytes, ask=False)
        return piece.view(DTYPES[info.dtype]).view(last - first, width)

    def _room(self, size: int, info: TensorInfo) -> torch.Tensor:
        """The buffer's first `size` bytes."""
        if len(self.buffer) < size:
            room = size if info.coding else max(size, min(self.size, info.nbytes))
            self.buffer = torch.empty(room, dtype=torch.uint8, pin_memory=self.pinned)
        return self.buffer[:size]

    def _turn_to(self, info: TensorInfo) -> None:
        if self.path == info.file:
            return
        self.close()
        try:
            if info.pickled:
                self.archive = open_archive(info.file)
            else:
                self.file = info.file.open("rb", buffering=0)
                self.mapped = Mapped(self.file)
        except OSError as error:
            raise WeightsError("cannot read the weights", where=str(info.file), found=error.strerror) from None
        self.path = info.file


class Readers:
    """As many readers as threads ask for at a time."""

    def __init__(self, size: int, pinned: bool) -> None:
        self.size, self.pinned = size, pinned
        self._all: list[Reader] = []
        self._idle: LifoQueue[Reader] = LifoQueue()

    def close(self) -> None:
        """Lets go of every file and every buffer."""
        for reader in self._all:
            reader.close()
        self._all, self._idle = [], LifoQueue()

    @contextmanager
    def one(self) -> Iterator[Reader]:
        """A reader that nobody else uses meanwhile."""
        if self._idle.empty():
            self._idle.put(reader := Reader(self.size, self.pinned))
            self._all.append(reader)
        reader = self._idle.get()
        try:
            yield reader
        finally:
            reader.shrink()
            self._idle.put(reader)
