"""Every Triton kernel against the formula that it stands for, on small random numbers, before it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.components import few, fused, quantised_gpu
from zoo.components.attention.kernels import Scores, attention_rows
from zoo.components.attention.paged import KINDS as KINDS_OF_PAGES
from zoo.components.attention.paged import attention_pages, keep_rows
from zoo.components.cache.code import RowCode
from zoo.components.ffn.gated import gate
from zoo.components.kinds import KINDS
from zoo.components.mamba import single
from zoo.components.mamba.convolution import CausalConv
from zoo.components.mamba.scan import ssd
from zoo.components.norm.rms import rms_reference
from zoo.components.quantised import Quantised
from zoo.components.rope.rotary import rotate

Pairs = Iterator[tuple[Tensor, Tensor]]
"""What a kernel gave, and what it should have given."""


@torch.inference_mode()
def difference(kernel: str, device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative error of a kernel on `device`, on rows of `dtype`. Not a number where it gave none."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pairs = [(found.cpu().float(), expected.float()) for found, expected in CHECKS[kernel](device, dtype)]
    return float(
        torch.stack([(found - expected).abs().max() / expected.abs().max() for found, expected in pairs]).max()
    )


def _attention(device: torch.device, dtype: torch.dtype) -> Pairs:
    numbers, q_BHd = torch.randn(11, 2, 16, 2, 24).to(dtype), torch.randn(2, 6, 24).to(dtype)
    tables_BP, filled_B = 1 + torch.randperm(10).view(2, 5), torch.tensor([80, 37])
    seen_BS = (torch.arange(80) < filled_B[:, None]) & (torch.arange(80) >= filled_B[:, None] - 70)
    q, tables, filled = (value.to(device) for value in (q_BHd, tables_BP, filled_B))
    for kind in KINDS_OF_PAGES:
        code = RowCode(kind, (24,), dtype)
        pool = code.encode(numbers)
        k_BGSd, v_BGSd = (code.decode(pool[:, i][tables_BP].flatten(1, 2)).transpose(1, 2) for i in range(2))
        expected = attention_rows(q_BHd, k_BGSd, v_BGSd, seen_BS=seen_BS, memo={}, scale=0.3)
        how: Scores = {"scale": 0.3, "window": 70, "softcap": None, "sinks_H": None}
        yield attention_pages(q, pool.to(device), tables, filled, coded=kind, **how), expected


def _cache(device: torch.device, dtype: torch.dtype) -> Pairs:
    """What is read back."""
    k_BGd, v_BGd = (torch.randn(3, 5, 24).to(dtype)[:, i : i + 2] for i in (0, 3))
    numbers_N = torch.tensor([3, 1, 1, 2, 0, 15])
    for kind in KINDS_OF_PAGES:
        code = RowCode(kind, (24,), dtype)
        pool = torch.zeros(4, 2, 16, 2, code.width, dtype=code.stored, device=device)
        keep_rows([k_BGd.to(device), v_BGd.to(device)], pool, numbers_N.to(device), kind)
        found = pool.cpu()[numbers_N[:3], :, numbers_N[3:]]
        yield code.decode(found), code.rounded(torch.stack((k_BGd, v_BGd), 1))


def _rows(device: torch.device, dtype: torch.dtype) -> Pairs:
    for rows in (1, 3, 8):
        x_TI, weight_OI, bias_O = (torch.randn(*size).to(dtype) for size in ((rows, 700), (38, 700), (38,)))
        x, weight = x_TI.to(device), weight_OI.to(device)
        yield few.product(x, weight, bias_O.to(device)), F.linear(x_TI, weight_OI, bias_O)
        yield few.product(x, weight, gated=True), gate(F.linear(x_TI, weight_OI), "silu")


def _rope(device: torch.device, dtype: torch.dtype) -> Pairs:
    x_THd, angles_Tr = torch.randn(3, 7, 24).to(dtype)[:, :5], torch.randn(3, 8)
    cos, sin = angles_Tr.cos(), angles_Tr.sin()
    angles = torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)
    yield fused.rotate(x_THd.to(device), *(angle.to(device) for angle in angles)), rotate(x_THd, angles)


def _gate(device: torch.device, dtype: torch.dtype) -> Pairs:
    x_T2F = torch.randn(3, 2 * 1100).to(dtype)
    yield fused.gate(x_T2F.to(device)), gate(x_T2F, "silu")


def _norm(device: torch.device, dtype: torch.dtype) -> Pairs:
    x_TD, weight_D = torch.randn(3, 40).to(dtype), torch.randn(40).to(dtype)
    yield fused.rms(x_TD.to(device), weight_D.to(device), 1e-5), rms_reference(x_TD, weight_D, 1e-5)
    total_TD, normed_TD = fused.add_rms(x_TD.to(device), x_TD.flip(0).to(device), weight_D.to(device), 1e-5)
    yield total_TD, x_TD + x_TD.flip(0)
    yield normed_TD, rms_reference(x_TD + x_TD.flip(0), weight_D, 1e-5)


def _products(device: torch.device, dtype: torch.dtype) -> Pairs:
    """Of few rows, of numbers, and of two experts of which one has no rows."""
    for kind in KINDS.values():
        weight_OI, x_TI, bias_O = (torch.randn(*size).to(dtype) for size in ((37, 75), (5, 75), (37,)))
        made = Quantised.of(kind, weight_OI)
        stored = made.codes.to(device), made.scales.to(device), made.shape
        x, plain_OI = x_TI.to(device), made.plain()
        yield quantised_gpu.product(kind, *stored, x, bias_O.to(device)), F.linear(x_TI, plain_OI, bias_O)
        yield quantised_gpu.numbers(kind, *stored, dtype), plain_OI
        codes, scales = (torch.stack((torch.zeros_like(part), part)) for part in stored[:2])
        ends_E = torch.tensor([0, 5], dtype=torch.int32, device=device)
        yield quantised_gpu.grouped(kind, codes, scales, made.shape, x, ends_E), F.linear(x_TI, plain_OI)


def _convolution(device: torch.device, dtype: torch.dtype) -> Pairs:
    """The outputs of single tokens, and the inputs that they leave."""
    places_B = torch.tensor([3, 1])
    conv = CausalConv(600, 4, bias=True).to(dtype)
    pool_PkW, x_BW = torch.randn(4, 3, 600).to(dtype), torch.randn(2, 600).to(dtype)
    for parameter in conv.parameters():
        parameter.data.normal_()
    expected, left = conv.reference(pool_PkW[places_B], x_BW.unsqueeze(1))
    kept = pool_PkW.to(device)
    yield conv.to(device).in_place(kept, places_B.to(device), x_BW.to(device)), expected[:, 0]
    yield kept[places_B.to(device)], left


def _state(device: torch.device, dtype: torch.dtype) -> Pairs:
    """The outputs of single tokens, and the states that they leave: float32, whatever the model's type."""
    places_B, a_H, pool_PWn = torch.tensor([3, 1]), -torch.rand(6), torch.randn(4, 6 * 10, 12)
    rows = torch.randn(2, 6, 10), torch.rand(2, 6), torch.randn(2, 3, 12), torch.randn(2, 3, 12)
    expected, left = ssd(a_H, pool_PWn[places_B], *(value.unsqueeze(1) for value in rows))
    kept = pool_PWn.to(device)
    yield single.ssd(kept, places_B.to(device), a_H.to(device), *(value.to(device) for value in rows)), expected[:, 0]
    yield kept[places_B.to(device)], left


CHECKS: dict[str, Callable[[torch.device, torch.dtype], Pairs]] = {
    "attention": _attention,
    "cache": _cache,
    "convolution": _convolution,
    "gate": _gate,
    "norm": _norm,
    "products": _products,
    "rope": _rope,
    "rows": _rows,
    "state": _state,
}
"""By the name of the kernel, as zoo.components.fused has it."""
