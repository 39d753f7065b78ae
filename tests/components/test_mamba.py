"""The state-space mixers: their scans against the recurrence token by token, and their promises in a decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.components.build import build
from zoo.components.cache.recurrent import FreshRecurrent, RecurrentStore, Span, spans
from zoo.components.cache.spec import RecurrentCacheSpec
from zoo.components.cache.store import fresh_step, make_store
from zoo.components.decoder.spec import DecoderSpec
from zoo.components.mamba import scan
from zoo.components.mamba.convolution import CausalConv
from zoo.components.mamba.mamba2 import GatedNorm
from zoo.components.mamba.spec import Mamba1Spec, Mamba2Spec
from zoo.registry.errors import CapacityError, CardError
from zoo.testing import check_component

MAMBA2: dict[str, Any] = {
    "kind": "mamba2",
    "num_heads": 6,
    "head_dim": 8,
    "num_groups": 2,
    "state_size": 5,
    "conv_size": 4,
    "norm_eps": 1e-5,
}
MAMBA1: dict[str, Any] = {"kind": "mamba1", "inner_dim": 20, "state_size": 5, "dt_rank": 3, "conv_size": 4}
NORM = {"eps": 1e-3, "weights": False}
STATE = RecurrentCacheSpec(conv_channels=6, conv_size=4, inner_dim=8, state_size=5)

Check = Callable[..., None]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def steps(*shape: int) -> Tensor:
    """Sizes of steps from nearly none to several, and some of none at all."""
    dt = torch.nn.functional.softplus(4 * random(*shape, seed=2) - 2)
    dt[:, 3::7] = 0
    return dt


# --- scans ----------------------------------------------------------------------------------------------------------


def ssd_rows(rows: int, batch: int = 2, heads: int = 6, groups: int = 2) -> tuple[Tensor, ...]:
    return (
        random(batch, rows, heads, 8, seed=1),
        steps(batch, rows, heads),
        random(batch, rows, groups, 5, seed=3),
        random(batch, rows, groups, 5, seed=4),
    )


@pytest.mark.parametrize("rows", [1, 2, scan.CHUNK, scan.CHUNK + 1, 3 * scan.CHUNK - 1])
@pytest.mark.parametrize("begins", [True, False], ids=["from nothing", "from a state"])
def test_ssd_equals_the_recurrence(rows: int, begins: bool, close: Check) -> None:
    a_H, state = -torch.exp(random(6, seed=0)), None if begins else random(2, 48, 5, seed=5)
    for found, expected in zip(
        scan.ssd(a_H, state, *ssd_rows(rows)), scan.ssd_reference(a_H, state, *ssd_rows(rows)), strict=True
    ):
        close(found, expected)


def test_ssd_reference_is_the_formula(close: Check) -> None:
    """One head, one element, by hand."""
    x, dt, b, c, a = 3.0, 0.5, 2.0, 4.0, -1.5
    y, state = scan.ssd_reference(
        torch.tensor([a]),
        torch.tensor([[[7.0]]]),
        *(torch.tensor(value).view(1, 1, 1, *more) for value, more in ((x, (1,)), (dt, ()), (b, (1,)), (c, (1,)))),
    )
    expected = torch.exp(torch.tensor(dt * a)) * 7.0 + dt * x * b
    close(state, expected.view(1, 1, 1))
    close(y, (c * expected).view(1, 1, 1, 1))


def test_ssd_of_long_memories_is_exact(close: Check) -> None:
    """Steps that forget all, among steps that forget nothing, where differences of running sums would lose digits."""
    x, dt, b, c = ssd_rows(2 * scan.CHUNK, batch=1)
    dt = torch.where(torch.arange(len(dt[0])).view(1, -1, 1) % 5 == 0, 4000.0, 1e-3).expand_as(dt)
    a_H = torch.full((6,), -1.0)
    x[:, ::5] = 0
    close(scan.ssd(a_H, None, x, dt, b, c)[0], scan.ssd_reference(a_H, None, x, dt, b, c)[0])


def test_segment_sums() -> None:
    sums = scan.segment_sums(torch.tensor([[[5.0, 1.0, 2.0]]]))[0, 0]
    infinite = -torch.inf
    assert sums.tolist() == [[0, 1, 3], [infinite, 0, 2], [infinite, infinite, 0]]


def selective_rows(rows: int, batch: int = 2) -> tuple[Tensor, ...]:
    return (
        random(batch, rows, 7, seed=1),
        steps(batch, rows, 7),
        random(batch, rows, 5, seed=3),
        random(batch, rows, 5, seed=4),
    )


@pytest.mark.parametrize("busy", [1, 2 * 7 * 5 * 3, 1 << 20], ids=["one piece", "three pieces", "many pieces"])
@pytest.mark.parametrize("rows", [1, 2, 16, 61])
@pytest.mark.parametrize("begins", [True, False], ids=["from nothing", "from a state"])
def test_selective_equals_the_recurrence(
    rows: int, begins: bool, busy: int, close: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(scan.BUSY, "cpu", busy)
    a_Wn, state = -torch.exp(random(7, 5, seed=0)), None if begins else random(2, 7, 5, seed=5)
    for found, expected in zip(
        scan.selective(a_Wn, state, *selective_rows(rows)),
        scan.selective_reference(a_Wn, state, *selective_rows(rows)),
        strict=True,
    ):
        close(found, expected)


def test_both_references_agree_where_they_meet(close: Check) -> None:
    """Heads of one channel are channels; equal decays along a channel's state are one decay."""
    x, dt, b, c = selective_rows(9)
    a_W = -torch.exp(random(7, seed=0))
    expected = scan.ssd_reference(a_W, None, x.unsqueeze(-1), dt, b.unsqueeze(2), c.unsqueeze(2))
    found = scan.selective_reference(a_W.unsqueeze(1).expand(7, 5), None, x, dt, b, c)
    close(found[0], expected[0].squeeze(-1))
    close(found[1], expected[1])


# --- convolution and norm -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_convolution_equals_torch(size: int, bias: bool, close: Check) -> None:
    conv, x_BTW = CausalConv(6, size, bias=bias), random(2, 9, 6, seed=1)
    for parameter in conv.parameters():
        torch.nn.init.normal_(parameter)
    padded = torch.nn.functional.pad(x_BTW.transpose(1, 2), (size - 1, 0))
    expected = torch.nn.functional.conv1d(padded, conv.weight, conv.bias, groups=6)
    y_BTW, past = conv(None, x_BTW)
    close(y_BTW, torch.nn.functional.silu(expected).transpose(1, 2))
    assert torch.equal(past, x_BTW[:, 9 - (size - 1) :])
    first, past = conv(None, x_BTW[:, :2])
    second, _ = conv(past, x_BTW[:, 2:])
    close(torch.cat((first, second), dim=1), y_BTW)


def test_gated_norm_normalises_each_group(close: Check) -> None:
    norm = GatedNorm(6, 2, 0.5)
    torch.nn.init.normal_(norm.weight)
    y, z = random(3, 6, seed=1), random(3, 6, seed=2)
    gated = (y * z * torch.sigmoid(z)).view(3, 2, 3)
    expected = gated / torch.sqrt(gated.square().mean(-1, keepdim=True) + 0.5)
    close(norm(y, z), expected.view(3, 6) * norm.weight)


# --- the cache ------------------------------------------------------------------------------------------------------


def test_spans_put_single_rows_together() -> None:
    assert spans(range(6), [1, 1, 3, 1, 1, 1], [4, 9, 0, 2, 0, 0]) == [
        Span(0, 2, 0, 1, begins=False),
        Span(2, 1, 2, 3, begins=True),
        Span(3, 1, 5, 1, begins=False),
        Span(4, 2, 6, 1, begins=True),
    ]


def test_store_keeps_one_state_for_each_sequence() -> None:
    store = make_store(STATE, 3, torch.bfloat16, "cpu", budget_bytes=1500)
    each = 3 * (2 * 3 * 6 + 4 * 8 * 5)
    assert isinstance(store, RecurrentStore)
    assert [store.cost(tokens) for tokens in (1, 10**6)] == [each, each] == [3 * STATE.nbytes(1, 2)] * 2
    store.grow(7, 1)
    store.grow(7, 1000)
    store.grow(8, 1)
    assert store.nbytes == 2 * each
    with pytest.raises(CapacityError, match="cache is full"):
        store.grow(9, 1)
    store.free(7)
    store.free(7)
    assert store.nbytes == each


def test_state_goes_on_where_it_stands_or_begins_anew() -> None:
    def add(state: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.sum(1) if state is None else state + x.sum(1)
        return total.unsqueeze(1).expand(-1, x.shape[1], -1, -1), total

    store = make_store(STATE, 2, torch.float32, "cpu")
    for seq in (3, 5):
        store.grow(seq, 8)
    ones = torch.ones(5, 8, 5)
    for past, expected in (([0, 0], [2, 2, 3, 3, 3]), ([2, 3], [4, 4, 6, 6, 6]), ([0, 6], [2, 2, 9, 9, 9])):
        second = store.views([3, 5], [2, 3], past)[1]
        assert second.advance("ssm", add, ones)[:, 0, 0].tolist() == expected
    with pytest.raises(AssertionError, match="goes on where it stands"):
        store.views([3], [1], [1])


@pytest.mark.parametrize("storage", ["slab", "pages"])
def test_states_move_on_by_the_rows_that_hold(storage: str) -> None:
    """Bit by bit those of decoding: rows are run one by one, and those that hold once more."""

    def turn(state: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        assert x.shape[1] == 1
        left = torch.sin(3 * x[:, 0] + (0 if state is None else state))
        return left.unsqueeze(1) * 2, left

    store, plain = (make_store(STATE, 2, torch.float32, "cpu", storage, 10**6) for _ in range(2))
    rows = {seq: torch.randn(9, 8, 5, generator=torch.Generator().manual_seed(seq)) for seq in (3, 5)}
    for seq in rows:
        store.grow(seq, 9)
        plain.grow(seq, 9)
    expected = {
        seq: [plain.views([seq], [1], [t])[1].advance("ssm", turn, x[t : t + 1]) for t in range(9)]
        for seq, x in rows.items()
    }
    store.views([3, 5], [1, 1], [0, 0])[1].advance("ssm", turn, torch.stack([rows[3][0], rows[5][0]]))
    wrong, past = torch.randn(8, 5), 1
    for step, right in enumerate((1, 0, 2), 1):
        store.mark(3, past, 3)
        guesses = [rows[3][past + t] if t <= right else wrong for t in (1, 2)]
        view = store.views([3, 5, 3, 3], [1] * 4, [past, step, past + 1, past + 2])[1]
        found = view.advance("ssm", turn, torch.stack([rows[3][past], rows[5][step], *guesses]))
        assert torch.equal(found[1:2], expected[5][step])
        for t, row in zip(range(1 + right), (found[0], *found[2:]), strict=False):
            assert torch.equal(row.unsqueeze(0), expected[3][past + t])
        past += 1 + right
        store.rewind(3, past)
    last = store.views([3], [1], [past])[1]
    assert torch.equal(last.advance("ssm", turn, rows[3][past : past + 1]), expected[3][past])


def test_fresh_state_keeps_nothing() -> None:
    [fresh] = RecurrentStore.fresh([2, 1], 1)
    assert isinstance(fresh, FreshRecurrent)
    seen: list[Any] = []

    def look(state: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((state, tuple(x.shape)))
        return x, x

    for _ in range(2):
        assert fresh.advance("conv", look, torch.ones(3, 4)).shape == (3, 4)
    assert seen == [(None, (1, 2, 4)), (None, (1, 1, 4))] * 2


# --- in a decoder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", [MAMBA2, MAMBA1, MAMBA1 | {"bcdt_norm": NORM}], ids=["mamba2", "mamba1", "normed"])
def test_conformance(node: dict[str, Any]) -> None:
    variants = {} if node["kind"] == "mamba2" else {"bcdt_norm": {"eps": 1e-3, "weights": True}}
    check_component("mixer", node, variants=variants)


def mixers_only(mixer: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"repeat": 2, "mixer": mixer, "ffn": None}]


@pytest.mark.parametrize("node", [MAMBA2, MAMBA1 | {"bcdt_norm": NORM | {"weights": True}}], ids=["mamba2", "mamba1"])
def test_mixture_of_rows_equals_each_alone(node: dict[str, Any], small: Any, filled: Any, sequences: Any) -> None:
    """Decodes beside the beginning, the middle and the one-token whole of others; twice, after a free."""
    spec: DecoderSpec = small(layers=mixers_only(node))
    model = filled(spec)
    tokens = {seq: random(n, seed=seq).abs().mul(9).long().clamp(max=36).tolist() for seq, n in enumerate((9, 12, 1))}
    feeder = sequences(model)
    for _ in range(2):
        found = [
            feeder.feed({0: tokens[0][:7]}),
            feeder.feed({0: tokens[0][7:8], 1: tokens[1][:5], 2: tokens[2]}),
            feeder.feed({1: tokens[1][5:11], 0: tokens[0][8:]}),
            feeder.feed({1: tokens[1][11:]}),
        ]
        for seq, ids in tokens.items():
            alone = model(torch.tensor(ids), fresh_step(spec, [len(ids)]))
            together = torch.cat([step[seq] for step in found if seq in step])
            assert (together - alone).abs().max() < 2e-5 * alone.abs().max()
            feeder.free(seq)


@pytest.mark.parametrize("node", [MAMBA2, MAMBA1], ids=["mamba2", "mamba1"])
def test_gradients_reach_every_parameter(node: dict[str, Any], small: Any, filled: Any) -> None:
    spec = small(layers=mixers_only(node))
    model = filled(spec)
    model(torch.tensor([1, 5, 3, 8, 2]), fresh_step(spec, [3, 2])).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_block_without_mixer_keeps_no_state(small: Any) -> None:
    gated = {"kind": "gated", "hidden_dim": 24}
    spec = small(layers=[{"mixer": MAMBA2, "ffn": None}, {"mixer": None, "ffn": gated}])
    kept = RecurrentCacheSpec(conv_channels=68, conv_size=4, inner_dim=48, state_size=5)
    assert spec.states() == (kept, None)
    names = [name for name in spec.all_parameters() if name.startswith("layers.1.")]
    assert names == ["layers.1.ffn_norm.weight", "layers.1.ffn.gate_up.weight", "layers.1.ffn.down.weight"]
    assert set(spec.layers[0].children()) == {"mixer_norm", "mixer"}


def test_empty_block_is_refused(small: Any) -> None:
    with pytest.raises(CardError, match="a block needs a mixer or a feed-forward"):
        small(layers=[{"mixer": None, "ffn": None}])


def test_groups_divide_heads(small: Any) -> None:
    with pytest.raises(CardError, match="num_heads 6 and num_groups 4"):
        small(mixer=MAMBA2 | {"num_groups": 4}, layers=mixers_only(MAMBA2 | {"num_groups": 4}))


def test_attention_refuses_a_recurrent_cache(small: Any) -> None:
    with pytest.raises(CardError, match="needs 'conv_channels'"):
        small(mixer={"cache": "recurrent"})


@pytest.mark.parametrize("spec", [Mamba2Spec(dim=16, **MAMBA2), Mamba1Spec(dim=16, **MAMBA1)], ids=["mamba2", "mamba1"])
def test_decays_stay_in_float32(spec: Any) -> None:
    kept = {name for name, p in build(spec, dtype=torch.bfloat16).named_parameters() if p.dtype is torch.float32}
    assert kept == {"a_log", "d", "dt_bias"}


@pytest.mark.parametrize("node", [MAMBA2, MAMBA1], ids=["mamba2", "mamba1"])
def test_bfloat16_follows_float32(node: dict[str, Any], small: Any, filled: Any, close: Check) -> None:
    spec = small(layers=mixers_only(node))
    plain, halved = filled(spec), filled(spec)
    for name, parameter in halved.named_parameters():
        if spec.all_parameters()[name].dtype == "model":
            parameter.data = parameter.data.bfloat16()
            plain.get_parameter(name).data = parameter.data.float()
    step = fresh_step(spec, [9])
    tokens = torch.tensor([1, 5, 3, 8, 2, 9, 30, 21, 4])
    close(halved(tokens, step), plain(tokens, step), "bfloat16")
