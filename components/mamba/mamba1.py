"""Mamba: a scan in which every channel has decays of its own."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.components.build import make
from zoo.components.linear import Linear
from zoo.components.mamba.convolution import CausalConv
from zoo.components.mamba.scan import selective
from zoo.components.mamba.spec import Mamba1Spec
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
        b_Tn, c_Tn, dt_TI = (
            self._normed(name, value).contiguous() for name, value in (("b", b_Tn), ("c", c_Tn), ("dt", dt_TI))
        )
        dt_TW = F.softplus(self.dt_proj(dt_TI).float() + self.dt_bias)
        scan = partial(selective, -torch.exp(self.a_log))
        y_TW = state.advance("ssm", scan, x_TW.float(), dt_TW, b_Tn.float(), c_Tn.float())
        y_TW = torch.addcmul(y_TW, self.d, x_TW.float()) * F.silu(z_TW.float())
        y_TD: Tensor = self.out_proj(y_TW.to(x_TD.dtype))
        return y_TD

    def _normed(self, name: str, x_TI: Tensor) -> Tensor:
        norm = self.spec.bcdt_norm
        if norm is None:
            return x_TI
        if norm.weights:
            normed_TI: Tensor = self.get_submodule(f"{name}_norm")(x_TI)
            return normed_TI
        return F.rms_norm(x_TI, x_TI.shape[1:], None, norm.eps)
