"""A checkpoint's headers against a card: the whole comparison of loading, without a weight being read. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.loading.files import WeightSet, locate, locate_in
from zoo.loading.layouts import layout_named
from zoo.loading.mapping import Comparison, compare
from zoo.loading.reader import TensorInfo, read_header
from zoo.registry.errors import FetchError
from zoo.registry.plan import Plan

if TYPE_CHECKING:
    from zoo.loading.hub import Remote


@dataclass(frozen=True)
class Report:
    """What the comparison found. `problems` are sentences, the worst kinds first; `counts` has how many of each kind;
    `summary` is the one message of loading, with the first few of each kind ("" without problems).

    tensors, bytes: of the files, all in all. placed: how many of the model's tensors they fill.
    schemes: how tensors are quantised, where they are.
    """

    card: str
    where: str
    layout: str
    files: tuple[str, ...]
    note: str
    schemes: tuple[str, ...]
    tensors: int
    bytes: int
    placed: int
    counts: Mapping[str, int]
    problems: tuple[str, ...]
    summary: str

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """The report as plain, JSON-able values."""
        return {
            "ok": self.ok,
            **vars(self),
            "files": [*self.files],
            "schemes": [*self.schemes],
            "problems": [*self.problems],
        }


def verify_files(plan: Plan, path: str | Path) -> Report:
    """Compares a local folder or file. Raises WeightsError where there is no whole set of weights."""
    return _report(plan, locate(path, plan.card.source.layout))


def verify_hub(plan: Plan) -> Report:
    """Compares the card's repository on the hub by reading the heads of its files. Raises FetchError, WeightsError."""
    from zoo.loading.hub import choose, list_files

    source = plan.card.source
    if source.hub is None:
        raise FetchError("the card has no hub repository", where=plan.card.name, expected="source.hub in the card")
    remote = list_files(source.hub, source.revision)
    chosen = choose(remote.files, source.layout, where=str(remote))
    folder = HubFolder(remote, {file.path: file.size for file in chosen.files})
    return _report(plan, locate_in(folder, source.layout))


@dataclass(frozen=True)
class HubFolder:
    """Files of a repository on the hub as a folder whose weight files are read by their heads only."""

    remote: Remote
    files: Mapping[str, int]

    @property
    def path(self) -> Path:
        return Path(str(self.remote))

    def sizes(self) -> Mapping[str, int]:
        return self.files

    def read(self, name: str) -> bytes:
        from zoo.loading.hub import read_file

        return read_file(self.remote, name)

    def headers(self, name: str) -> dict[str, TensorInfo]:
        from zoo.loading.hub import ranged_headers

        if not name.endswith(".safetensors"):
            hint = "fetch it with `zoo pull` and verify the folder"
            raise FetchError(
                "only safetensors files can be read by their heads", where=f"{self.path}/{name}", hint=hint
            )
        head = ranged_headers(self.remote, name)
        return read_header(self.path / name, self.files[name], lambda start, stop: head[start:stop])


def _report(plan: Plan, files: WeightSet) -> Report:
    found: Comparison = compare(plan.model, layout_named(files.layout), files.headers)
    ordered = found.ordered()
    counts: dict[str, int] = {}
    for problem in ordered:
        counts[problem.kind] = counts.get(problem.kind, 0) + 1
    return Report(
        card=plan.card.name,
        where=files.where,
        layout=files.layout,
        files=tuple(file.name for file in files.files),
        note=files.note,
        schemes=files.schemes,
        tensors=sum(1 + len(info.coding.companions if info.coding else ()) for info in files.headers.values()),
        bytes=files.nbytes,
        placed=len(found.placements),
        counts=counts,
        problems=tuple(map(str, ordered)),
        summary=str(found.error(files.where)) if ordered else "",
    )
