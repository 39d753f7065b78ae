"""The native latent attention against its formula, and in the steps that use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from zoo.components import native
from zoo.components.cache.code import RowCode
from zoo.components.decoder.spec import DecoderSpec
from zoo.components.native import latent as kernels
from zoo.components.native.attention import addresses
from zoo.components.native.latent import InSlabs, Sizes
from zoo.testing import relative_error, step_through

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"no native kernels: {native.missing()}")

KINDS: Any = (None, "int8", "fp8")
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
LENGTHS = (1, 16, 37, 256, 257, 700)
SIZES = (Sizes(22, 16, 32, 18), Sizes(7, 0, 96, 40), Sizes(130, 48, 64, 6))


def drawn(seed: int, *size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def places(slabs: Sequence[torch.Tensor], rows: Sequence[tuple[int, int]], code: RowCode) -> InSlabs:
    """Of rows, each a slab and the slot that it takes there."""
    first: dict[int, int] = {}
    numbers = [
        [slabs[seq].shape[2], slot, slot + 1, first.setdefault(seq, row)] for row, (seq, slot) in enumerate(rows)
    ]
    return InSlabs(addresses([slabs[seq] for seq, _ in rows]), torch.tensor(numbers).flatten(), code)


def filled_slabs(code: RowCode, lengths: Sequence[int], spare: int = 0) -> list[torch.Tensor]:
    """Slabs with as many rows, and what is no number behind them."""
    slabs = []
    for seed, length in enumerate(lengths):
        slab = torch.full((1, 1, length + spare, code.width), -1 if code.kind else float("nan"), dtype=code.stored)
        slab[0, 0, :length] = code.encode(drawn(seed, length, sum(code.lanes), dtype=code.dtype))
        slabs.append(slab)
    return slabs


@pytest.mark.parametrize("dots", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("sizes", "heads"), [(SIZES[0], 6), (SIZES[1], 1), (SIZES[2], 66)])
@torch.no_grad()
def test_it_equals_the_formula(
    sizes: Sizes, heads: int, kind: Any, dtype: torch.dtype, dots: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not dots:
        monkeypatch.setattr(native.library(), "level", native.MULTIPLY_ADD)
    lanes = tuple(count for count in (sizes.latent, sizes.turned, 10) if count)
    code, width = RowCode(kind, lanes, dtype), sizes.latent + sizes.turned
    slabs = filled_slabs(code, LENGTHS, 5)
    q_THd = drawn(1, len(LENGTHS), heads, sizes.plain + sizes.turned, dtype=dtype)
    weight_OI = drawn(2, heads * (sizes.plain + sizes.values), sizes.latent, dtype=dtype) * sizes.latent**-0.5
    where = places(slabs, [(seq, length - 1) for seq, length in enumerate(LENGTHS)], code)
    q_THm = kernels.lowered(q_THd, weight_OI, sizes)
    found_THv = kernels.lifted(kernels.attend(q_THm, where, sizes.latent, 0.1), weight_OI, sizes)
    for b, length in enumerate(LENGTHS):
        kept_Sm = code.decode(slabs[b][0, 0, :length])[:, :width]
        expected = kernels._formula(q_THd[b : b + 1], kept_Sm, weight_OI, sizes, 0.1)
        assert relative_error(found_THv[b : b + 1].float(), expected) < TOLERANCES[dtype]


@pytest.mark.parametrize("lanes", [(32,), (32, 16), (32, 16, 11)])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_kept_as_the_code_has_them(kind: Any, dtype: torch.dtype, lanes: tuple[int, ...]) -> None:
    code = RowCode(kind, lanes, dtype)
    slabs = filled_slabs(code, (9, 20))
    expected = [slab.clone() for slab in slabs]
    new_Tm = drawn(7, 3, sum(lanes) + 5, dtype=dtype)[:, : sum(lanes)]
    where = places(slabs, [(0, 8), (1, 3), (1, 4)], code)
    kernels.keep(new_Tm, where.slabs_B, where.numbers_N, code)
    expected[0][0, 0, 8], expected[1][0, 0, 3:5] = code.encode(new_Tm[0]), code.encode(new_Tm[1:])
    for slab, meant in zip(slabs, expected, strict=True):
        assert torch.equal(slab.view(torch.int8), meant.view(torch.int8))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "latent", "turn"), [(4, 32, True), (68, 64, False), (128, 32, True)])
@torch.no_grad()
def test_rows_are_what_they_are_one_by_one(heads: int, latent: int, turn: bool, kind: Any, dtype: torch.dtype) -> None:
    code = RowCode(kind, (latent, 16), dtype)
    slabs = filled_slabs(code, [length + 20 for length in LENGTHS], 3)
    rows = [(seq, LENGTHS[seq] + row) for seq, count in enumerate((1, 16, 3, 9, 2, 5)) for row in range(count)]
    if turn:
        rows.sort(key=lambda pair: pair[1] - LENGTHS[pair[0]])
    q_THm = drawn(3, len(rows), heads, latent + 16, dtype=dtype)
    together = kernels.attend(q_THm, places(slabs, rows, code), latent, 0.2, threads=3)
    assert together.isfinite().all()
    for number, row in enumerate(rows):
        alone = kernels.attend(q_THm[number : number + 1], places(slabs, [row], code), latent, 0.2, threads=1)
        assert torch.equal(alone[0], together[number])


@torch.no_grad()
def test_sequences_whose_sums_do_not_fit_together_take_turns() -> None:
    code = RowCode(None, (512, 16), torch.bfloat16)
    slabs = filled_slabs(code, [1000] * 5)
    rows = [(seq, 984 + row) for seq in range(5) for row in range(16)]
    q_THm = drawn(3, 80, 64, 528, dtype=torch.bfloat16)
    together = kernels.attend(q_THm, places(slabs, rows, code), 512, 0.05)
    for number in (0, 40, 79):
        alone = kernels.attend(q_THm[number : number + 1], places(slabs, rows[number : number + 1], code), 512, 0.05)
        assert torch.equal(alone[0], together[number])


@pytest.mark.parametrize("dtype", TOLERANCES)
@torch.no_grad()
def test_products_of_a_row_do_not_depend_on_the_others(dtype: torch.dtype) -> None:
    sizes, heads = SIZES[0], 3
    q_THd, o_THc = drawn(1, 37, heads, 38, dtype=dtype), drawn(2, 37, heads, 32, dtype=dtype)
    weight_OI = drawn(3, heads * 40, 32, dtype=dtype)
    low_THm, high_THv = kernels.lowered(q_THd, weight_OI, sizes), kernels.lifted(o_THc, weight_OI, sizes)
    for row in range(37):
        one = slice(row, row + 1)
        assert torch.equal(kernels.lowered(q_THd[one], weight_OI, sizes), low_THm[one])
        assert torch.equal(kernels.lifted(o_THc[one], weight_OI, sizes), high_THv[one])


@pytest.mark.parametrize("dtype", TOLERANCES)
@torch.no_grad()
def test_what_is_no_number_is_neither_hidden_nor_met_too_early(dtype: torch.dtype) -> None:
    code = RowCode(None, (32, 16), dtype)
    [slab] = filled_slabs(code, [600])
    slab[0, 0, 300, 3] = float("nan")
    rows = [(0, slot) for slot in range(295, 305)]
    found = kernels.attend(drawn(4, 10, 70, 48, dtype=dtype), places([slab], rows, code), 32, 0.2)
    assert found[:5].isfinite().all()
    assert not found[5:].isfinite().all(-1).any()


MIXER: dict[str, Any] = {
    "kind": "latent_attention",
    "num_heads": 3,
    "q_lora_rank": 10,
    "kv_lora_rank": 32,
    "nope_head_dim": 6,
    "rope_head_dim": 16,
    "v_head_dim": 5,
    "rope": {"theta": 100.0},
}
BORROWING = MIXER | {"cache": {"kind": "shared", "layer": 0}}


@pytest.mark.parametrize("kind", KINDS)
def test_steps_use_it_and_agree_with_torch(
    kind: Any, small: Callable[..., DecoderSpec], filled: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [{"mixer": mixer, "ffn": None} for mixer in (MIXER, BORROWING, MIXER | {"q_lora_rank": None})]
    module = filled(small(layers=layers, cache_dtype=kind))
    # Tokens of which no number lies so near to the edge of two codes that the last bit decides.
    sequences = [torch.randint(37, (n,), generator=torch.Generator().manual_seed(n + 1)).tolist() for n in (29, 12)]
    monkeypatch.setenv("ZOO_ATTENTION", "reference")
    expected = step_through(module, sequences, 1)
    monkeypatch.setenv("ZOO_ATTENTION", "auto")
    calls: list[int] = []

    def counted(q_THm: torch.Tensor, *others: Any) -> torch.Tensor:
        calls.append(len(q_THm))
        return attend(q_THm, *others)

    attend = kernels.attend
    monkeypatch.setattr(kernels, "attend", counted)
    for chunk in (1, 5, 20):
        for found, whole in zip(step_through(module, sequences, chunk), expected, strict=True):
            assert relative_error(found, whole) < 1e-4
    assert calls.count(2) == 36, "both sequences at once in all layers, as long as the shorter one lasts"
    assert [calls.count(rows) for rows in (10, 7, 5, 4)] == [6, 3, 6, 3], "chunks"
    assert [calls.count(rows) for rows in (12, 9)] == [3, 3], "what goes with many rows, and what follows them"


def test_its_own_check_passes_and_it_is_left_out_where_it_does_not_run() -> None:
    assert kernels.missing() is None
    weight_OI = torch.randn(3 * 40, 32)
    assert not kernels.attends(weight_OI.requires_grad_(), SIZES[0]), "gradients"
    with torch.no_grad():
        assert kernels.attends(weight_OI, SIZES[0])
        assert not kernels.attends(weight_OI.half(), SIZES[0])
        assert not kernels.attends(weight_OI, Sizes(22, 16, 48, 18))
        assert not kernels.attends(weight_OI, Sizes(22, 4, 32, 18))
        assert not kernels.attends(weight_OI, Sizes(257, 16, 32, 18))
        assert not kernels.attends(weight_OI, Sizes(22, 16, 32, 257))
        assert not kernels.attends(weight_OI, Sizes(22, 32, 1024, 18))
