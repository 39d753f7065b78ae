"""Mamba-2: a scan with one decay per head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.components.linear import Linear
from zoo.components.mamba import single
from zoo.components.mamba.convolution import CausalConv
from zoo.components.mamba.scan import ssd
from zoo.components.mamba.spec import Mamba2Spec
from zoo.components.native import recurrent
from zoo.components.native.recurrent import Places, moved
from zoo.components.step import RecurrentState, Step


class Mamba2(nn.Module):
    """One projection to the gate z, the scan's x, B and C, and dt; convolution, scan, gated norm, projection."""

    def __init__(self, spec: Mamba2Spec) -> None:
        super().__init__()
        self.spec = spec
        self.in_proj = Linear(spec.dim, spec.inner_dim + spec.conv_channels + spec.num_heads, bias=spec.bias)
        self.conv = CausalConv(spec.conv_channels, spec.conv_size, bias=spec.conv_bias)
        self.a_log = nn.Parameter(torch.empty(spec.num_heads))
        self.d = nn.Parameter(torch.empty(spec.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(spec.num_heads))
        self.norm = GatedNorm(spec.inner_dim, spec.num_groups, spec.norm_eps)
        self.out_proj = Linear(spec.inner_dim, spec.dim, bias=spec.bias)

    def forward(self, x_TD: Tensor, step: Step, state: RecurrentState) -> Tensor:
        """(T, D) to (T, D); moves `state` on by this step's rows."""
        spec, shared = self.spec, self.spec.num_groups * self.spec.state_size
        z_TW, conv_TW, dt_TH = self.in_proj(x_TD).split((spec.inner_dim, spec.conv_channels, spec.num_heads), dim=1)
        conv_TW = state.advance("conv", self.conv, conv_TW)
        x_TW, b_TW, c_TW = conv_TW.split((spec.inner_dim, shared, shared), dim=1)
        x_THd = x_TW.unflatten(1, (spec.num_heads, spec.head_dim))
        b_TGn, c_TGn = (value.unflatten(1, (spec.num_groups, spec.state_size)) for value in (b_TW, c_TW))
        scan = Scan(self.a_log, self.d, self.dt_bias)
        y_THd = state.advance("ssm", scan, x_THd, dt_TH, b_TGn, c_TGn)
        y_TD: Tensor = self.out_proj(self.norm(y_THd.flatten(1), z_TW))
        return y_TD


class Scan:
    """Rows x, dt, B and C to y: the scan with steps softplus(dt + bias) and decays exp(-exp(a_log) step), plus d x.

    In float32, whatever the rows are.
    """

    def __init__(self, a_log_H: Tensor, d_H: Tensor, dt_bias_H: Tensor) -> None:
        self.a_log_H, self.d_H, self.dt_bias_H = a_log_H, d_H, dt_bias_H

    def __call__(self, state_BWn: Tensor | None, *rows: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs (B, T, H, d) and the state after them."""
        if self.moves(*rows):
            x_BTHd, b_BTGn = rows[0], rows[2]
            shape = (x_BTHd.shape[2] * x_BTHd.shape[3], b_BTGn.shape[3])
            return moved(self, state_BWn, shape, torch.float32, *rows)
        return self.reference(state_BWn, *rows)

    def reference(self, state_BWn: Tensor | None, *rows: Tensor) -> tuple[Tensor, Tensor]:
        """The formula, by `ssd`."""
        x_BTHd, dt_BTH, b_BTGn, c_BTGn = self._widened(*rows)
        y_BTHd, state_BWn = ssd(self._a_H, state_BWn, x_BTHd, dt_BTH, b_BTGn, c_BTGn)
        return torch.addcmul(y_BTHd, self.d_H.unsqueeze(-1), x_BTHd), state_BWn

    def in_place(self, pool_PWn: Tensor, places_B: Tensor, *rows: Tensor) -> Tensor:
        """(B, H, d), of one row of each sequence whose state stands at these places of the pool."""
        x_BHd, dt_BH, b_BGn, c_BGn = self._widened(*rows)
        y_BHd = single.ssd(pool_PWn, places_B, self._a_H, x_BHd, dt_BH, b_BGn, c_BGn)
        return torch.addcmul(y_BHd, self.d_H.unsqueeze(-1), x_BHd)

    def moves(self, *rows: Tensor) -> bool:
        """Whether the native kernel takes such rows."""
        parameters = (self.a_log_H, self.d_H, self.dt_bias_H)
        return rows[2].shape[-1] <= recurrent.LARGEST and recurrent.runs(*rows, parameters=parameters)

    def move(self, places: Places, x_THd: Tensor, dt_TH: Tensor, b_TGn: Tensor, c_TGn: Tensor) -> Tensor:
        """(T, H, d), of the rows of a step; the state of each sequence is replaced."""
        return recurrent.ssd(places, self.a_log_H, self.d_H, self.dt_bias_H, (x_THd, dt_TH, b_TGn, c_TGn))

    @property
    def _a_H(self) -> Tensor:
        return -torch.exp(self.a_log_H)

    def _widened(self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return x.float(), F.softplus(dt.float() + self.dt_bias_H), b.float(), c.float()


class GatedNorm(nn.Module):
    """The root-mean-square norm of y silu(z) in groups of channels, times a weight; float32.

    across: set where ranks share the one group: the mean over them of each one's mean square.
    """

    def __init__(self, channels: int, groups: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.empty(channels))
        self.across: Callable[[Tensor], Tensor] | None = None

    def forward(self, y_TW: Tensor, z_TW: Tensor) -> Tensor:
        """(T, W) to (T, W) in z's dtype. y may be used up."""
        if self.across is None and z_TW.dtype is self.weight.dtype and recurrent.runs(z_TW):
            return recurrent.gated_norm(y_TW, z_TW, self.weight, self.groups, self.eps)
        return self.reference(y_TW, z_TW)

    def reference(self, y_TW: Tensor, z_TW: Tensor) -> Tensor:
        """The formula."""
        gated_TGd = (y_TW * F.silu(z_TW.float())).unflatten(1, (self.groups, -1))
        if self.across is not None:
            mean_TG1 = self.across(gated_TGd.square().mean(-1, keepdim=True))
            normed_TGd = gated_TGd * torch.rsqrt(mean_TG1 + self.eps)
        else:
            normed_TGd = F.rms_norm(gated_TGd, gated_TGd.shape[2:], None, self.eps)
        normed_TW: Tensor = (normed_TGd.flatten(1) * self.weight).to(z_TW.dtype)
        return normed_TW
