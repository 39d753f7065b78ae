"""Which files of a folder are the weights: exactly one set, chosen by what is there and said aloud. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

from zoo.loading.layouts import detect, layout_named, layouts
from zoo.loading.quantised import folded
from zoo.loading.reader import TensorInfo, read_headers
from zoo.registry.errors import WeightsError, nearest
from zoo.units import human_bytes

KNOWN = ("consolidated.safetensors", "model.safetensors", "consolidated.pth", "consolidated.pt", "pytorch_model.bin")
"""Sets by stem and suffix, in the order of preference; any other name stands behind them."""

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<total>\d+)\.(?P<suffix>safetensors|bin|pth|pt)", re.ASCII)
_PART = re.compile(r"(?P<stem>consolidated)\.(?P<number>\d+)\.(?P<suffix>pth|pt)", re.ASCII)
_SINGLE = re.compile(r"(?P<stem>.+)\.(?P<suffix>safetensors|bin|pth|pt)")
_NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|rng_state|scaler).*\.(bin|pth|pt)")


@dataclass(frozen=True)
class WeightSet:
    """The chosen files and every tensor in them. `note` is one sentence on the choice.

    A quantised tensor and its companions are one entry of `headers`, of the full shape and under the plain name.
    """

    layout: str
    files: tuple[Path, ...]
    headers: Mapping[str, TensorInfo]
    folder: Path
    note: str

    @property
    def where(self) -> str:
        """The file, or the folder of several, for messages."""
        return str(self.files[0] if len(self.files) == 1 else self.folder)

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.headers.values())

    @property
    def schemes(self) -> tuple[str, ...]:
        """Names of the ways in which tensors are quantised, if any are."""
        return tuple(sorted({info.coding.scheme for info in self.headers.values() if info.coding}))


class Folder(Protocol):
    """A place that holds weight files, on this machine or another. Names have no folder in them."""

    @property
    def path(self) -> Path:
        """The place itself, or what stands for it in messages."""
        ...

    def sizes(self) -> Mapping[str, int]:
        """Name and bytes of every file."""
        ...

    def read(self, name: str) -> bytes:
        """A whole small file."""
        ...

    def headers(self, name: str) -> dict[str, TensorInfo]:
        """The tensors of a weight file."""
        ...


@dataclass(frozen=True)
class LocalFolder:
    """A folder on this machine."""

    path: Path

    def sizes(self) -> Mapping[str, int]:
        files = (file for file in self.path.iterdir() if not file.is_dir())
        return {file.name: file.stat().st_size if file.exists() else 0 for file in sorted(files)}

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def headers(self, name: str) -> dict[str, TensorInfo]:
        return read_headers(self.path / name)


@dataclass(frozen=True)
class _Set:
    """Files that belong together. absent: names that must be there and are not."""

    kind: str
    files: tuple[str, ...]
    index: str | None
    weight_map: Mapping[str, str] | None = None
    absent: tuple[str, ...] = ()

    def __str__(self) -> str:
        name = self.files[0]
        if len(self.files) > 1:
            name = f"{name} and {len(self.files) - 1} more"
        return f"{name} (incomplete: no {_listed(self.absent)})" if self.absent else name


def local_path(ref: str | Path) -> Path:
    """A path as users write it: `~`, and `file:` with two or three slashes, are understood."""
    text = str(ref)
    if text.startswith("file:"):
        text = unquote(re.sub(r"^file:(//)?", "", text))
    return Path(text).expanduser()


def given_path(ref: str | Path) -> Path:
    """`local_path` of what must be one. Raises WeightsError for None, which would be a file of that name, and for an
    empty text, which would be the working folder."""
    if not isinstance(ref, str | Path) or not str(ref):
        raise WeightsError("not a path", found=repr(ref), expected="the path of a folder or file")
    return local_path(ref)


def existing(ref: str | Path) -> Path:
    """A path that is there, if only as a link. Raises WeightsError with the nearest name beside it."""
    path = given_path(ref)
    try:
        if path.exists() or path.is_symlink():
            return path
    except OSError as error:
        raise WeightsError("not a path", where=str(path)[:200], found=error.strerror) from None
    raise WeightsError("no such folder or file", where=str(path), hint=nearest(path.name, _names(path.parent)))


def locate(ref: str | Path, layout: str = "auto") -> WeightSet:
    """The weights at a folder or file: one complete set, its tensors, and the layout of their names.

    `layout` names the layout wanted; "auto" takes what there is, Mistral's own files first where params.json says so.
    Raises WeightsError when there is no such set, when it is not whole, or when two could be meant.
    """
    path = existing(ref)
    if path.is_dir():
        return locate_in(LocalFolder(path), layout)
    return _of_file(path, layout)


def locate_in(folder: Folder, layout: str = "auto") -> WeightSet:
    """`locate` for any folder."""
    names = list(folder.sizes())
    sets = [_with_index(folder, found, names) for found in find_sets(names, str(folder.path))]
    if not sets:
        raise _nothing(folder.path, names)
    native_first = "params.json" in names or "config.json" not in names
    sets.sort(key=lambda found: _rank(found, native_first))
    return _choose(folder, sets, layout)


def find_sets(names: Iterable[str], where: str) -> list[_Set]:
    """The weight sets among file names, without their indexes; names outside KNOWN only where nothing else is."""
    groups: dict[str, list[tuple[str, int, int]]] = {}
    for name in sorted(names):
        match = _SHARD.fullmatch(name) or _PART.fullmatch(name) or _SINGLE.fullmatch(name)
        if match and not _NO_WEIGHTS.fullmatch(name):
            parts = match.groupdict()
            number, total = int(parts.get("number") or 0), int(parts.get("total") or 0)
            single = match.re is _SINGLE
            groups.setdefault(f"{parts['stem']}.{parts['suffix']}", []).append((name, -1 if single else number, total))
    known = {kind: files for kind, files in groups.items() if kind in KNOWN}
    others = {kind: files for kind, files in groups.items() if kind.endswith(".safetensors")} or groups
    if not known and len(others) > 1:
        raise WeightsError(
            "several weight files, and no telling which is meant",
            where=where,
            found=_listed(sorted(files[0][0] for files in others.values())),
            hint="point at one of the files",
        )
    return [_group(kind, files, where) for kind, files in (known or others).items()]


def _group(kind: str, files: Sequence[tuple[str, int, int]], where: str) -> _Set:
    """One set of equally named files: a single file, or shards that count alike."""
    countings = {(number < 0, total) for _, number, total in files}
    if len(countings) > 1:
        raise WeightsError(
            f"two sets of weights are both named {kind!r}",
            where=where,
            found=_listed([name for name, _, _ in files]),
            hint="remove one of them, or point at the file that is meant",
        )
    names = tuple(name for name, _, _ in sorted(files, key=lambda file: file[1]))
    single, total = countings.pop()
    if single:
        return _Set(kind, names, None)
    numbers = {number for _, number, _ in files}
    wanted = range(1, total + 1) if total else range(max(numbers) + 1)
    absent = [_renumbered(names[0], number) for number in wanted if number not in numbers]
    return _Set(kind, names, None, absent=tuple(absent))


def _renumbered(name: str, number: int) -> str:
    match = _SHARD.fullmatch(name) or _PART.fullmatch(name)
    assert match is not None
    start, stop = match.span("number")
    return f"{name[:start]}{number:0{stop - start}d}{name[stop:]}"


def _with_index(folder: Folder, found: _Set, names: Sequence[str]) -> _Set:
    """The set with its index, where there is one, and the files that this names in vain."""
    stem, _, suffix = found.kind.rpartition(".")
    index = f"{stem}.{suffix}.index.json"
    if index not in names:
        return found
    weight_map = _read_index(folder, index)
    absent = sorted({file for file in weight_map.values() if file not in names} | set(found.absent))
    return _Set(found.kind, found.files, index, weight_map, tuple(absent))


def _read_index(folder: Folder, name: str) -> dict[str, str]:
    where = str(folder.path / name)
    try:
        data = json.loads(folder.read(name))
        weight_map = data["weight_map"]
        if not all(isinstance(file, str) for file in weight_map.values()):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        hint = "fetch the file again"
        raise WeightsError("not an index of weights", where=where, expected="`weight_map` in JSON", hint=hint) from None
    for tensor, file in weight_map.items():
        if file in ("", ".", "..") or "/" in file or "\\" in file or "\0" in file:
            raise WeightsError(
                f"the index places tensor {tensor!r} outside its folder",
                where=where,
                found=repr(file),
                expected="the name of a file beside it",
            )
    return dict(weight_map)


def _rank(found: _Set, native_first: bool) -> int:
    order = KNOWN.index(found.kind) if found.kind in KNOWN else len(KNOWN)
    return order if native_first or order > 1 else 1 - order


def _choose(folder: Folder, sets: Sequence[_Set], layout: str) -> WeightSet:
    admitted = list(sets)
    if layout != "auto":
        wanted = f"layout {layout_named(layout).name}"
        layout_of = {found.kind: _layout_of(folder, found) for found in sets}
        admitted = [found for found in sets if layout_of[found.kind] == wanted]
        if not admitted:
            present = ", ".join(f"{found} ({layout_of[found.kind]})" for found in sets)
            hint = "set `source.layout: auto`"
            raise WeightsError(f"no weights in layout {layout!r}", where=str(folder.path), found=present, hint=hint)
    complete = [found for found in admitted if not found.absent]
    if not complete:
        raise _incomplete(folder.path, admitted[0])
    taken = complete[0]
    return _open(folder, taken, [found for found in sets if found is not taken])


def _layout_of(folder: Folder, found: _Set) -> str:
    """The layout's name, or what keeps it from being told: another set may still be the one that is wanted."""
    where = folder.path / found.files[0]
    try:
        return f"layout {detect(folder.headers(found.files[0]), layouts().values(), str(where)).name}"
    except WeightsError as error:
        return error.message


def _open(folder: Folder, taken: _Set, others: Sequence[_Set]) -> WeightSet:
    """Reads every header of the set and checks them against each other and the index."""
    headers: dict[str, TensorInfo] = {}
    for file in taken.files:
        for name, info in folder.headers(file).items():
            if name in headers:
                raise WeightsError(
                    f"tensor {name!r} is in two files",
                    where=str(folder.path),
                    found=f"{headers[name].file.name} and {file}",
                    hint="remove the file that does not belong to this model",
                )
            headers[name] = info
    if taken.weight_map is not None:
        _check_index(folder.path / str(taken.index), taken, headers)
    where = str(folder.path / taken.files[0] if len(taken.files) == 1 else folder.path)
    headers = folded(headers, where)
    layout = detect(headers, layouts().values(), where).name
    total = human_bytes(sum(info.nbytes for info in headers.values()))
    note = f"weights: {taken} ({total}, layout {layout})"
    if others:
        note += f"; left aside: {', '.join(map(str, others))}"
    return WeightSet(layout, tuple(folder.path / file for file in taken.files), headers, folder.path, note)


def _check_index(where: Path, taken: _Set, headers: Mapping[str, TensorInfo]) -> None:
    weight_map = taken.weight_map or {}
    strangers = sorted(set(taken.files) - set(weight_map.values()))
    if strangers:
        raise WeightsError(
            "weight files that their index does not name",
            where=str(where),
            found=_listed(strangers),
            hint="remove them, or fetch the index that belongs to them",
        )
    wrong = [name for name, file in weight_map.items() if name not in headers or headers[name].file.name != file]
    wrong += [name for name in headers if name not in weight_map]
    if wrong:
        name = wrong[0]
        raise WeightsError(
            f"the index and the files disagree on {len(wrong)} tensor{'s' if len(wrong) > 1 else ''}, such as {name!r}",
            where=str(where),
            found=f"it is in {headers[name].file.name}" if name in headers else "it is in no file",
            expected=weight_map.get(name) or "a line of the index for it",
            hint="fetch the index and the files again, of one revision",
        )


def _of_file(path: Path, layout: str) -> WeightSet:
    """The set that a single path means: that file, or the shards or index that it belongs to."""
    folder = LocalFolder(path.parent)
    stem = re.fullmatch(r"(?P<stem>.+)\.(?P<suffix>safetensors|bin)\.index\.json", path.name)
    match = stem or _SHARD.fullmatch(path.name) or _PART.fullmatch(path.name)
    if match is None:
        if path.suffix == ".gguf":
            raise WeightsError("GGUF files are not read yet", where=str(path), expected="safetensors or .pth")
        if path.suffix not in SUFFIXES:
            raise WeightsError(
                "not a weight file",
                where=str(path),
                expected=f"a folder, or a file that ends in {', '.join(SUFFIXES)}",
                hint=f"point at the folder {path.parent}",
            )
        return _choose(folder, [_Set(path.name, (path.name,), None)], layout)
    siblings = [name for name in folder.sizes() if _sharded_as(name) == f"{match['stem']}.{match['suffix']}"]
    sets = [_with_index(folder, s, list(folder.sizes())) for s in find_sets(siblings, str(folder.path))]
    if not sets:
        raise WeightsError("an index without its weight files", where=str(path), hint="fetch the model again")
    return _choose(folder, sets, layout)


def _sharded_as(name: str) -> str | None:
    match = _SHARD.fullmatch(name) or _PART.fullmatch(name)
    return f"{match['stem']}.{match['suffix']}" if match else None


def _names(folder: Path) -> Iterator[str]:
    if folder.is_dir():
        yield from (file.name for file in folder.iterdir())


def _nothing(path: Path, names: Sequence[str]) -> WeightsError:
    inside = [child.name for child in path.iterdir() if child.is_dir()] if path.is_dir() else []
    holding = [name for name in inside if holds_weights(path / name)]
    hint = "GGUF files are not read yet" if any(name.endswith(".gguf") for name in names) else None
    return WeightsError(
        "no weights here",
        where=str(path),
        found=_listed(sorted(names)) if names else "an empty folder" if not inside else "only folders",
        expected="consolidated*.safetensors, model*.safetensors, consolidated.*.pth or pytorch_model*.bin",
        hint=f"do you mean {path / holding[0]}?" if holding else hint,
    )


def holds_weights(folder: Path) -> bool:
    """Whether a folder has files that are named like weights."""
    return any(named_like_weights(name) for name in _names(folder))


def named_like_weights(name: str) -> bool:
    """Whether a file's name says that it holds weights; what training leaves beside them does not."""
    return name.endswith(SUFFIXES) and not _NO_WEIGHTS.fullmatch(name)


def _incomplete(path: Path, found: _Set) -> WeightsError:
    count = len(found.absent)
    return WeightsError(
        f"{count} weight file{'s' if count > 1 else ''} missing",
        where=str(path),
        found=_listed(found.files),
        expected=_listed(found.absent),
        hint="fetch the model again: what is there is kept",
    )


def _listed(names: Sequence[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
