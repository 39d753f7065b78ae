"""Every Triton kernel against the formula that it stands for, on small random numbers, before it is used."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from zoo.components import fused
from zoo.components.ffn.gated import gate
from zoo.components.mamba import single
from zoo.components.mamba.convolution import CausalConv
from zoo.components.mamba.scan import ssd
from zoo.components.norm.rms import rms_reference
from zoo.components.rope.rotary import rotate


@torch.inference_mode()
def differences(device: torch.device) -> Iterator[tuple[str, float]]:
    """The name of each kernel, and its relative error on `device` in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, found, expected in (_rotation(device), _gate(device), _norm(device), *_steps(device)):
            yield name, float((found.cpu() - expected).abs().max() / expected.abs().max())


def _rotation(device: torch.device) -> tuple[str, Tensor, Tensor]:
    x_THd, angles_Tr = torch.randn(3, 7, 24)[:, :5], torch.randn(3, 8)
    cos, sin = angles_Tr.cos(), angles_Tr.sin()
    angles = torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)
    return "rope", fused.rotate(x_THd.to(device), *(angle.to(device) for angle in angles)), rotate(x_THd, angles)


def _gate(device: torch.device) -> tuple[str, Tensor, Tensor]:
    x_T2F = torch.randn(3, 2 * 1100)
    return "gate", fused.gate(x_T2F.to(device)), gate(x_T2F, "silu")


def _norm(device: torch.device) -> tuple[str, Tensor, Tensor]:
    x_TD, weight_D = torch.randn(3, 40), torch.randn(40)
    return "norm", fused.rms(x_TD.to(device), weight_D.to(device), 1e-5), rms_reference(x_TD, weight_D, 1e-5)


def _steps(device: torch.device) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The outputs of a state-space mixer's single tokens, and what they leave."""
    places_B = torch.tensor([3, 1])
    conv, pool_PkW, x_BW = CausalConv(600, 4, bias=True), torch.randn(4, 3, 600), torch.randn(2, 600)
    for parameter in conv.parameters():
        parameter.data.normal_()
    expected, left = conv.reference(pool_PkW[places_B], x_BW.unsqueeze(1))
    kept = pool_PkW.to(device)
    yield "convolution", conv.to(device).in_place(kept, places_B.to(device), x_BW.to(device)), expected[:, 0]
    yield "convolution's inputs", kept[places_B.to(device)], left
    a_H, pool_PWn = -torch.rand(6), torch.randn(4, 6 * 10, 12)
    rows = torch.randn(2, 6, 10), torch.rand(2, 6), torch.randn(2, 3, 12), torch.randn(2, 3, 12)
    expected, left = ssd(a_H, pool_PWn[places_B], *(value.unsqueeze(1) for value in rows))
    kept = pool_PWn.to(device)
    found = single.ssd(kept, places_B.to(device), a_H.to(device), *(value.to(device) for value in rows))
    yield "state", found, expected[:, 0]
    yield "state's numbers", kept[places_B.to(device)], left
