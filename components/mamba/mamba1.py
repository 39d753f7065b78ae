"""Mamba: a scan in which every channel has decays of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.components.build import make
from zoo.components.linear import Linear
from zoo.components.mamba.convolution import CausalConv
from zoo.components.mamba.scan import selective
from zoo.components.mamba.spec import Mamba1Spec
from zoo.components.native import recurrent
from zoo.components.native.recurrent import Places, moved
from zoo.components.step import RecurrentState, Step


class Mamba1(nn.Module):
    """Projects to x and the gate z; from the convolved x come dt, B and C; scan, gate, projection."""

    def __init__(self, spec: Mamba1Spec) -> None:
        super().__init__()
        self.spec = spec
        self.in_proj = Linear(spec.dim, 2 * spec.inner_dim, bias=spec.bias)
        self.conv = CausalConv(spec.inner_dim, spec.conv_size, bias=spec.conv_bias)
        self.x_proj = Linear(spec.inner_dim, spec.dt_rank + 2 * spec.state_size)
        self.dt_proj = Linear(spec.dt_rank, spec.inner_dim)
        self.a_log = nn.Parameter(torch.empty(spec.inner_dim, spec.state_size))
        self.d = nn.Parameter(torch.empty(spec.inner_dim))
        self.dt_bias = nn.Parameter(torch.empty(spec.inner_dim))
        for name, norm in spec.children().items():
            self.add_module(name, make(norm))
        self.out_proj = Linear(spec.inner_dim, spec.dim, bias=spec.bias)

    def forward(self, x_TD: Tensor, step: Step, state: RecurrentState) -> Tensor:
        """(T, D) to (T, D); moves `state` on by this step's rows."""
        spec = self.spec
        x_TW, z_TW = self.in_proj(x_TD).chunk(2, dim=1)
        x_TW = state.advance("conv", self.conv, x_TW)
        dt_TI, b_Tn, c_Tn = self.x_proj(x_TW).split((spec.dt_rank, spec.state_size, spec.state_size), dim=1)
        b_Tn, c_Tn, dt_TI = (self._normed(name, value) for name, value in (("b", b_Tn), ("c", c_Tn), ("dt", dt_TI)))
        scan = Scan(self.a_log, self.d, self.dt_bias)
        y_TW = state.advance("ssm", scan, x_TW, self.dt_proj(dt_TI), b_Tn, c_Tn, z_TW)
        y_TD: Tensor = self.out_proj(y_TW)
        return y_TD

    def _normed(self, name: str, x_TI: Tensor) -> Tensor:
        norm = self.spec.bcdt_norm
        if norm is None:
            return x_TI
        if norm.weights:
            normed_TI: Tensor = self.get_submodule(f"{name}_norm")(x_TI)
            return normed_TI
        return F.rms_norm(x_TI, x_TI.shape[1:], None, norm.eps)


class Scan:
    """Rows x, dt, B, C and z to y silu(z): y is the scan with steps softplus(dt + bias) and decays exp(-exp(a_log)
    step), plus d x. Computed in float32, returned in x's dtype."""

    def __init__(self, a_log_Wn: Tensor, d_W: Tensor, dt_bias_W: Tensor) -> None:
        self.a_log_Wn, self.d_W, self.dt_bias_W = a_log_Wn, d_W, dt_bias_W

    def __call__(self, state_BWn: Tensor | None, *rows: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs (B, T, W) and the state after them."""
        if self.moves(*rows):
            return moved(self, state_BWn, tuple(self.a_log_Wn.shape), torch.float32, *rows)
        return self.reference(state_BWn, *rows)

    def reference(self, state_BWn: Tensor | None, *rows: Tensor) -> tuple[Tensor, Tensor]:
        """The formula, by `selective`."""
        x_BTW, dt_BTW, b_BTn, c_BTn, z_BTW = (value.float() for value in rows)
        dt_BTW = F.softplus(dt_BTW + self.dt_bias_W)
        y_BTW, state_BWn = selective(-torch.exp(self.a_log_Wn), state_BWn, x_BTW, dt_BTW, b_BTn, c_BTn)
        return (torch.addcmul(y_BTW, self.d_W, x_BTW) * F.silu(z_BTW)).to(rows[0].dtype), state_BWn

    def moves(self, *rows: Tensor) -> bool:
        """Whether the native kernel takes such rows."""
        parameters = (self.a_log_Wn, self.d_W, self.dt_bias_W)
        return self.a_log_Wn.shape[1] <= recurrent.LARGEST and recurrent.runs(*rows, parameters=parameters)

    def move(self, places: Places, *rows: Tensor) -> Tensor:
        """(T, W), of the rows of a step; the state of each sequence is replaced."""
        x_TW, dt_TW, b_Tn, c_Tn, z_TW = rows
        return recurrent.selective(places, self.a_log_Wn, self.d_W, self.dt_bias_W, (x_TW, dt_TW, b_Tn, c_Tn, z_TW))
