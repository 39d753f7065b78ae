"""Matrices in eight and four bits: what is stored, what is lost, what comes out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from zoo.components import quantised
from zoo.components.kinds import INT4, INT8, KINDS, Kind
from zoo.components.native import quantised as native
from zoo.components.quantised import Quantised, codes_of, product_reference, quantise_reference, stored_codes

SHAPES = [(48, 96), (33, 40), (7, 5), (130, 224)]

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
shapes = pytest.mark.parametrize("shape", SHAPES)
needs_native = pytest.mark.skipif(not native.there(), reason="no C source, or a processor without AVX-512 VNNI")


@pytest.fixture(params=[False, pytest.param(True, marks=needs_native)], ids=["torch", "native"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """By PyTorch's kernels, in several pieces, and by the C source."""
    monkeypatch.setattr(quantised, "PIECE", 40 * 32)
    monkeypatch.setattr(quantised, "is_native", lambda: request.param)
    return bool(request.param)


def weight(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@kinds
def test_codes_come_back(kind: Kind) -> None:
    reach = 127 if kind is INT8 else 7
    whole = torch.randint(-reach - (kind is INT4), reach + 1, (3, 16, 5, 32)).float()
    stored = stored_codes(kind, whole)
    assert stored.shape == (3, 5, kind.bits, 64)
    assert torch.equal(codes_of(kind, stored).float(), whole)


@kinds
def test_four_inputs_of_an_output_lie_together(kind: Kind) -> None:
    whole = torch.zeros(1, 16, 1, 32)
    whole[0, 3, 0, 20:24] = torch.tensor([1, 2, 3, 4])
    line = stored_codes(kind, whole)[0, 0, 5 if kind is INT8 else 1, 12:16]
    assert line.tolist() == [129, 130, 131, 132] if kind is INT8 else [0x98, 0xA8, 0xB8, 0xC8]


@kinds
@shapes
def test_error_and_bytes(kind: Kind, shape: tuple[int, int], way: bool) -> None:
    exact = weight(shape)
    made = Quantised.of(kind, exact)
    error = float((made.plain() - exact).norm() / exact.norm())
    assert error == pytest.approx((made.lost / made.size) ** 0.5, rel=1e-3)
    assert error < (0.009 if kind is INT8 else 0.085)
    assert (made.shape, made.dtype) == (exact.shape, exact.dtype)
    assert made.nbytes == kind.nbytes(*shape)


def test_whole_numbers_are_exact(way: bool) -> None:
    eight = torch.randint(-127, 128, (16, 32)).float()
    eight[:, 5] = 127
    four = torch.randint(-8, 8, (20, 64)).float() / 4
    four[:, [3, 40]] = -2
    assert torch.equal(Quantised.of(INT8, eight).plain(), eight)
    assert torch.equal(Quantised.of(INT4, four).plain(), four)


@kinds
def test_zeros_and_extremes(kind: Kind, way: bool) -> None:
    exact = torch.zeros(17, 40)
    exact[3] = 3e38
    exact[4] = 1e-38
    exact[5, 7] = -1e-5
    found = Quantised.of(kind, exact).plain()
    assert found.isfinite().all()
    assert torch.equal(found[:3], exact[:3])
    assert torch.allclose(found[[3, 5]], exact[[3, 5]], rtol=0.1)


@kinds
@shapes
@pytest.mark.parametrize("rows", [0, 1, 3, 23])
def test_products_are_those_of_the_plain_values(
    kind: Kind, shape: tuple[int, int], rows: int, way: bool, close: Callable[..., None]
) -> None:
    """Exactly so by PyTorch's kernels, and with rows in eight bits by the C source."""
    made, x_TI, bias_O = Quantised.of(kind, weight(shape)), weight((rows, shape[1]), 1), weight((1, shape[0]), 2)[0]
    for bias in (None, bias_O):
        expected = F.linear(x_TI, made.plain(), bias)
        rounded = product_reference(made, x_TI, bias)
        found = made.product(x_TI, bias)
        assert found.shape == expected.shape
        if rows:
            close(found, rounded if way else expected)
            assert 0 < float((rounded - expected).norm() / expected.norm()) < 0.008


@needs_native
@kinds
@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_ways_make_the_same(kind: Kind, shape: tuple[int, int], dtype: torch.dtype) -> None:
    exact = weight((shape[0], shape[1] + 3)).to(dtype)[:, 1:-2]
    made = Quantised.of(kind, exact)
    codes, scales = torch.empty_like(made.codes), torch.empty_like(made.scales)
    assert quantise_reference(kind, exact, codes, scales) == pytest.approx((made.lost, made.size), rel=1e-5)
    # Of two scales that leave the same error up to rounding, either is right.
    allowed = 0.0 if kind is INT8 else 0.01
    assert float((made.codes != codes).float().mean()) <= allowed
    assert float((made.scales != scales).float().mean()) <= allowed


@needs_native
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_others_nor_on_threads(kind: Kind, dtype: torch.dtype) -> None:
    made, threads = Quantised.of(kind, weight((150, 200))), torch.get_num_threads()
    x_TI, bias_O = weight((29, 200), 1).to(dtype), weight((1, 150), 2)[0].to(dtype)
    whole = made.product(x_TI, bias_O)
    try:
        for count, first in ((1, 0), (2, 5), (4, 1), (6, 20), (7, 3), (12, 11), (13, 0), (23, 2)):
            torch.set_num_threads(1 + count % 3)
            assert torch.equal(made.product(x_TI[first : first + count], bias_O), whole[first : first + count])
    finally:
        torch.set_num_threads(threads)


@needs_native
@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types_round_once(kind: Kind, dtype: torch.dtype) -> None:
    made, x_TI = Quantised.of(kind, weight((50, 70)).to(dtype)), weight((5, 140), 1).to(dtype)[:, ::2]
    bias_O = weight((1, 50), 2)[0].to(dtype)
    assert torch.equal(made.product(x_TI, bias_O), made.product(x_TI.float(), bias_O.float()).to(dtype))


@kinds
def test_what_is_no_number_stays_none(kind: Kind, way: bool) -> None:
    x_TI = weight((3, 40), 1)
    x_TI[1, 7], x_TI[2, 33] = float("nan"), float("inf")
    found = Quantised.of(kind, weight((20, 40))).product(x_TI, None)
    assert found[0].isfinite().all()
    assert not found[1:].isfinite().any()


@kinds
def test_gradients_of_rows(kind: Kind) -> None:
    made, x_TI = Quantised.of(kind, weight((20, 40))), weight((2, 40), 1).requires_grad_()
    made.product(x_TI, None).sum().backward()
    assert x_TI.grad is not None
    assert torch.allclose(x_TI.grad[0], made.plain().sum(0), rtol=1e-4, atol=1e-5)


def test_wrong_native_products_are_left_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(native, "there", lambda: True)
    monkeypatch.setattr(quantised, "_native_error", lambda kind: 0.5)
    assert quantised.is_native.__wrapped__() is False
    assert "off by 5e-01 here and are left out" in caplog.text


@kinds
def test_pieces_of_the_values(kind: Kind) -> None:
    made = Quantised.of(kind, weight((50, 40)).bfloat16())
    whole = made.plain()
    assert whole.dtype is torch.bfloat16
    for index in [(slice(3, 37),), (slice(None), slice(1, 5)), (17,), (33, 4), (slice(16, 32), 2)]:
        assert torch.equal(made.plain(index), whole[index])


def test_other_values_are_stored_in_the_same_way() -> None:
    exact = weight((20, 64), 5).half()
    made = Quantised.of(INT4, weight((20, 64))).renewed(exact)
    assert (made.kind, made.dtype) == (INT4, torch.float16)
    assert float((made.plain() - exact).norm() / exact.norm()) < 0.085
