"""The Triton kernel over pages against the plain formula over gathered pages: compiled on a GPU, else interpreted."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from zoo.components.attention.kernels import attention_rows
from zoo.components.attention.paged import attention_pages
from zoo.testing import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = "TRITON_INTERPRET"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

PAGE = 16


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED in os.environ, reason="the kernel is tested as it is")
def test_interpreted_kernel() -> None:
    """In a process of its own: Triton decides when it is imported whether it compiles or interprets."""
    environment = os.environ | {INTERPRETED: "1"}
    command = [sys.executable, "-m", "pytest", "-v", "--import-mode=importlib", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "6 passed" in done.stdout


@pytest.mark.skipif(DEVICE == "cpu" and INTERPRETED not in os.environ, reason="a process of its own does")
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
def test_kernel_equals_the_formula(
    batch: int, heads: int, groups: int, width: int, pages: int, window: int | None, softcap: float | None
) -> None:
    generator = torch.Generator().manual_seed(pages)
    pool = torch.randn(batch * pages + 1, 2, PAGE, groups, width, generator=generator)
    tables_BP = 1 + torch.randperm(batch * pages, generator=generator).view(batch, pages)
    filled_B = torch.randint(1, pages * PAGE + 1, (batch,), generator=generator)
    filled_B[0] = pages * PAGE
    q_BHd = torch.randn(batch, heads, width, generator=generator)
    k_BGSd, v_BGSd = (pool[:, i][tables_BP].flatten(1, 2).transpose(1, 2) for i in range(2))
    slots_S = torch.arange(pages * PAGE)
    seen_BS = slots_S < filled_B[:, None]
    if window is not None:
        seen_BS &= slots_S >= filled_B[:, None] - window
    expected = attention_rows(q_BHd, k_BGSd, v_BGSd, scale=0.3, seen_BS=seen_BS, memo={}, softcap=softcap)
    inputs = [value.to(DEVICE) for value in (q_BHd, pool, tables_BP, filled_B)]
    found = attention_pages(*inputs, scale=0.3, window=window, softcap=softcap)
    assert relative_error(found.cpu(), expected) < 1e-5
