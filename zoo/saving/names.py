"""Which tensors a file must hold for a model, in a layout: the table of weight names read from the model's side.

A tensor of the model may have several names in a table, for files of several makers. The first one counts that the
weights came with, where their settings stay as well, then one that the architecture's row of families.yaml prefers,
then the table's first. No torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from zoo.loading.layouts import Layout, Row
from zoo.loading.mapping import file_shapes, side_by_side, targets_of
from zoo.registry.errors import WeightsError
from zoo.registry.spec import Spec, Tensor

INVERTED = {"stack", "split", "transpose", "interleaved_rope"}
"""Transforms that can be undone."""


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor to write: the model's tensors that it is made of, one group for each number of a stack."""

    name: str
    shape: tuple[int, ...]
    row: Row
    groups: tuple[tuple[Tensor, ...], ...]

    @property
    def in_columns(self) -> bool:
        """Whether the tensors of a group stand side by side, not one below the other."""
        return side_by_side(self.row)


def file_tensors(
    spec: Spec, layout: Layout, present: Collection[str] = (), preferred: Sequence[str] = ()
) -> list[FileTensor]:
    """The tensors of a file that holds the model, in the model's order.

    present: names to take where there is a choice; preferred: parts of names, after these. Raises WeightsError where
    the layout has no name for a tensor.
    """
    wanted = {tensor.name: tensor for tensor in spec.tensors()}
    written = {layout.plain(name): name for name in present}
    found: list[FileTensor] = []
    placed: set[str] = set()
    for name in wanted:
        if name in placed:
            continue
        ranked = sorted(
            (tensor for tensor in _candidates(name, layout, wanted) if not placed & _sources(tensor)),
            key=lambda tensor: _rank(tensor.name, written, preferred),
        )
        if not ranked:
            raise WeightsError(
                f"the layout {layout.name!r} has no name for {name}",
                expected="a layout whose table names every tensor of the model",
                hint="save it in the layout 'zoo', which can name any",
            )
        found.append(replace(ranked[0], name=written.get(ranked[0].name, ranked[0].name)))
        placed |= _sources(ranked[0])
    return found


def _rank(name: str, present: Collection[str], preferred: Sequence[str]) -> tuple[bool, int]:
    return name not in present, next((i for i, part in enumerate(preferred) if part in name), len(preferred))


def _sources(tensor: FileTensor) -> set[str]:
    return {part.name for group in tensor.groups for part in group}


def _candidates(name: str, layout: Layout, wanted: Mapping[str, Tensor]) -> Iterator[FileTensor]:
    """Every tensor of a file that would fill `name`, and others with it that the model has too."""
    for file_name in layout.file_names(name):
        read = ((row, targets_of(row, holes, wanted)) for row, holes in layout.meanings(file_name))
        meaning = next((found for found in read if all(part in wanted for group in found[1] for part in group)), None)
        # Not what reading the name would give, or a fused tensor with parts that the model has not.
        if meaning is None or not any(name in group for group in meaning[1]):
            continue
        row, groups = meaning
        tensors = tuple(tuple(wanted[part] for part in group) for group in groups)
        shapes = file_shapes(row, tensors)
        if shapes and INVERTED.issuperset(row.transforms):
            yield FileTensor(file_name, shapes[0], row, tensors)
