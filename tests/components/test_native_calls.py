"""Records of calls: what they repeat, what they refuse, and the memory that they hand on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.components import native
from zoo.components.native import small
from zoo.components.native.calls import Arena, Record

needs_kernels = pytest.mark.skipif(native.missing() is not None, reason=f"no native kernels: {native.missing()}")


@needs_kernels
def test_a_record_repeats_kernels_and_operations() -> None:
    x, weight = torch.randn(3, 64).bfloat16(), torch.randn(64).bfloat16()

    def work() -> Tensor:
        normed = small.rms(x, weight, 1e-5)
        left, right = normed.split_with_sizes((32, 32), 1)
        return small.gate(torch.cat((left + right, right), 1)).float().mul_(2)

    with torch.inference_mode():
        record = Record(Arena())
        found = record.make(work)
        assert record.refused is None
        assert torch.equal(found, work())
        for seed in range(3):
            x.copy_(torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)))
            record.run()
            assert torch.equal(found, work())


@pytest.mark.parametrize(
    "asks",
    [
        lambda x: x.tolist(),
        lambda x: x[0].item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.nonzero(),
        lambda x: x.numpy(),
        lambda x: torch.tensor([len(x)]),
        lambda x: x[x > 0],
    ],
    ids=["tolist", "item", "bool", "nonzero", "numpy", "tensor", "mask"],
)
def test_numbers_on_the_host_are_refused(asks: Callable[[Tensor], Any]) -> None:
    x = torch.randn(5)

    def work() -> Tensor:
        asks(x)
        return x + 1

    with torch.inference_mode():
        record = Record(Arena())
        assert torch.equal(record.make(work), x + 1)
        assert record.refused is not None


def test_an_arena_gives_memory_out_again_once_nobody_has_it() -> None:
    arena = Arena()
    first = arena.take((3, 700), torch.float32)
    place, second = first.data_ptr(), arena.take((2100,), torch.float32)
    assert second.data_ptr() != place
    view = first[1:]
    del first
    assert arena.take((2100,), torch.float32).data_ptr() not in (place, second.data_ptr())
    del view
    assert arena.take((4100,), torch.bfloat16).data_ptr() == place
    assert arena.holds(second) and not arena.holds(torch.ones(2))
    assert arena.nbytes == 3 * 16384


@needs_kernels
def test_other_threads_are_not_recorded() -> None:
    from concurrent.futures import ThreadPoolExecutor

    x, weight = torch.randn(3, 64).bfloat16(), torch.randn(64).bfloat16()

    def other() -> Tensor:
        with torch.inference_mode():
            return small.rms(x, weight, 1e-5)

    def work() -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(other).result()
        return small.gate(x)

    with torch.inference_mode():
        record = Record(Arena())
        record.make(work)
    assert len(record._steps) == 1
