"""The native attention over slabs against its formula, and in the steps that use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from zoo.components import native
from zoo.components.attention.kernels import Scores, reference
from zoo.components.cache import kv
from zoo.components.cache.code import RowCode
from zoo.components.decoder.spec import DecoderSpec
from zoo.components.native.attention import addresses, attend_slabs, attends, missing
from zoo.testing import relative_error, step_through

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"no native kernels: {native.missing()}")

KINDS: Any = (None, "int8", "fp8")
LENGTHS = (1, 16, 37, 256, 257, 700)
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def _unused(code: RowCode, groups: int, slots: int) -> torch.Tensor:
    """A slab that holds no number anywhere, as new memory may: of codes, no scale is one."""
    return torch.full((2, groups, slots, code.width), -1 if code.kind else float("nan"), dtype=code.stored)


def _case(code: RowCode, groups: int, shared: int) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Rows of queries, keys and values, slabs of several lengths, and their numbers."""
    draw = torch.Generator().manual_seed(groups)
    [width] = code.lanes
    slabs, numbers = [], []
    for length in LENGTHS:
        slab = _unused(code, groups, length + 5)
        slab[:, :, :length] = code.encode(torch.randn(2, groups, length, width, generator=draw).to(code.dtype))
        slabs.append(slab)
        numbers += [length + 5, length // 2, length, len(slabs) - 1]
    heads = (groups * shared, groups, groups)
    fused = torch.randn(len(LENGTHS), sum(heads) + 1, width, generator=draw).to(code.dtype)
    return list(fused[:, :-1].split(heads, 1)), slabs, torch.tensor(numbers)


def _alone(numbers_N: torch.Tensor, row: int) -> torch.Tensor:
    """The numbers of one row as of a call of its own."""
    return torch.cat((numbers_N.view(-1, 4)[row, :3], torch.zeros(1, dtype=torch.int64)))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("groups", "shared", "width"), [(2, 4, 64), (3, 1, 128), (1, 7, 80), (2, 6, 16), (1, 5, 256)])
@torch.no_grad()
def test_it_equals_the_formula(groups: int, shared: int, width: int, kind: Any, dtype: torch.dtype) -> None:
    code = RowCode(kind, (width,), dtype)
    sinks_H = torch.randn(groups * shared, generator=torch.Generator().manual_seed(1)).to(dtype)
    for window, softcap, sinks in ((None, None, None), (37, None, None), (300, 2.0, sinks_H)):
        (q, k, v), slabs, numbers_N = _case(code, groups, shared)
        how: Scores = {"scale": width**-0.5, "window": window, "softcap": softcap, "sinks_H": sinks}
        expected = [slab.clone() for slab in slabs]
        found = attend_slabs(q, k, v, addresses(slabs), numbers_N, code, how)
        for b, length in enumerate(LENGTHS):
            expected[b][:, :, length // 2] = code.encode(torch.stack((k[b], v[b])))
            held, meant = (slab.view(torch.int8) for slab in (slabs[b], expected[b]))
            assert torch.equal(held, meant), "the new row is written as the code has it, and nothing else"
            k_GSd, v_GSd = code.decode(expected[b][:, :, :length]).float()
            one = reference(
                q[b : b + 1].float(), k_GSd, v_GSd, how["scale"], length - 1, window, {}, softcap, how["sinks_H"]
            )
            assert relative_error(found[b].float(), one[0]) < TOLERANCES[dtype]


ROWS = (1, 16, 3, 20, 2, 5)
"""Of sequences in one step."""

RING = 300


def _rows(code: RowCode, ring: int | None, turn: bool) -> tuple[list[int], list[list[int]]]:
    """Of every row its sequence and its numbers, sequence by sequence or, to turn, first the first rows of all."""
    pairs = [(seq, row) for seq, count in enumerate(ROWS) for row in range(count)]
    if turn:
        pairs.sort(key=lambda pair: pair[1])
    leaders: dict[int, int] = {}
    numbers = []
    for number, (seq, row) in enumerate(pairs):
        past = LENGTHS[seq] + row
        slot, filled = (past, past + 1) if ring is None else (past % ring, min(past + 1, ring))
        numbers.append([ring or LENGTHS[seq] + 30, slot, filled, leaders.setdefault(seq, number)])
    return [seq for seq, _ in pairs], numbers


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("ring", "window", "turn"), [(None, None, False), (None, 37, True), (RING, None, True), (17, None, False)]
)
@torch.no_grad()
def test_rows_of_a_sequence_are_what_they_are_one_by_one(
    ring: int | None, window: int | None, turn: bool, kind: Any, dtype: torch.dtype
) -> None:
    code, draw = RowCode(kind, (48,), dtype), torch.Generator().manual_seed(0)
    how: Scores = {"scale": 0.2, "window": window, "softcap": None, "sinks_H": None}
    seqs, numbers = _rows(code, ring, turn)
    slabs = [_unused(code, 2, ring or length + 30) for length in LENGTHS]
    for slab, length in zip(slabs, LENGTHS, strict=True):
        old = torch.randn(2, 2, min(length, ring or length), 48, generator=draw)
        slab[:, :, : old.shape[2]] = code.encode(old.to(dtype))
    q, k, v = torch.randn(len(seqs), 10, 48, generator=draw).to(dtype).split((6, 2, 2), 1)
    copies = [slab.clone() for slab in slabs]
    together = attend_slabs(
        q, k, v, addresses([slabs[seq] for seq in seqs]), torch.tensor(numbers).flatten(), code, how, threads=3
    )
    assert together.isfinite().all()
    for row, seq in enumerate(seqs):
        one = slice(row, row + 1)
        own_N = torch.tensor([*numbers[row][:3], 0])
        alone = attend_slabs(q[one], k[one], v[one], addresses([copies[seq]]), own_N, code, how, threads=1)
        assert torch.equal(alone[0], together[row])
    for slab, copy in zip(slabs, copies, strict=True):
        assert torch.equal(slab.view(torch.int8), copy.view(torch.int8))


@pytest.mark.parametrize("dtype", TOLERANCES)
@torch.no_grad()
def test_a_row_does_not_meet_what_only_later_ones_see(dtype: torch.dtype) -> None:
    code = RowCode(None, (32,), dtype)
    how: Scores = {"scale": 0.2, "window": None, "softcap": None, "sinks_H": None}
    slab, past = torch.zeros(2, 2, 64, 32, dtype=dtype), 20
    q, k, v = torch.ones(7, 8, 32, dtype=dtype).split((4, 2, 2), 1)
    v = v.clone()
    v[3] = float("nan")
    numbers_N = torch.tensor([number for row in range(7) for number in (64, past + row, past + row + 1, 0)])
    found = attend_slabs(q, k, v, addresses([slab] * 7), numbers_N, code, how)
    assert found[:3].isfinite().all()
    assert found[3:].isnan().all()


@torch.no_grad()
def test_a_row_depends_on_neither_its_neighbours_nor_the_threads() -> None:
    code = RowCode("int8", (64,), torch.bfloat16)
    how: Scores = {"scale": 0.1, "window": None, "softcap": None, "sinks_H": None}
    (q, k, v), slabs, numbers_N = _case(code, 2, 4)
    together = attend_slabs(q, k, v, addresses(slabs), numbers_N, code, how, threads=3)
    for b in range(len(LENGTHS)):
        one = slice(b, b + 1)
        alone = attend_slabs(q[one], k[one], v[one], addresses(slabs[one]), _alone(numbers_N, b), code, how, threads=1)
        assert torch.equal(alone[0], together[b])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_is_not_finite_is_not_hidden(kind: Any) -> None:
    code = RowCode(kind, (16,), torch.float32)
    how: Scores = {"scale": 0.25, "window": None, "softcap": None, "sinks_H": None}
    for wrong in ("k", "v"):
        (q, k, v), slabs, numbers_N = _case(code, 2, 2)
        (k if wrong == "k" else v)[3, 0, 5] = float("nan")
        found = attend_slabs(q, k, v, addresses(slabs), numbers_N, code, how)
        assert not found[3, :2].isfinite().all(-1).any()
        assert found[3, 2:].isfinite().all()
        assert found[:3].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_steps_use_it_and_agree_with_torch(
    kind: Any, small: Callable[..., DecoderSpec], filled: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    mixer = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "rope": {"theta": 50.0}}
    layers = [{"mixer": mixer | {"window": 7}, "ffn": None}, {"mixer": mixer | {"sinks": True}, "ffn": None}]
    module = filled(small(layers=layers, cache_dtype=kind))
    sequences = [torch.randint(37, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (29, 12)]
    monkeypatch.setenv("ZOO_ATTENTION", "reference")
    expected = step_through(module, sequences, 1)
    monkeypatch.setenv("ZOO_ATTENTION", "auto")
    calls: list[int] = []

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(len(arguments[0]))
        return attend_slabs(*arguments)

    monkeypatch.setattr(kv, "attend_slabs", counted)
    for chunk in (1, 5):
        for found, whole in zip(step_through(module, sequences, chunk), expected, strict=True):
            assert relative_error(found, whole) < 1e-4
    assert calls.count(2) == 24, "both sequences at once in both layers, as long as the shorter one lasts"
    assert [calls.count(rows) for rows in (10, 7, 5, 4)] == [4, 2, 4, 2], "chunks, also where rings turn"


def test_it_is_left_out_where_it_does_not_run() -> None:
    code = RowCode(None, (16,), torch.float32)
    q, k = torch.randn(1, 4, 16), torch.randn(1, 2, 16)
    assert not attends(q, k, k, code), "gradients"
    with torch.no_grad():
        assert attends(q, k, k, code)
        assert not attends(q.half(), k.half(), k.half(), RowCode(None, (16,), torch.float16))
        assert not attends(q[..., :6], k[..., :6], k[..., :6], RowCode(None, (6,), torch.float32))
        assert not attends(q.transpose(0, 1), k, k, code)
    assert missing() is None, "its own check passes"
