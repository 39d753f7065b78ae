"""Every tensor of the files against every tensor of the model: none missing, left over, twice, or of another shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from zoo.loading.layouts import Layout, Row, fill
from zoo.loading.reader import BITS, TensorInfo, shape_text
from zoo.registry.errors import WeightsError, nearest
from zoo.registry.spec import Rotary, Spec, Tensor

FLOATS = ("BF16", "F16", "F32", "F64")
SCALED = ("F8_E4M3", "F8_E5M2", "F4")
SHOWN = 5

_KINDS = {
    "type": "of a type that is not read yet",
    "shape": "of another shape",
    "missing": "missing from the files",
    "unused": "in the files only",
    "twice": "given twice",
}


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a tensor of the model comes from.

    The source is seen as rows of `row_shape`; `rows` (start, stop) are taken, and of these, `columns` only when given.
    Then they are transposed, or their heads brought from interleaved pairs to halves, when `transpose` or
    `interleaved` says so.
    """

    tensor: Tensor
    source: TensorInfo
    rows: tuple[int, int]
    row_shape: tuple[int, ...]
    columns: tuple[int, int] | None = None
    transpose: bool = False
    interleaved: Rotary | None = None

    @property
    def row_bytes(self) -> int:
        return prod(self.row_shape) * BITS[self.source.dtype] // 8

    @property
    def nbytes(self) -> int:
        """Bytes of the file that fill the tensor."""
        return prod(self.tensor.shape) * BITS[self.source.dtype] // 8


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault: its kind (`type`, `shape`, `missing`, `unused`, `twice`), the tensor's name, and all in words."""

    kind: str
    name: str
    text: str

    def __str__(self) -> str:
        return f"{_KINDS[self.kind]}: {self.text}"


@dataclass
class Comparison:
    """What fits and what does not. Names of the model's tensors are keys of `placements`."""

    layout: Layout
    placements: dict[str, Placement] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(placement.nbytes for placement in self.placements.values())

    def ordered(self) -> list[Problem]:
        """The problems by kind, in the order in which they explain each other."""
        order = list(_KINDS)
        return sorted(self.problems, key=lambda problem: order.index(problem.kind))

    def error(self, where: str) -> WeightsError:
        """All problems as one message: of each kind the first few, and how many there are."""
        lines = []
        for kind, title in _KINDS.items():
            texts = [problem.text for problem in self.problems if problem.kind == kind]
            more = f"; and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
            if texts:
                lines.append(f"\n  {len(texts)} {title}: {'; '.join(texts[:SHOWN])}{more}")
        count = len(self.problems)
        title = f"the files and the card differ in {count} tensor{'s' if count > 1 else ''} (layout {self.layout.name})"
        return WeightsError(title + "".join(lines), where=where, hint=self._hint())

    def _hint(self) -> str | None:
        missing = {problem.name for problem in self.problems if problem.kind == "missing"}
        if any(problem.kind == "type" for problem in self.problems):
            return "use the checkpoint's bfloat16 edition"
        if not self.placements:
            return "is this the card of these weights?"
        if "head.weight" in missing:
            return "if the head is the embedding, set `model.tied_embeddings: true`"
        return None


def plan_mapping(spec: Spec, layout: Layout, headers: Mapping[str, TensorInfo], where: str) -> list[Placement]:
    """The source of every tensor of the model. Raises one WeightsError naming every kind of difference."""
    found = compare(spec, layout, headers)
    if found.problems:
        raise found.error(where)
    return list(found.placements.values())


def compare(spec: Spec, layout: Layout, headers: Mapping[str, TensorInfo]) -> Comparison:
    """Matches the headers of a checkpoint with the model's tensors, strict both ways."""
    wanted = {tensor.name: tensor for tensor in spec.tensors()}
    found, spoken = Comparison(layout), set[str]()
    unused: list[tuple[TensorInfo, str | None]] = []
    for info in headers.values():
        meanings = [(row, targets_of(row, holes, wanted)) for row, holes in layout.meanings(info.name)]
        unknown = [[name for group in groups for name in group if name not in wanted] for _, groups in meanings]
        if not all(unknown):
            row, groups = meanings[unknown.index([])]
            _claim(found, spoken, info, row, [[wanted[name] for name in group] for group in groups])
        elif not layout.ignores(info.name):
            unused.append((info, unknown[0][0] if unknown else None))
    missing = [tensor for name, tensor in wanted.items() if name not in spoken]
    found.problems += [*_missing(layout, missing, headers), *_unused(layout, unused, missing)]
    return found


def targets_of(row: Row, holes: dict[str, str], wanted: Mapping[str, Tensor]) -> list[list[str]]:
    """The names that a file's tensor fills: one group, or one for each number that the model has of a stack."""
    if row.stacked is None:
        return [[fill(target, holes) for target in row.targets]]
    groups: list[list[str]] = []
    while True:
        group = [fill(target, {**holes, row.stacked: str(len(groups))}) for target in row.targets]
        if groups and not all(name in wanted for name in group):
            return groups
        groups.append(group)
        if not all(name in wanted for name in group):
            return groups


def _claim(found: Comparison, spoken: set[str], info: TensorInfo, row: Row, groups: Sequence[Sequence[Tensor]]) -> None:
    """Places the pieces of one file's tensor, or says why they cannot be."""
    tensors = [tensor for group in groups for tensor in group]
    spoken.update(tensor.name for tensor in tensors)
    name = tensors[0].name
    if info.dtype not in FLOATS and info.coding is None:
        text = f"{name} ({info.name} is {info.dtype}{' without scales' if info.dtype in SCALED else ''})"
        found.problems.append(Problem("type", name, text))
        return
    expected = file_shapes(row, groups)
    if info.shape not in expected:
        shapes = " or ".join(map(shape_text, expected)) or "experts of one shape"
        text = f"{name} ({info.name} is {shape_text(info.shape)}, the card says {shapes})"
        found.problems.append(Problem("shape", name, text))
        return
    for placement in pieces(info, row, groups):
        first = found.placements.setdefault(placement.tensor.name, placement)
        if first is not placement:
            text = f"{placement.tensor.name} ({first.source.name} and {info.name})"
            found.problems.append(Problem("twice", placement.tensor.name, text))


def _stored(tensor: Tensor, row: Row) -> tuple[int, ...]:
    """The shape of one piece before its own transposition."""
    shape = tensor.shape or (1,)
    return (*shape[:-2], shape[-1], shape[-2]) if "transpose" in row.transforms and len(shape) > 1 else shape


def side_by_side(row: Row) -> bool:
    """Whether a file's tensor holds its pieces in columns."""
    order = row.transforms
    return "split" in order and "transpose" in order and order.index("transpose") < order.index("split")


def _group_shape(row: Row, group: Sequence[Tensor]) -> tuple[int, ...] | None:
    """The shape of one group's pieces together; None when they do not fit together."""
    shapes = [_stored(tensor, row) for tensor in group]
    axis = len(shapes[0]) - 1 if side_by_side(row) else 0
    rest = {shape[:axis] + shape[axis + 1 :] for shape in shapes}
    if len(rest) > 1:
        return None
    return (*shapes[0][:axis], sum(shape[axis] for shape in shapes), *shapes[0][axis + 1 :])


def file_shapes(row: Row, groups: Sequence[Sequence[Tensor]]) -> list[tuple[int, ...]]:
    """The shapes that the file's tensor may have."""
    shapes = {_group_shape(row, group) for group in groups}
    shape = shapes.pop()
    if shape is None or shapes:
        return []
    if row.stacked is None:
        return [groups[0][0].shape if len(groups[0]) == 1 and not groups[0][0].shape else shape]
    return [(len(groups), *shape), (len(groups) * shape[0], *shape[1:])]


def pieces(info: TensorInfo, row: Row, groups: Sequence[Sequence[Tensor]]) -> Iterator[Placement]:
    """One placement for each tensor of the groups; the file's shape has been checked."""
    turned, aside = "transpose" in row.transforms, side_by_side(row)
    interleaved = "interleaved_rope" in row.transforms
    shape = _group_shape(row, groups[0])
    assert shape is not None
    for number, group in enumerate(groups):
        at = 0
        for tensor in group:
            size = _stored(tensor, row)[-1 if aside else 0]
            rows = (0, shape[0]) if aside else (at, at + size)
            yield Placement(
                tensor,
                info,
                (number * shape[0] + rows[0], number * shape[0] + rows[1]),
                shape[1:],
                (at, at + size) if aside else None,
                turned and len(tensor.shape) > 1,
                tensor.rotary if interleaved else None,
            )
            at += size


def _missing(layout: Layout, missing: Sequence[Tensor], headers: Mapping[str, TensorInfo]) -> Iterator[Problem]:
    for tensor in missing:
        known = list(layout.file_names(tensor.name))
        name = f" (in a file: {known[0]})" if known and known[0] != tensor.name else ""
        yield Problem("missing", tensor.name, f"{tensor.name} {shape_text(tensor.shape)}{name}")


def _unused(
    layout: Layout, unused: Sequence[tuple[TensorInfo, str | None]], missing: Sequence[Tensor]
) -> Iterator[Problem]:
    names = [name for tensor in missing[:200] for name in layout.file_names(tensor.name)]
    for count, (info, target) in enumerate(unused):
        text = f"{info.name} {shape_text(info.shape)}"
        if target is not None and target != info.name:
            text += f", which would be {target}, a tensor that the card has not"
        elif count < SHOWN and (near := nearest(info.name, names, count=1)):
            text += f", {near.removesuffix('?')}"
        yield Problem("unused", info.name, text)
