"""Which of a repository's files a model needs: exactly one set of weights and the small files beside it."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from zoo.loading.hub.types import RemoteFile
from zoo.registry.errors import FetchError
from zoo.units import human_bytes

TEXT_FILES = re.compile(
    r"generation_config\.json"
    r"|tekken\.json|tokenizer\.model(\.v\w+)?|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json"
    r"|chat_template\.(jinja|json)|SYSTEM_PROMPT\.txt",
    re.ASCII,
)
"""Names of what a model needs beside weights and settings: its tokenizer, its chat format, how it is sampled."""

_COMPANIONS = re.compile(rf"params\.json|config\.json|{TEXT_FILES.pattern}", re.ASCII)


class _Kind(NamedTuple):
    """How one kind of weight set names its files; a shard's groups are its number and, where named, the count."""

    layout: str
    title: str
    single: str
    shard: str
    index_file: str | None


# In the order of preference. Only names without a folder match: a name in the answer cannot leave the cache's folder.
_KINDS = (
    _Kind(
        "mistral",
        "consolidated safetensors",
        r"consolidated\.safetensors",
        r"consolidated-(\d+)-of-(\d+)\.safetensors",
        "consolidated.safetensors.index.json",
    ),
    _Kind(
        "huggingface",
        "model safetensors",
        r"model\.safetensors",
        r"model-(\d+)-of-(\d+)\.safetensors",
        "model.safetensors.index.json",
    ),
    _Kind("mistral", "consolidated pickles", r"consolidated\.(pth|pt)", r"consolidated\.(\d+)\.(?:pth|pt)", None),
    _Kind(
        "huggingface",
        "pytorch_model pickles",
        r"pytorch_model\.bin",
        r"pytorch_model-(\d+)-of-(\d+)\.bin",
        "pytorch_model.bin.index.json",
    ),
    _Kind("auto", "one safetensors file", r"(?!consolidated|model)[\w.-]+\.safetensors", r"(?!)", None),
)


@dataclass(frozen=True)
class Chosen:
    """The files to fetch, small ones first.

    `note` is one line for the user: the set taken and the sets left out.
    """

    files: tuple[RemoteFile, ...]
    total_bytes: int
    note: str


@dataclass(frozen=True)
class _Set:
    """A weight set found in a listing, with the names of shards that its own numbering misses."""

    kind: _Kind
    files: tuple[RemoteFile, ...]
    absent: tuple[str, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def __str__(self) -> str:
        name = self.files[0].path if len(self.files) == 1 else f"{len(self.files)} files of {self.kind.title}"
        return f"{name} ({human_bytes(self.size)})"


def choose(
    files: Sequence[RemoteFile], layout: str = "auto", *, cached: Container[str] = frozenset(), where: str | None = None
) -> Chosen:
    """One weight set of the listing with its index, configuration and tokenizer files.

    `layout` "mistral" or "huggingface" admits that layout's file names only; any other name admits all. Among complete
    sets: one that is wholly in `cached` (paths), else Mistral's own when params.json is there or config.json is not,
    else safetensors before pickles. FetchError when there is no complete set.
    """
    found = [weights for kind in _KINDS if (weights := _find(kind, files)) is not None]
    known = {kind.layout for kind in _KINDS} - {"auto"}
    admitted = [weights for weights in found if layout not in known or weights.kind.layout == layout]
    complete = [weights for weights in admitted if not weights.absent]
    if not complete:
        raise _no_set(files, found, admitted, layout, where)
    names = {file.path for file in files}
    native_first = "params.json" in names or "config.json" not in names
    complete.sort(key=lambda weights: _rank(weights, native_first, cached))
    taken = complete[0]
    small = [file for file in files if _COMPANIONS.fullmatch(file.path) or file.path == taken.kind.index_file]
    picked = (*sorted(small, key=_smallest_first), *taken.files)
    note = f"weights: {taken}"
    others = [weights for weights in found if weights is not taken]
    if others:
        note += "; left out: " + ", ".join(f"{other}, incomplete" if other.absent else str(other) for other in others)
    return Chosen(picked, sum(file.size for file in picked), note)


def choose_small(files: Sequence[RemoteFile]) -> Chosen:
    """The configuration and tokenizer files alone, for what needs no weights."""
    picked = tuple(sorted((file for file in files if _COMPANIONS.fullmatch(file.path)), key=_smallest_first))
    return Chosen(picked, sum(file.size for file in picked), "no weights: configuration and tokenizer only")


def _smallest_first(file: RemoteFile) -> tuple[int, str]:
    return file.size, file.path


def _rank(weights: _Set, native_first: bool, cached: Container[str]) -> tuple[bool, int]:
    order = _KINDS.index(weights.kind)
    if not native_first and order < 2:
        order = 1 - order
    return not all(file.path in cached for file in weights.files), order


def _find(kind: _Kind, files: Sequence[RemoteFile]) -> _Set | None:
    """The set of this kind: the single file before shards, of several countings the one that lacks least."""
    single = sorted((file for file in files if re.fullmatch(kind.single, file.path, re.ASCII)), key=lambda f: f.path)
    if single:
        # Several files of any name may be several models: no choice is better than a wrong one.
        return _Set(kind, (single[0],), ()) if len(single) == 1 else None
    countings: dict[int, dict[int, RemoteFile]] = {}
    for file in files:
        match = re.fullmatch(kind.shard, file.path, re.ASCII)
        if match:
            count = int(match[2]) if match.re.groups == 2 else 0
            countings.setdefault(count, {})[int(match[1])] = file
    sets = [_numbered(kind, count, shards) for count, shards in countings.items()]
    return min(sets, key=lambda weights: (len(weights.absent), -len(weights.files)), default=None)


def _numbered(kind: _Kind, count: int, shards: dict[int, RemoteFile]) -> _Set:
    """Shards as a set; those of `count` count from 1, those that name no count (0) from 0 to the largest number."""
    wanted = range(1, count + 1) if count else range(max(shards) + 1)
    example = next(iter(shards.values())).path
    digits = re.search(r"\d+", example)
    assert digits is not None
    absent = tuple(
        f"{example[: digits.start()]}{number:0{len(digits[0])}d}{example[digits.end() :]}"
        for number in wanted
        if number not in shards
    )
    return _Set(kind, tuple(shards[number] for number in sorted(shards)), absent)


def _no_set(
    files: Sequence[RemoteFile], found: list[_Set], admitted: list[_Set], layout: str, where: str | None
) -> FetchError:
    if admitted:
        lacking = admitted[0]
        shown = ", ".join(lacking.absent[:5]) + (", ..." if len(lacking.absent) > 5 else "")
        count = len(lacking.absent) + len(lacking.files)
        return FetchError(
            f"{len(lacking.absent)} of the {count} files of {lacking.kind.title} missing",
            where=where,
            found=f"no {shown}",
        )
    if found:
        return FetchError(
            f"no weights in the layout {layout!r}",
            where=where,
            found=", ".join(map(str, found)),
            hint="write `layout: auto` in the card's source",
        )
    large = sorted(files, key=lambda file: -file.size)[:5]
    return FetchError(
        "no weights that zoo can read",
        where=where,
        found=", ".join(file.path for file in large) or "no file at all",
        expected="consolidated*.safetensors, model*.safetensors, consolidated.*.pth or pytorch_model*.bin",
    )
