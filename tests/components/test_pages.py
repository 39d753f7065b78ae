"""Memory for weights is to be in huge pages, whatever torch decided on before."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from zoo.components.native.panels import PackedFilling, PanelsFilling, pays
from zoo.components.pages import HUGE, fresh

SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge(tensor: torch.Tensor) -> bool:
    """Whether Linux was asked for huge pages in the middle of a tensor."""
    middle, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first:
            start, end = (int(word, 16) for word in first.split("-"))
            inside = start <= middle < end
        elif inside and first == "VmFlags:":
            return "hg" in line.split()
    return False


@pytest.mark.skipif(sys.platform != "linux" or not SYSTEM.exists(), reason="Linux with huge pages")
def test_weights_are_in_huge_pages() -> None:
    assert huge(fresh((2 * HUGE,), torch.uint8))
    if pays(torch.empty(4096, 1024, dtype=torch.bfloat16, device="meta")):
        shape = torch.Size((4096, 1024))
        assert huge(PanelsFilling(shape, torch.bfloat16).matrix().words)
        assert huge(PackedFilling(shape, torch.bfloat16)._blocks)


def test_other_memory() -> None:
    assert fresh((3, 5), torch.float16).shape == (3, 5)
    assert fresh((HUGE,), torch.uint8, "meta").is_meta
