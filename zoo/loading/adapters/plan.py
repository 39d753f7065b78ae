"""Every tensor of an adapter against the model's, through the tables of weight names; what fits nowhere is an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from zoo.components.adapter import adaptable
from zoo.loading import pieces as held
from zoo.loading.adapters.files import SHOWN, AdapterFiles, Pair, open_adapter
from zoo.loading.layouts import Layout, Row, fill, layouts
from zoo.loading.mapping import FLOATS, Placement, file_shapes, pieces
from zoo.loading.reader import TensorInfo, shape_text
from zoo.registry.errors import WeightsError, nearest
from zoo.registry.plan import Plan
from zoo.registry.spec import Tensor

ADAPTED = "weight"


@dataclass(frozen=True, slots=True)
class Piece:
    """A pair's share of one stored weight: `a` says which columns of A go to which of the weight's columns, `b` which
    rows of B go to which of its rows."""

    pair: Pair
    a: tuple[Placement, ...]
    b: tuple[Placement, ...]

    def of(self, own: Mapping[str, held.Piece]) -> Piece | None:
        """What a rank adds that holds these pieces of the weights; None where it holds nothing of this one."""
        names = [placement.tensor.name for placement in self.b]
        if not all(name in own for name in names):
            return None
        rank, first = self.pair.rank, own[names[0]]
        a_name, columns = self.a[0].tensor.name, first.tensor.shape[1]
        whole_a = replace(self.a[0].tensor, shape=(rank, columns))
        a = held.Piece(whole_a, 1, first.ranges if first.axis == 1 else ())
        b = {name: _rows(own[name], rank) for name in names}
        return Piece(self.pair, tuple(held.narrowed(self.a, {a_name: a})), tuple(held.narrowed(self.b, b)))


def _rows(piece: held.Piece, rank: int) -> held.Piece:
    """The piece of B for a piece of its weight."""
    tensor = replace(piece.tensor, shape=(piece.tensor.shape[0], rank))
    return held.Piece(tensor, 0, piece.ranges if piece.axis == 0 else ())


@dataclass
class AdapterPlan:
    """pieces: by the path of the module that they are added to. whole: tensors that replace the model's.

    replaced: their names, also of those that only other ranks hold.
    """

    files: AdapterFiles
    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    whole: list[Placement] = field(default_factory=list)
    note: str = ""
    replaced: tuple[str, ...] = ()

    def of(self, own: Mapping[str, held.Piece]) -> AdapterPlan:
        """What a rank reads that holds these pieces of the weights."""
        found: dict[str, list[Piece]] = {}
        for piece in (piece for several in self.pieces.values() for piece in several):
            share = piece.of(own)
            if share is not None:
                found.setdefault(share.b[0].tensor.param.rpartition(".")[0], []).append(share)
        return replace(self, pieces=found, whole=held.narrowed(self.whole, own))


def plan_adapter(ref: str | Path, plan: Plan, module: nn.Module) -> AdapterPlan:
    """Finds the place of everything that the adapter holds; `module` may be on the meta device.

    Raises WeightsError as `open_adapter`, and one that names what does not belong to the model or is not there.
    """
    files = open_adapter(ref)
    matching = _Matching(files, plan, module)
    for pair in files.pairs:
        matching.pair(pair)
    for name, info in files.whole.items():
        matching.replacement(name, info)
    matching.check_targets()
    if matching.problems:
        raise matching.error()
    replaced = tuple(placement.tensor.name for placement in matching.whole)
    result = AdapterPlan(files, matching.pieces, matching.whole, replaced=replaced)
    result.note = _note(result, plan)
    return result


class _Matching:
    """Looks for the tensors' places, and collects what has none."""

    def __init__(self, files: AdapterFiles, plan: Plan, module: nn.Module) -> None:
        self.files, self.plan, self.module = files, plan, module
        self.tensors = {tensor.name: tensor for tensor in plan.model.tensors()}
        self.layout = _layout(files, self.tensors)
        self.pieces: dict[str, list[Piece]] = {}
        self.whole: list[Placement] = []
        self.problems: list[str] = []
        self.lacking: list[str] = []
        self.placed: set[str] = set()

    def pair(self, pair: Pair) -> None:
        """Places a pair, or says why not."""
        found = self._find(f"{pair.name}.{ADAPTED}")
        if found is None:
            return
        row, tensors = found
        path, _, leaf = tensors[0].param.rpartition(".")
        if leaf != ADAPTED or row.stacked or not adaptable(self.module, path):
            self.problems.append(f"{pair.name}: {tensors[0].name} cannot be adapted, only products within a block can")
            return
        # B's rows are the outputs, whichever way round the base's file holds its weight.
        row = replace(row, transforms=tuple(t for t in row.transforms if t != "transpose"))
        factors = [replace(t, shape=(t.shape[0], pair.rank)) for t in tensors]
        inputs = tensors[0].shape[1]
        b_shape = file_shapes(row, [factors])[0]
        if pair.a.shape[1] != inputs or pair.b.shape != b_shape:
            expected = f"A {shape_text((pair.rank, inputs))} and B {shape_text(b_shape)}"
            given = f"A {shape_text(pair.a.shape)} and B {shape_text(pair.b.shape)}"
            self.problems.append(f"{pair.name}: {given}, the model needs {expected}")
            return
        if self._claimed(pair.name, tensors) or not self._readable(pair.a, pair.b):
            return
        whole_a = Tensor(pair.a.name, pair.a.shape, tensors[0].param, (), None)
        a = Placement(whole_a, pair.a, (0, pair.rank), (inputs,))
        self.pieces.setdefault(path, []).append(Piece(pair, (a,), tuple(pieces(pair.b, row, [factors]))))

    def replacement(self, name: str, info: TensorInfo) -> None:
        """Places a whole tensor, or says why not."""
        found = self._find(name)
        if found is None:
            return
        row, tensors = found
        shapes = [] if row.stacked else file_shapes(row, [tensors])
        if info.shape not in shapes:
            expected = " or ".join(map(shape_text, shapes)) or "one tensor for each expert"
            self.problems.append(f"{name}: {shape_text(info.shape)}, the model needs {expected}")
        elif not self._claimed(name, tensors) and self._readable(info):
            self.whole += pieces(info, row, [tensors])

    def check_targets(self) -> None:
        """Every module that the config names as adapted must be; asked when all that is there has its place."""
        if self.problems:
            return
        for tensor in self.tensors.values():
            path, _, leaf = tensor.param.rpartition(".")
            if tensor.name in self.placed or leaf != ADAPTED or not adaptable(self.module, path):
                continue
            names = [name.removesuffix(f".{ADAPTED}") for name in self.layout.file_names(tensor.name)]
            wanted = [n for n in names if any(n == t or n.endswith(f".{t}") for t in self.files.targets)]
            if wanted:
                self.lacking.append(f"{wanted[0]}: named in target_modules, and not in the file")
        self.problems += self.lacking

    def error(self) -> WeightsError:
        """All problems as one message: the first few, and how many there are."""
        count, names = len(self.problems), len(self.files.pairs) + len(self.files.whole)
        more = f"; and {count - SHOWN} more" if count > SHOWN else ""
        title = f"the adapter does not fit the model: {count} of its {names} modules have no place"
        if not self.placed:
            title = "the adapter matches nothing of this model"
        elif self.lacking:
            title = "the adapter is not whole"
        hint = f"it was trained on {self.files.base!r}: is this its base?" if self.files.base else "is this its base?"
        hint = "save the adapter again" if self.lacking else hint
        return WeightsError(title, where=self.files.where, found="; ".join(self.problems[:SHOWN]) + more, hint=hint)

    def _find(self, name: str) -> tuple[Row, list[Tensor]] | None:
        meanings = [_meant(row, holes) for row, holes in self.layout.meanings(name)]
        if not meanings:
            known = (file for tensor in self.tensors for file in self.layout.file_names(tensor))
            hint = nearest(name, list(known)[:400], count=1)
            self.problems.append(f"{name}, which is no tensor of this model{f', {hint[:-1]}' if hint else ''}")
            return None
        for row, names in meanings:
            if all(target in self.tensors for target in names):
                return row, [self.tensors[target] for target in names]
        lost = next(target for target in meanings[0][1] if target not in self.tensors)
        self.problems.append(f"{name}, which would be {lost}, a tensor that the card has not")
        return None

    def _claimed(self, name: str, tensors: Sequence[Tensor]) -> bool:
        """Whether one of the tensors is changed already; they are from now on."""
        twice = [tensor.name for tensor in tensors if tensor.name in self.placed]
        self.placed.update(tensor.name for tensor in tensors)
        self.problems += [f"{name}: {other} is changed twice" for other in twice]
        return bool(twice)

    def _readable(self, *infos: TensorInfo) -> bool:
        wrong = [info for info in infos if info.dtype not in FLOATS]
        self.problems += [f"{info.name} is {info.dtype}, which is not read" for info in wrong]
        return not wrong


def _layout(files: AdapterFiles, tensors: Mapping[str, Tensor]) -> Layout:
    """The table by which most of the adapter's names mean tensors of the model; of equals, the one that knows more."""
    names = [*(f"{pair.name}.{ADAPTED}" for pair in files.pairs), *files.whole]

    def fits(layout: Layout) -> tuple[int, int]:
        meant = ([_meant(row, holes) for row, holes in layout.meanings(name)] for name in names)
        found = sum(any(all(target in tensors for target in own) for _, own in rows) for rows in meant)
        return found, layout.score(names)

    return max(layouts().values(), key=fits)


def _meant(row: Row, holes: Mapping[str, str]) -> tuple[Row, list[str]]:
    """A row with the model's names; of a stack, the first."""
    filled = {**holes, row.stacked: "0"} if row.stacked else holes
    return row, [fill(target, filled) for target in row.targets]


def _note(found: AdapterPlan, plan: Plan) -> str:
    files = found.files
    count = len(files.pairs) + len(files.whole)
    ranks = _span(pair.rank for pair in files.pairs)
    scales = _span(pair.scale for pair in files.pairs)
    text = f"matched {count}/{count}, rank {ranks}, scale {scales}"
    text += f" ({files.scales})" if files.scales else ""
    if files.whole:
        text += f", {len(files.whole)} whole tensors"
    hub = plan.card.source.hub
    if files.base and hub and Path(files.base).name.lower() != Path(hub).name.lower():
        text += f"; trained on {files.base}, used on {hub}"
    return text


def _span(values: Iterator[float]) -> str:
    found = sorted(set(values))
    if not found:
        return "none"
    return f"{found[0]:.6g}" if len(found) == 1 else f"{found[0]:.6g} to {found[-1]:.6g}"
