"""Matrices in the layout that kernels.c and tiles.c read: with a few rows as fast as memory gives.

Sixteen lines of a panel, 32 inputs, are what Intel's tile operations take as their right side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.components import native
from zoo.components.matrix import Index
from zoo.components.pages import fresh

LANES = 16
"""Outputs of a panel: a matrix has a multiple of them."""


def pays(weight: Tensor) -> bool:
    """Whether a parameter's matrices are stored in panels: of shapes that fit, where the kernels are in use."""
    return (
        weight.dtype is torch.bfloat16
        and weight.device.type in ("cpu", "meta")
        and weight.shape[-1] % 2 == 0
        and weight.shape[-2] % LANES == 0
        and native.missing() is None
    )


@dataclass(frozen=True, slots=True)
class Panels:
    """A bfloat16 matrix (O, I) whose values lie as (O / 16, I / 2, 16, 2): two inputs of sixteen outputs together.

    words: (O / 16, I / 2, 16) int32, each of two inputs.
    """

    words: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, weight_OI: Tensor) -> Panels:
        """The same values in panels, as in `words_reference`."""
        filling = PanelsFilling(weight_OI.shape, weight_OI.dtype)
        filling.put(0, weight_OI.contiguous())
        return filling.matrix()

    @property
    def nbytes(self) -> int:
        return self.words.nbytes

    @property
    def device(self) -> torch.device:
        return self.words.device

    def product(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        return native.library().panels(x_TI, self.words, self.shape[0], bias_O)

    def plain(self, index: Index = ()) -> Tensor:
        # A copy in any case: of two inputs the words are in order already, but not next to each other by their strides.
        rows = self.words.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        return rows.view(torch.bfloat16).view(self.shape)[index]

    def renewed(self, weight_OI: Tensor) -> Panels:
        return Panels.of(weight_OI)


class PanelsFilling:
    """Panels that are made of rows as they come."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        assert dtype is torch.bfloat16, "panels hold pairs of sixteen bits"
        outputs, inputs = shape
        self._made = Panels(fresh((outputs // LANES, inputs // 2, LANES), torch.int32), shape)

    def put(self, first: int, rows_RI: Tensor) -> None:
        panels, words = self._made.words[first // LANES :], rows_RI.shape[1] // 2
        pack, threads = native.library().handle.zoo_pack, torch.get_num_threads()
        pack(len(rows_RI), words, rows_RI.data_ptr(), words, panels.data_ptr(), threads)

    def matrix(self) -> Panels:
        return self._made


def words_reference(weight_OI: Tensor) -> Tensor:
    """A matrix's words as panels have them, by PyTorch."""
    words: Tensor = weight_OI.contiguous().view(torch.int32).unflatten(0, (-1, LANES))
    return words.transpose(1, 2).contiguous()
