"""Every native kernel beside its formula: on the processor at hand, which may not be the one that the tests ran on."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.components import native
from zoo.components.native import mixture, prompts, recurrent, sampling, small
from zoo.components.native.panels import PackedPanels, Panels, packed, packs

log = logging.getLogger("zoo.components")


def differences() -> Iterator[tuple[str, float]]:
    """Each kernel's name and its relative error, with sizes that leave remainders everywhere."""
    from zoo.components.attention.kernels import reference
    from zoo.components.ffn.gated import ACTIVATIONS
    from zoo.components.norm.rms import rms_reference

    with torch.inference_mode():
        draw = torch.Generator().manual_seed(0)
        x_TI, weight_OI, bias_O = (_drawn(draw, *size) for size in ((5, 74), (45, 74), (45,)))
        expected = native.product_reference(x_TI, weight_OI, bias_O)
        yield "product", _error(native.product(x_TI, weight_OI, bias_O), expected)
        yield "panels", _error(Panels.of(weight_OI).product(x_TI, bias_O), expected)
        many_TI = x_TI.repeat(5, 1)
        yield "panels of many rows", _error(Panels.of(weight_OI).product(many_TI, bias_O), expected.repeat(5, 1))
        if packs():
            sized_OI = weight_OI.sign() * weight_OI.abs().clamp(0.25, 8)
            sized_OI[17, 33] = 2.0**-30
            own, plain = packed(sized_OI), Panels.of(sized_OI)
            same = [torch.equal(own.product(x, bias_O), plain.product(x, bias_O)) for x in (x_TI[:3], x_TI, many_TI)]
            # Numbers of few sizes, but for one: they are packed.
            right = isinstance(own, PackedPanels) and all(same) and torch.equal(own.plain(), sized_OI)
            yield "packed panels", 0.0 if right else 1.0
        yield "rms", _error(small.rms(x_TI, weight_OI[0], 1e-5), rms_reference(x_TI, weight_OI[0], 1e-5))
        expected = rms_reference(x_TI.float(), 1 + weight_OI[0].float(), 1e-5)
        yield "rms plus one", _error(small.rms(x_TI, weight_OI[0], 1e-5, plus_one=True), expected)
        both = torch.cat(small.add_rms(x_TI, x_TI.flip(0), weight_OI[0], 1e-5))
        summed_TI = x_TI + x_TI.flip(0)
        yield "add", _error(both, torch.cat((summed_TI, rms_reference(summed_TI, weight_OI[0], 1e-5))))
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
        yield from _mixture(draw)
        yield from _state_space(draw)
        yield "sampling", _sampling(draw)


def _mixture(draw: torch.Generator) -> Iterator[tuple[str, float]]:
    """Three experts that are chosen by two, one and four of five rows, and one that is not here."""
    x_TI, weights_EOI, shares_TK = _drawn(draw, 5, 74), _drawn(draw, 3, 48, 74), torch.rand(5, 2, generator=draw)
    choices_TK = torch.tensor([[2, 0], [0, 2], [2, 3], [1, 2], [3, 3]])
    experts = mixture.Experts.of([Panels.of(weight_OI) for weight_OI in weights_EOI])
    assert experts is not None
    expected_TE = x_TI.float() @ weights_EOI[0].float().T
    yield "logits of experts", _error(mixture.logits(x_TI, weights_EOI[0]), expected_TE)
    order = mixture.order(choices_TK, 3)
    found_NO = mixture.products(experts, x_TI, order, None, ordered=False)
    here_TK, weights_TKOI = shares_TK * (choices_TK < 3), weights_EOI[choices_TK.clamp(max=2)].float()
    expected_TO = torch.einsum("tk,tkoi,ti->to", here_TK, weights_TKOI, x_TI.float())
    yield "mixture", _error(mixture.weighted(found_NO, order, shares_TK), expected_TO)


def _state_space(draw: torch.Generator) -> Iterator[tuple[str, float]]:
    """Two sequences, of three rows and of four, of which one begins."""
    from zoo.components.mamba import mamba1, mamba2
    from zoo.components.mamba.convolution import CausalConv

    conv = CausalConv(37, 4, bias=True).bfloat16()
    conv.load_state_dict({"weight": _drawn(draw, 37, 1, 4), "bias": _drawn(draw, 37)})
    yield from _moved("convolution", conv, _drawn(draw, 2, 3, 37), (_drawn(draw, 7, 37),))
    parameters = (_drawn(draw, 6).float() for _ in range(3))
    rows = [_drawn(draw, 7, *size) for size in ((6, 21), (6,), (2, 19), (2, 19))]
    yield from _moved("scan of heads", mamba2.Scan(*parameters), _drawn(draw, 2, 6 * 21, 19).float(), rows)
    channels = (_drawn(draw, *size).float() for size in ((21, 19), (21,), (21,)))
    rows = [_drawn(draw, 7, size) for size in (21, 21, 19, 19, 21)]
    yield from _moved("scan of channels", mamba1.Scan(*channels), _drawn(draw, 2, 21, 19).float(), rows)
    norm = mamba2.GatedNorm(42, 2, 1e-5).bfloat16()
    norm.load_state_dict({"weight": _drawn(draw, 42)})
    y_TW, z_TW = _drawn(draw, 3, 42).float(), _drawn(draw, 3, 42)
    expected = norm.reference(y_TW, z_TW)
    yield "gated norm", _error(recurrent.gated_norm(y_TW.clone(), z_TW, norm.weight, 2, 1e-5), expected)


def _moved(name: str, function: Any, states: Tensor, rows: Sequence[Tensor]) -> Iterator[tuple[str, float]]:
    first, second = (tuple(value[span].unsqueeze(0) for value in rows) for span in (slice(0, 3), slice(3, 7)))
    found = [function.reference(states[:1], *first), function.reference(None, *second)]
    outputs, left = (torch.cat([part[i].squeeze(0) for part in found]) for i in range(2))
    kept = states.clone()
    numbers = torch.tensor([[kept[0].data_ptr(), 0, 3, 0], [kept[1].data_ptr(), 3, 4, 1]])
    yield name, _error(function.move(recurrent.Places(numbers), *rows), outputs)
    yield f"states of the {name}", _error(kept.flatten(0, 1), left)


def _sampling(draw: torch.Generator) -> float:
    """0 where the likeliest token, one of all, and one of the few likeliest are drawn as they are to be, else 1."""
    logits_V = _drawn(draw, 777).float()
    shares_V, (sorted_V, ids_V) = logits_V.softmax(-1).double(), logits_V.sort(descending=True, stable=True)
    ways = ((0.0, torch.inf, 1, 0, 0), (1, torch.inf, 1, 0, 0.3), (1, 50, 0.9, 0.01, 0.7))
    found_R = sampling.draw(logits_V.expand(3, -1), torch.tensor(ways).double().T.contiguous())
    sums_V = sorted_V[:50].softmax(-1).double().cumsum(-1)
    kept = min(int(torch.searchsorted(sums_V, 0.9)) + 1, int((sorted_V >= sorted_V[0] + math.log(0.01)).sum()))
    place = torch.searchsorted(sums_V, 0.7 * sums_V[kept - 1], right=True)
    expected = [int(ids_V[0]), int(torch.searchsorted(shares_V.cumsum(-1), 0.3, right=True)), int(ids_V[place])]
    return float(found_R.tolist() != expected)


def settle_tiles(kernels: native.Kernels) -> None:
    """Leaves products by tiles out where they are wrong, and multiply-adds beside them where they round otherwise."""
    if kernels.level != native.TILES:
        return
    draw = torch.Generator().manual_seed(1)
    x_TI, weight_OI = _drawn(draw, 37, 74), _drawn(draw, 48, 74)
    panels, kernels.single = Panels.of(weight_OI), 0
    with torch.inference_mode():
        tiled_TO = kernels.panels(x_TI, panels.words, 48, None)
        if not (error := _error(tiled_TO, native.product_reference(x_TI, weight_OI))) < native.TOLERANCE:
            log.warning("zoo: products by tiles are off by %.0e on this processor and are left out", error)
            kernels.level, kernels.single = native.MULTIPLY_ADD, native.SINGLE
            return
        kernels.single = len(x_TI)
        same = torch.equal(kernels.panels(x_TI, panels.words, 48, None), tiled_TO)
        kernels.single = native.SINGLE if same else 0


def _drawn(draw: torch.Generator, *size: int) -> Tensor:
    return torch.randn(size, generator=draw).bfloat16()


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())
