"""Every native kernel beside its formula: on the processor at hand, which may not be the one that the tests ran on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from zoo.components import native
from zoo.components.native import prompts, small
from zoo.components.native.panels import Panels


def differences() -> Iterator[tuple[str, float]]:
    """Each kernel's name and its relative error, with sizes that leave remainders everywhere."""
    from zoo.components.attention.kernels import reference
    from zoo.components.ffn.gated import ACTIVATIONS
    from zoo.components.norm.rms import rms_reference

    with torch.inference_mode():
        draw = torch.Generator().manual_seed(0)
        x_TI, weight_OI, bias_O = (_drawn(draw, *size) for size in ((5, 74), (48, 74), (48,)))
        expected = native.product_reference(x_TI, weight_OI, bias_O)
        yield "product", _error(native.product(x_TI, weight_OI, bias_O), expected)
        if native.library().level == native.DOT:
            yield "panels", _error(Panels.of(weight_OI).product(x_TI, bias_O), expected)
        yield "rms", _error(small.rms(x_TI, weight_OI[0], 1e-5), rms_reference(x_TI, weight_OI[0], 1e-5))
        gated = ACTIVATIONS["silu"](x_TI[:, :37]) * x_TI[:, 37:]
        yield "gate", _error(small.gate(x_TI), gated)
        q_THd, angles_T1r = _drawn(draw, 3, 6, 22), _drawn(draw, 3, 1, 20)
        cos, sin = angles_T1r.float().cos(), angles_T1r.float().sin()
        turning = q_THd[..., :20].float()
        turned = turning * cos + turning.roll(10, -1) * sin
        yield "rotate", _error(small.rotate(q_THd, cos, sin), torch.cat((turned, q_THd[..., 20:].float()), -1))
        if native.library().level == native.DOT:
            q_THd, (k_GSd, v_GSd) = _drawn(draw, 19, 4, 32), _drawn(draw, 2, 2, 41, 32)
            expected = reference(q_THd, k_GSd, v_GSd, 0.2, 22, 20, {})
            yield "attention of prompts", _error(prompts.attend(q_THd, k_GSd, v_GSd, 0.2, 20), expected)


def _drawn(draw: torch.Generator, *size: int) -> Tensor:
    return torch.randn(size, generator=draw).bfloat16()


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())
