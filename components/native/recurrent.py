"""State-space mixers by the kernels in recurrent.c: states move on where they lie, by all rows of a step at once.

Each of these rounds where the formula in zoo.components.mamba rounds. A row is computed as if it were alone: chunks of
a sequence give, bit by bit, what its tokens give one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.components import native

MOST_TAPS, LARGEST = 8, 256
"""The longest convolution, and the largest state of a channel, that the kernels have room for."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where the states of a step's sequences lie, `offset` bytes behind these addresses, and which rows move them on.

    numbers_B4: int64, for each sequence an address, its first row in the step, how many rows it has, and whether
    nothing came before them.
    """

    numbers_B4: Tensor
    offset: int = 0


def runs(*rows: Tensor, parameters: tuple[Tensor, ...] = ()) -> bool:
    """Whether the kernels take such rows: all of bfloat16 or all of float32, on a CPU, without gradients.

    parameters: those of a scan, which are float32.
    """
    dtype = rows[0].dtype
    return (
        (dtype is torch.bfloat16 or dtype is torch.float32)
        and rows[0].device.type == "cpu"
        and not torch.is_grad_enabled()
        and all(x.dtype is dtype and x.stride(-1) == 1 for x in rows)
        and all(x.dtype is torch.float32 for x in parameters)
        and native.missing() is None
    )


def moved(
    function: Any, state_B: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, *rows_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, ...) and the states after them, what was before left as it is: `function.move` on copies.

    shape, dtype: of one state.
    """
    batch, rows = rows_BT[0].shape[:2]
    left_B = torch.empty(batch, *shape, dtype=dtype)
    if state_B is not None:
        left_B.copy_(state_B)
    numbers = [(state.data_ptr(), i * rows, rows, state_B is None) for i, state in enumerate(left_B)]
    places = Places(torch.tensor(numbers, dtype=torch.int64))
    y_T: Tensor = function.move(places, *(value.flatten(0, 1) for value in rows_BT))
    return y_T.unflatten(0, (batch, rows)), left_B


def convolution(places: Places, x_TW: Tensor, weight_W1k: Tensor, bias_W: Tensor | None) -> Tensor:
    """silu(convolution), (T, W), as `zoo.components.mamba.convolution`; states (k, W) of x's dtype."""
    y_TW = torch.empty(x_TW.shape, dtype=x_TW.dtype)
    parameters = (weight_W1k.data_ptr(), None if bias_W is None else bias_W.data_ptr())
    sizes = (x_TW.shape[1], weight_W1k.shape[2])
    _call("zoo_convolution", *_step(places, x_TW), *sizes, *_rows(x_TW), *parameters, y_TW.data_ptr())
    return y_TW


def ssd(
    places: Places, a_log_H: Tensor, d_H: Tensor, dt_bias_H: Tensor, rows: tuple[Tensor, Tensor, Tensor, Tensor]
) -> Tensor:
    """Outputs (T, H, d) in float32 of `zoo.components.mamba.mamba2.Scan`, of its rows x, dt, b, c."""
    x_THd, _, b_TGn, _ = rows
    y_THd = torch.empty(x_THd.shape, dtype=torch.float32)
    sizes = (x_THd.shape[1], b_TGn.shape[1], x_THd.shape[2], b_TGn.shape[2])
    parameters = (a_log_H.data_ptr(), d_H.data_ptr(), dt_bias_H.data_ptr(), y_THd.data_ptr())
    _call("zoo_ssd", *_step(places, x_THd), *sizes, *_rows(*rows), *parameters)
    return y_THd


def selective(
    places: Places,
    a_log_Wn: Tensor,
    d_W: Tensor,
    dt_bias_W: Tensor,
    rows: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> Tensor:
    """Outputs (T, W) of `zoo.components.mamba.mamba1.Scan`, of its rows x, dt, b, c, z."""
    x_TW = rows[0]
    y_TW = torch.empty(x_TW.shape, dtype=x_TW.dtype)
    parameters = (a_log_Wn.data_ptr(), d_W.data_ptr(), dt_bias_W.data_ptr(), y_TW.data_ptr())
    _call("zoo_selective", *_step(places, x_TW), *a_log_Wn.shape, *_rows(*rows), *parameters)
    return y_TW


def gated_norm(y_TW: Tensor, z_TW: Tensor, weight_W: Tensor, groups: int, eps: float) -> Tensor:
    """(T, W) of z's dtype, as `zoo.components.mamba.mamba2.GatedNorm`. y is used up."""
    o_TW = torch.empty(y_TW.shape, dtype=z_TW.dtype)
    sizes = (len(y_TW), groups, y_TW.shape[1] // groups)
    places = (y_TW.data_ptr(), *_rows(z_TW), weight_W.data_ptr(), eps, o_TW.data_ptr())
    _call("zoo_gated_norm", z_TW.dtype is torch.float32, *sizes, *places)
    return o_TW


def _step(places: Places, x: Tensor) -> tuple[int, int, int, int]:
    numbers_B4 = places.numbers_B4
    return x.dtype is torch.float32, len(numbers_B4), numbers_B4.data_ptr(), places.offset


def _rows(*rows: Tensor) -> list[int]:
    """Where rows begin, and from one to the next; the last axes of each lie together."""
    return [number for x in rows for number in (x.data_ptr(), x.stride(0))]


def _call(name: str, *arguments: Any) -> None:
    getattr(native.library().handle, name)(*arguments, torch.get_num_threads())
