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
        x_TW, b_TW, c_TW = conv_TW.float().split((spec.inner_dim, shared, shared), dim=1)
        x_THd = x_TW.unflatten(1, (spec.num_heads, spec.head_dim))
        b_TGn, c_TGn = (value.unflatten(1, (spec.num_groups, spec.state_size)) for value in (b_TW, c_TW))
        dt_TH = F.softplus(dt_TH.float() + self.dt_bias)
        y_THd = state.advance("ssm", Scan(-torch.exp(self.a_log)), x_THd, dt_TH, b_TGn, c_TGn)
        y_THd = torch.addcmul(y_THd, self.d.unsqueeze(-1), x_THd)
        y_TD: Tensor = self.out_proj(self.norm(y_THd.flatten(1), z_TW).to(x_TD.dtype))
        return y_TD


class Scan:
    """`ssd` with its decays: of any rows, or of single ones in place."""

    def __init__(self, a_H: Tensor) -> None:
        self.a_H = a_H

    def __call__(self, state_BWn: Tensor | None, *rows: Tensor) -> tuple[Tensor, Tensor]:
        return ssd(self.a_H, state_BWn, *rows)

    def in_place(self, pool_PWn: Tensor, places_B: Tensor, *rows: Tensor) -> Tensor:
        """As `single.ssd`."""
        return single.ssd(pool_PWn, places_B, self.a_H, *rows)


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
        """(T, W) to (T, W)."""
        gated_TGd = (y_TW * F.silu(z_TW.float())).unflatten(1, (self.groups, -1))
        if self.across is not None:
            mean_TG1 = self.across(gated_TGd.square().mean(-1, keepdim=True))
            normed_TW: Tensor = (gated_TGd * torch.rsqrt(mean_TG1 + self.eps)).flatten(1) * self.weight
            return normed_TW
        return F.rms_norm(gated_TGd, gated_TGd.shape[2:], None, self.eps).flatten(1) * self.weight
