"""Matrices in eight and four bits: what is stored, what is lost, what comes out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from zoo.components import quantised
from zoo.components.kinds import INT4, INT8, KINDS, Kind
from zoo.components.quantised import Quantised, codes_of, product_reference, stored_codes

SHAPES = [(48, 96), (33, 40), (7, 5), (130, 224)]

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
shapes = pytest.mark.parametrize("shape", SHAPES)


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
def test_error_and_bytes(kind: Kind, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "PIECE", 40 * 32)
    exact = weight(shape)
    made = Quantised.of(kind, exact)
    error = float((made.plain() - exact).norm() / exact.norm())
    assert error == pytest.approx((made.lost / made.size) ** 0.5, rel=1e-3)
    assert error < (0.009 if kind is INT8 else 0.085)
    assert (made.shape, made.dtype) == (exact.shape, exact.dtype)
    assert made.nbytes == kind.nbytes(*shape)


def test_whole_numbers_are_exact() -> None:
    eight = torch.randint(-127, 128, (16, 32)).float()
    eight[:, 5] = 127
    four = torch.randint(-8, 8, (20, 64)).float() / 4
    four[:, [3, 40]] = -2
    assert torch.equal(Quantised.of(INT8, eight).plain(), eight)
    assert torch.equal(Quantised.of(INT4, four).plain(), four)


@kinds
def test_zeros_and_extremes(kind: Kind) -> None:
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
def test_products_are_those_of_the_plain_values(
    kind: Kind, shape: tuple[int, int], close: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "PIECE", 40 * 32)
    made, x_TI, bias_O = Quantised.of(kind, weight(shape)), weight((3, shape[1]), 1), weight((1, shape[0]), 2)[0]
    for bias in (None, bias_O):
        expected = F.linear(x_TI, made.plain(), bias)
        close(made.product(x_TI, bias), expected)
        rounded = product_reference(made, x_TI, bias)
        assert 0 < float((rounded - expected).norm() / expected.norm()) < 0.008


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
