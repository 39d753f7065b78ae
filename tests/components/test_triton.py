"""Triton kernels against the plain formulas that they stand for: compiled on a GPU, else interpreted."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from zoo.components import fused
from zoo.components.attention.kernels import attention_rows
from zoo.components.attention.paged import attention_pages
from zoo.components.ffn.gated import gate
from zoo.components.fused_check import differences
from zoo.components.mamba import single
from zoo.components.mamba.convolution import CausalConv
from zoo.components.mamba.scan import ssd
from zoo.components.norm.rms import rms_reference
from zoo.components.rope.rotary import rotate
from zoo.registry.errors import ZooError
from zoo.testing import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = "TRITON_INTERPRET"
NARROW = 8e-3 if DEVICE == "cuda" else 2e-2
"""Of bfloat16: one last bit, or two where the interpreter cuts numbers off that a GPU rounds."""

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

PAGE = 16


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED in os.environ, reason="the kernel is tested as it is")
def test_interpreted_kernels() -> None:
    """In a process of its own: Triton decides when it is imported whether it compiles or interprets."""
    environment = os.environ | {INTERPRETED: "1"}
    command = [sys.executable, "-m", "pytest", "-v", "--import-mode=importlib", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "38 passed" in done.stdout


each_kernel = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or (DEVICE == "cpu" and INTERPRETED not in os.environ),
    reason="needs Triton, and a process of its own where it interprets",
)


@each_kernel
@pytest.mark.parametrize("sunk", [False, True])
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "width", "pages", "window", "softcap"),
    [
        (1, 8, 2, 16, 5, None, None),
        (3, 6, 2, 24, 20, None, None),
        (3, 8, 8, 32, 40, 70, None),
        (4, 4, 1, 64, 33, None, 5.0),
        (2, 4, 2, 80, 18, 260, 3.0),
        (2, 40, 2, 128, 17, 1, None),
    ],
)
def test_attention_over_pages(
    batch: int, heads: int, groups: int, width: int, pages: int, window: int | None, softcap: float | None, sunk: bool
) -> None:
    generator = torch.Generator().manual_seed(pages)
    pool = torch.randn(batch * pages + 1, 2, PAGE, groups, width, generator=generator)
    tables_BP = 1 + torch.randperm(batch * pages, generator=generator).view(batch, pages)
    filled_B = torch.randint(1, pages * PAGE + 1, (batch,), generator=generator)
    filled_B[0] = pages * PAGE
    q_BHd = torch.randn(batch, heads, width, generator=generator)
    sinks_H = torch.linspace(-1.0, 8.0, heads) if sunk else None
    sunk_H = None if sinks_H is None else sinks_H.to(DEVICE)
    k_BGSd, v_BGSd = (pool[:, i][tables_BP].flatten(1, 2).transpose(1, 2) for i in range(2))
    slots_S = torch.arange(pages * PAGE)
    seen_BS = slots_S < filled_B[:, None]
    if window is not None:
        seen_BS &= slots_S >= filled_B[:, None] - window
    how: dict[str, Any] = {"scale": 0.3, "softcap": softcap}
    expected = attention_rows(q_BHd, k_BGSd, v_BGSd, seen_BS=seen_BS, memo={}, sinks_H=sinks_H, **how)
    inputs = [value.to(DEVICE) for value in (q_BHd, pool, tables_BP, filled_B)]
    found = attention_pages(*inputs, window=window, sinks_H=sunk_H, **how)
    assert relative_error(found.cpu(), expected) < 1e-5


DTYPES = [torch.float32, torch.bfloat16]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@each_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "heads", "lanes", "width"), [(1, 5, 8, 8), (7, 40, 128, 128), (3, 6, 20, 48), (4, 3, 12, 12)]
)
def test_rotation(rows: int, heads: int, lanes: int, width: int, dtype: torch.dtype) -> None:
    """Of heads that are a part of wider rows, as queries and keys are."""
    x_THd = draw(rows, heads + 2, width).to(dtype)[:, :heads]
    angles_Tr = draw(rows, lanes // 2)
    cos, sin = angles_Tr.cos(), angles_Tr.sin()
    angles = torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)
    expected = rotate(x_THd, angles)
    found = fused.rotate(x_THd.to(DEVICE), *(angle.to(DEVICE) for angle in angles))
    assert relative_error(found.cpu().float(), expected.float()) < (1e-6 if dtype is torch.float32 else NARROW)


@each_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 24), (5, 1500)])
def test_gate(rows: int, width: int, dtype: torch.dtype) -> None:
    x_T2F = draw(rows, 2 * width).to(dtype)
    expected = gate(x_T2F, "silu")
    found = fused.gate(x_T2F.to(DEVICE))
    assert relative_error(found.cpu().float(), expected.float()) < (1e-6 if dtype is torch.float32 else NARROW)


@each_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 40), (2, 5, 96)])
def test_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Of rows one after the other, and of heads that are a part of wider rows."""
    x = draw(*shape[:-2], shape[-2] + 1, shape[-1]).to(dtype)[..., : shape[-2], :]
    weight_D = 1 + draw(shape[-1]).to(dtype) / 4
    found = fused.rms(x.to(DEVICE), weight_D.to(DEVICE), 1e-5)
    expected = rms_reference(x, weight_D, 1e-5)
    assert relative_error(found.cpu().float(), expected.float()) < (1e-6 if dtype is torch.float32 else NARROW)


@each_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_convolution_in_place(bias: bool, dtype: torch.dtype) -> None:
    """Of rows that are a part of wider ones, at places in any order."""
    conv = CausalConv(600, 4, bias=bias).to(dtype)
    for parameter in conv.parameters():
        parameter.data.copy_(draw(*parameter.shape) / 2)
    pool, places_B, x_BW = draw(9, 3, 600).to(dtype), torch.tensor([4, 1, 7]), draw(3, 700).to(dtype)[:, :600]
    with torch.inference_mode():
        expected, left = conv(pool[places_B], x_BW.unsqueeze(1))
        kept = pool.to(DEVICE)
        found = conv.to(DEVICE).in_place(kept, places_B.to(DEVICE), x_BW.to(DEVICE))
    assert relative_error(found.cpu().float(), expected[:, 0].float()) < (1e-6 if dtype is torch.float32 else NARROW)
    assert torch.equal(kept.cpu()[places_B], left)
    others = [i for i in range(9) if i not in places_B.tolist()]
    assert torch.equal(kept.cpu()[others], pool[others])


@each_kernel
@pytest.mark.parametrize(("heads", "width", "groups", "size"), [(6, 4, 2, 5), (16, 64, 8, 128)])
def test_state_in_place(heads: int, width: int, groups: int, size: int) -> None:
    pool, places_B = draw(7, heads * width, size), torch.tensor([2, 6])
    a_H, x_BHd, dt_BH = -draw(heads).abs(), draw(2, heads + 1, width)[:, :heads], draw(2, heads).abs()
    wide = draw(2, 2 * groups * size)
    b_BGn, c_BGn = (part.unflatten(1, (groups, size)) for part in wide.chunk(2, dim=1))
    rows = (x_BHd, dt_BH, b_BGn, c_BGn)
    expected, left = ssd(a_H, pool[places_B], *(value.unsqueeze(1) for value in rows))
    kept = pool.to(DEVICE)
    found = single.ssd(kept, places_B.to(DEVICE), a_H.to(DEVICE), *(value.to(DEVICE) for value in rows))
    assert relative_error(found.cpu(), expected[:, 0]) < 1e-5
    assert relative_error(kept.cpu()[places_B], left) < 1e-6
    others = [0, 1, 3, 4, 5]
    assert torch.equal(kept.cpu()[others], pool[others])


@each_kernel
def test_kernels_are_checked_before_they_are_used() -> None:
    names = [name for name, error in differences(torch.device(DEVICE)) if error < fused.TOLERANCE]
    assert len(names) == 7
    assert fused.works(torch.device(DEVICE))


@pytest.mark.parametrize("fault", [[("rope", 0.5), ("gate", float("nan"))], RuntimeError("no compiler\nat all")])
def test_kernels_that_fail_are_left_out(
    fault: list[tuple[str, float]] | Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def found(device: torch.device) -> list[tuple[str, float]]:
        if isinstance(fault, Exception):
            raise fault
        return fault

    monkeypatch.setattr("zoo.components.fused_check.differences", found)
    fused.works.cache_clear()
    assert not fused.works(torch.device("cpu"))
    fused.works.cache_clear()
    [message] = [record.getMessage() for record in caplog.records]
    assert ("no compiler" in message) if isinstance(fault, Exception) else ("rope is off by 5e-01; gate" in message)


def test_small_operations_are_plain_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not fused.runs(torch.ones(2, 3))
    monkeypatch.setenv("ZOO_FUSED", "on")
    fused.is_wanted.cache_clear()
    with pytest.raises(ZooError, match=r"ZOO_FUSED.*'on'.*'off'"):
        fused.is_wanted()
    fused.is_wanted.cache_clear()
