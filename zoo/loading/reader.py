"""Headers of safetensors files, checked to the last byte. Imports no torch and reads no weights.

Format: 8 bytes little-endian length of the header, the header in JSON (name -> dtype, shape, data_offsets), the data.
Read here rather than by the safetensors library, so that a broken file is told by its bytes and not by that
library's message, and so that a header can be read from anywhere that gives byte ranges.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from zoo.registry.errors import WeightsError

MAX_HEADER = 100_000_000
"""The format's own limit in bytes."""

BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Bits of one element by the format's name of its type."""

ReadRange = Callable[[int, int], bytes]
"""(start, stop) -> those bytes of a file."""

Progress = Callable[[int, int], None]
"""Called with the bytes done so far and the bytes in all."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of a checkpoint: where its bytes are, from `start` to `stop` in `file`.

    pickled: it lies in an archive of torch.save, where offsets only give the order.
    coding: how its numbers come from its bytes, if it is quantised: then `dtype` is the type of the codes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    start: int
    stop: int
    pickled: bool = False
    coding: Coding | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the files, companions included."""
        companions = self.coding.companions if self.coding else ()
        return self.stop - self.start + sum(info.nbytes for info in companions)


@dataclass(frozen=True, slots=True)
class Coding:
    """A quantised tensor: each number is a code times the scale of its block.

    scheme: its name for people. scale: the tensor of scales. blocks: how many elements share one, along each axis.
    divisor: one number that all scales are divided by. unread: companions that the weights do not need.
    """

    scheme: str
    scale: TensorInfo
    blocks: tuple[int, ...]
    divisor: TensorInfo | None = None
    unread: tuple[TensorInfo, ...] = ()

    @property
    def companions(self) -> tuple[TensorInfo, ...]:
        """All tensors of the files that belong to this one."""
        return (self.scale, *((self.divisor,) if self.divisor else ()), *self.unread)


def read_headers(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a local weight file by name. Raises WeightsError for a file that is not whole and well-formed."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
            if start.startswith(b"PK\x03\x04") and not _opens_a_header(start):
                from zoo.loading.pickled import read_archive_headers

                return read_archive_headers(path)

            def read(first: int, last: int) -> bytes:
                file.seek(first)
                return file.read(last - first)

            return read_header(path, path.stat().st_size, read)
    except OSError as error:
        raise _unreadable(path, error) from None


def read_header(path: Path, size: int, read: ReadRange) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file of `size` bytes, of which `read` gives ranges; `path` names it."""
    start = read(0, min(size, 512))
    check_start(path, size, start)
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER:
        raise WeightsError(
            "not a safetensors file",
            where=str(path),
            found=f"a header of {length} bytes by its first eight bytes",
            expected=f"at most {MAX_HEADER}",
            hint="fetch the file again",
        )
    if 8 + length > size:
        raise _cut(path, "inside its header", size, 8 + length)
    return _tensors(path, size, 8 + length, _entries(path, read(8, 8 + length)))


def check_start(path: Path, size: int, start: bytes) -> None:
    """Raises WeightsError when the first bytes show that this is no weight file."""
    if _opens_a_header(start):
        return
    if size == 0:
        raise WeightsError("the file is empty", where=str(path), found="0 bytes", hint="fetch it again")
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(
            "a Git-LFS pointer stands where the weights should be",
            where=str(path),
            found=f"{size} bytes{_pointed(start)}",
            hint="run `git lfs pull` in that folder, or fetch the model with `zoo pull`",
        )
    if start.lstrip()[:1] == b"<":
        raise WeightsError(
            "a web page stands where the weights should be",
            where=str(path),
            found=repr(start.lstrip()[:40].decode("utf-8", "replace")),
            hint="a proxy or a login page answered the download: fetch the file again",
        )
    if start.startswith(b"GGUF"):
        raise WeightsError("GGUF files are not read yet", where=str(path), expected="safetensors or .pth")
    if start.startswith(b"\x80"):
        raise WeightsError(
            "a bare pickle, as torch wrote them before version 1.6",
            where=str(path),
            expected="safetensors, or an archive of torch.save",
            hint="load it with torch where you trust it and save it as safetensors",
        )
    if size < 8:
        raise _cut(path, "inside its header", size, 8)


def _opens_a_header(start: bytes) -> bool:
    """Whether a length that may be and a JSON object's brace stand there: by chance, a length may look like others."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER


def _pointed(start: bytes) -> str:
    for line in start.split(b"\n"):
        if line.startswith(b"size ") and line[5:].isdigit():
            return f" that stand for {int(line[5:])}"
    return ""


def _entries(path: Path, header: bytes) -> dict[str, Any]:
    """The header's JSON object without its metadata."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise WeightsError(f"the header names {key!r} twice", where=str(path), hint="fetch the file again")
            found[key] = value
        return found

    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise _broken(path, f"its header is not JSON ({type(error).__name__})") from None
    if not isinstance(entries, dict):
        raise _broken(path, "its header is not a JSON object")
    entries.pop("__metadata__", None)
    return entries


def _tensors(path: Path, size: int, base: int, entries: dict[str, Any]) -> dict[str, TensorInfo]:
    found = {name: _tensor(path, base, name, entry) for name, entry in entries.items()}
    ordered = sorted(found.values(), key=lambda info: (info.start, info.stop))
    _check_offsets(path, base, size, ordered)
    return found


def _tensor(path: Path, base: int, name: str, entry: Any) -> TensorInfo:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _broken(path, f"its header lacks the dtype, shape or offsets of {name!r}") from None
    if not (isinstance(dtype, str) and dtype in BITS):
        raise WeightsError(
            f"tensor {name!r} has a type that is not known",
            where=str(path),
            found=repr(dtype),
            expected=f"one of {', '.join(BITS)}",
        )
    sizes = [*shape, start, stop] if isinstance(shape, list) else [None]
    if not all(type(item) is int and item >= 0 for item in sizes):
        raise _broken(path, f"its header gives {name!r} the shape {shape} and the offsets {entry['data_offsets']}")
    if prod(shape) * BITS[dtype] != 8 * (stop - start):
        raise WeightsError(
            f"tensor {name!r} does not fill its place",
            where=str(path),
            found=f"{stop - start} bytes",
            expected=f"{prod(shape) * BITS[dtype] // 8} for {shape_text(shape)} {dtype}",
            hint="the file is damaged: fetch it again",
        )
    return TensorInfo(name, tuple(shape), dtype, path, base + start, base + stop)


def _check_offsets(path: Path, base: int, size: int, ordered: list[TensorInfo]) -> None:
    """The tensors must follow each other without overlap or gap and end where the file ends."""
    position = base
    for info in ordered:
        if info.start != position:
            what = "overlaps the tensor before it" if info.start < position else "follows a gap"
            raise _broken(path, f"tensor {info.name!r} {what}, at byte {info.start} instead of {position}")
        position = info.stop
    if position > size:
        cut = next(info for info in ordered if info.stop > size)
        raise _cut(path, f"inside tensor {cut.name!r}", size, position)
    if position < size:
        raise _broken(path, f"{size - position} bytes follow its last tensor")


def shape_text(shape: Iterable[int]) -> str:
    """A shape as messages show it: `[4096, 1024]`."""
    return f"[{', '.join(map(str, shape))}]"


def _cut(path: Path, place: str, size: int, expected: int) -> WeightsError:
    return WeightsError(
        f"the file is cut off {place}",
        where=str(path),
        found=f"{size} bytes",
        expected=f"{'at least ' if 'header' in place else ''}{expected}",
        hint="the download did not finish: fetch the file again",
    )


def _broken(path: Path, why: str) -> WeightsError:
    return WeightsError(f"not a whole safetensors file: {why}", where=str(path), hint="fetch the file again")


def _unreadable(path: Path, error: OSError) -> WeightsError:
    if path.is_symlink() and not path.exists():
        return WeightsError(
            "a link to a file that is gone", where=str(path), found=f"-> {path.readlink()}", hint="fetch the file again"
        )
    return WeightsError("cannot read the weights", where=str(path), found=error.strerror or str(error))
