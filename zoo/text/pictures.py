"""Pictures as token ids: one for each cell, and one that ends each row of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from zoo.images.picture import Picture
from zoo.registry.errors import TextError

NAMES = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")


class PictureIds(NamedTuple):
    """Ids of a cell's token, of the end of a row, and of the end of the last row."""

    cell: int
    row_end: int
    end: int

    @classmethod
    def of(cls, control_id: Callable[[str], int | None]) -> PictureIds:
        """The ids by their names in the tokenizer. Raises TextError where it lacks one."""
        found = [control_id(name) for name in NAMES]
        if None in found:
            missing = ", ".join(name for name, number in zip(NAMES, found, strict=True) if number is None)
            raise TextError("this tokenizer cannot write images", found=f"no token {missing}")
        return cls(*(number for number in found if number is not None))

    def row(self, columns: int, rows: int) -> list[int]:
        """The ids of a picture of so many cells."""
        ids = ([self.cell] * columns + [self.row_end]) * rows
        ids[-1] = self.end
        return ids

    def expand(self, ids: Sequence[int], pictures: Sequence[Picture]) -> list[int]:
        """`ids` with each single cell's id as a whole picture. Raises TextError unless both are equally many."""
        if ids.count(self.cell) != len(pictures):
            raise TextError(
                "the chat template does not write every image",
                found=f"{ids.count(self.cell)} places for {len(pictures)} images",
            )
        left = iter(pictures)
        expanded: list[int] = []
        for number in ids:
            picture = next(left) if number == self.cell else None
            expanded += [number] if picture is None else self.row(picture.columns, picture.rows)
        return expanded
