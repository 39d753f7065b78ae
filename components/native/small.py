"""Small operations by the native kernels: PyTorch takes a dozen passes for each.

They round where the formulas beside their components round, and a row's numbers do not depend on the rows beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.components import native


def runs(x: Tensor) -> bool:
    """Whether the kernels run on `x`: bfloat16 on a CPU, without gradients, rows of lanes that lie together."""
    return (
        x.dtype is torch.bfloat16
        and x.device.type == "cpu"
        and x.stride(-1) == 1
        and not torch.is_grad_enabled()
        and native.missing() is None
    )


def rms(x_TD: Tensor, weight_D: Tensor, eps: float, *, plus_one: bool = False) -> Tensor:
    """As `zoo.components.norm.rms`; x may have any number of axes whose rows lie at equal distances.

    plus_one: as `zoo.components.norm.rms_plus_one`.
    """
    rows_ND = x_TD.flatten(0, -2)
    o_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype)
    width = x_TD.shape[-1]
    arguments = (len(rows_ND), width, rows_ND.data_ptr(), rows_ND.stride(0), weight_D.data_ptr(), eps, o_TD.data_ptr())
    handle = native.library().handle
    (handle.zoo_rms_plus_one if plus_one else handle.zoo_rms)(*arguments, torch.get_num_threads())
    return o_TD


def add(x_TD: Tensor, y_TD: Tensor) -> Tensor:
    """x + y of rows of equal sizes."""
    o_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype)
    _add(x_TD, y_TD, None, 0.0, o_TD, None)
    return o_TD


def add_rms(x_TD: Tensor, y_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y, and `rms` of that."""
    sum_TD, normed_TD = (torch.empty(x_TD.shape, dtype=x_TD.dtype) for _ in range(2))
    _add(x_TD, y_TD, weight_D, eps, sum_TD, normed_TD)
    return sum_TD, normed_TD


def _add(x: Tensor, y: Tensor, weight: Tensor | None, eps: float, total: Tensor, normed: Tensor | None) -> None:
    rows, width = x.shape
    given = (x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), None if weight is None else weight.data_ptr(), eps)
    made = (total.data_ptr(), None if normed is None else normed.data_ptr())
    native.library().handle.zoo_add(rows, width, *given, *made, torch.get_num_threads())


def gate(gate_up_T2F: Tensor) -> Tensor:
    """silu(first half) * second half, (T, 2 F) to (T, F)."""
    rows, width = len(gate_up_T2F), gate_up_T2F.shape[1] // 2
    o_TF = torch.empty(rows, width, dtype=gate_up_T2F.dtype)
    arguments = (rows, width, gate_up_T2F.data_ptr(), gate_up_T2F.stride(0), o_TF.data_ptr())
    native.library().handle.zoo_gate(*arguments, torch.get_num_threads())
    return o_TF


def rotate(x_THd: Tensor, cos_T1r: Tensor, sin_T1r: Tensor) -> Tensor:
    """As `zoo.components.rope.rotary.rotate`."""
    o_THd = torch.empty(x_THd.shape, dtype=x_THd.dtype)
    cos_T1r, sin_T1r = cos_T1r.contiguous(), sin_T1r.contiguous()
    sizes = (*x_THd.shape, cos_T1r.shape[-1])
    places = (x_THd.data_ptr(), *x_THd.stride()[:2], cos_T1r.data_ptr(), sin_T1r.data_ptr(), o_THd.data_ptr())
    native.library().handle.zoo_rotate(*sizes, *places, torch.get_num_threads())
    return o_THd
