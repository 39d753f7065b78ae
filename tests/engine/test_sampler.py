from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.components import native
from zoo.components.native import sampling
from zoo.engine.randoms import uniform
from zoo.engine.request import SamplingParams
from zoo.engine.sampler import BLOCK, best, choose, likeliest, ranked


@pytest.fixture(params=["torch", "kernel"] if native.missing() is None else ["torch"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to draw, of which a machine without the kernels has one."""
    if request.param == "torch":
        monkeypatch.setattr(sampling, "runs", lambda logits_RV: False)
    return str(request.param)


def kept(logits: list[float], params: SamplingParams) -> list[tuple[int, float]]:
    """The definition, by hand: (id, probability) of what the filters keep, likeliest first, equal ones by id."""
    top = max(logits)
    weights = [math.exp((x - top) / params.temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: params.top_k or len(logits)]
    total = sum(weights[i] for i in order)
    chosen, mass = [], 0.0
    for i in order:
        if (params.top_p < 1 and mass >= params.top_p * total) or weights[i] < params.min_p:
            break
        chosen.append(i)
        mass += weights[i]
    return [(i, weights[i] / mass) for i in chosen]


def inverse(distribution: list[tuple[int, float]], number: float) -> int:
    mass = 0.0
    for token, probability in distribution:
        mass += probability
        if number < mass:
            return token
    return distribution[-1][0]


FILTERS = [
    {"top_k": 5},
    {"top_p": 0.5},
    {"top_p": 0.999},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 7, "top_p": 0.6},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.01},
    {"top_k": 1000},
    {"top_p": 1e-9},
]


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_filtered_rows_follow_the_definition(options: dict[str, float], temperature: float) -> None:
    # Halves, so that many logits are equal and the order of equal ones matters.
    logits_RV = (torch.randn(50, 97, generator=torch.Generator().manual_seed(0)) * 4).round() / 2
    params = SamplingParams(temperature=temperature, **options)  # type: ignore[arg-type]
    numbers = [uniform(3, row) for row in range(50)]
    found = choose(logits_RV, [params] * 50, numbers).tolist()
    expected = [inverse(kept(row, params), x) for row, x in zip(logits_RV.tolist(), numbers, strict=True)]
    assert found == expected


def test_unfiltered_rows_follow_the_distribution() -> None:
    logits_V = torch.tensor([0.0, 2.0, -1.0, 1.0])
    count = 20_000
    params = [SamplingParams(temperature=0.7)] * count
    found = choose(logits_V.expand(count, 4), params, [uniform(1, i) for i in range(count)])
    shares = torch.bincount(found, minlength=4) / count
    assert torch.allclose(shares, (logits_V / 0.7).softmax(0), atol=0.015)


@pytest.mark.parametrize("spread", [0.0, 0.5, 8.0])
def test_unfiltered_rows_follow_the_definition_in_the_order_of_ids(spread: float) -> None:
    logits_RV = wide(5 * BLOCK + 7, spread)[:1].expand(200, -1)
    numbers = [uniform(4, row) for row in range(200)]
    found = choose(logits_RV, [SamplingParams(temperature=1.3)] * 200, numbers).tolist()
    shares = (logits_RV[0].double() / 1.3).softmax(-1).tolist()
    assert found == [inverse([*enumerate(shares)], number) for number in numbers]


def test_a_row_does_not_depend_on_the_others() -> None:
    generator = torch.Generator().manual_seed(1)
    logits_RV = (torch.randn(40, 3000, generator=generator) * 3).bfloat16().float()
    options = [{}, {"temperature": 1.0}, {"temperature": 2.0, "top_p": 0.95}, {"temperature": 1.0, "top_k": 9}]
    params = [SamplingParams(**options[i % 4]) for i in range(40)]  # type: ignore[arg-type]
    numbers = [uniform(9, i) for i in range(40)]
    together = choose(logits_RV, params, numbers).tolist()
    alone = [choose(logits_RV[i : i + 1], [params[i]], [numbers[i]]).item() for i in range(40)]
    assert together == alone
    assert len(set(together)) > 10


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-300}], ids=str)
def test_the_narrowest_settings_are_greedy(options: dict[str, float]) -> None:
    logits_RV = torch.randn(20, 50, generator=torch.Generator().manual_seed(2))
    params = SamplingParams(**{"temperature": 1.0, **options})  # type: ignore[arg-type]
    assert choose(logits_RV, [params] * 20, [0.999] * 20).tolist() == logits_RV.argmax(-1).tolist()


@pytest.mark.parametrize("options", [{}, {"top_p": 0.99}], ids=str)
def test_what_has_no_probability_is_never_taken(options: dict[str, float]) -> None:
    logits_RV = torch.tensor([[-1e4, -1e4, 1.0, -1e4, 0.0, -1e4]]).expand(4, 6)
    params = SamplingParams(temperature=1.0, **options)  # type: ignore[arg-type]
    assert choose(logits_RV, [params] * 4, [0.0, 0.5, 0.9, 1 - 2**-53]).tolist() == [2, 2, 4, 4]
    # Nor where whole blocks of tokens have none, before and behind.
    logits_RV = F.pad(logits_RV, (3 * BLOCK, 2 * BLOCK + 1), value=-1e4)
    found = choose(logits_RV, [params] * 4, [0.0, 0.5, 0.9, 1 - 2**-53]).tolist()
    assert found == [3 * BLOCK + place for place in (2, 2, 4, 4)]


def test_a_huge_temperature_is_uniform() -> None:
    logits_RV = torch.randn(1, 10, generator=torch.Generator().manual_seed(3)).expand(10, 10)
    params = SamplingParams(temperature=1e300)
    assert choose(logits_RV, [params] * 10, [(i + 0.5) / 10 for i in range(10)]).tolist() == list(range(10))


def wide(vocabulary: int, spread: float) -> Tensor:
    logits_RV = torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(4)) * spread
    return logits_RV.bfloat16().float()


@pytest.mark.parametrize("spread", [0.0, 0.5, 8.0])
@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.95},
        {"min_p": 0.01},
        {"top_k": 2000, "top_p": 0.9},
        {"top_k": 1020},
        {"top_k": 1024},
        {"top_k": 64},
        {"top_k": 300, "top_p": 0.99},
    ],
    ids=str,
)
def test_a_vocabulary_beyond_the_candidates_follows_the_definition(spread: float, options: dict[str, float]) -> None:
    logits_RV = wide(3 * 1024 + 5, spread)
    params = SamplingParams(temperature=1.0, **options)  # type: ignore[arg-type]
    numbers = [0.001, 0.4, 0.8, 0.9999]
    expected = [inverse(kept(row, params), x) for row, x in zip(logits_RV.tolist(), numbers, strict=True)]
    assert choose(logits_RV, [params] * 4, numbers).tolist() == expected


def test_ranked_says_how_far_it_is_certain() -> None:
    logits_RV = torch.tensor([[1.0, 5.0, 3.0, 3.0, 3.0, 2.0], [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
    _, ids_RC, certain_R = ranked(logits_RV, 3)
    assert certain_R.tolist() == [1, 2]
    assert ids_RC[0, 0] == 1
    assert ids_RC[1].tolist() == [0, 1, 2]
    _, ids_RC, certain_R = ranked(logits_RV, 99)
    assert ids_RC.tolist() == [[1, 2, 3, 4, 5, 0], [0, 1, 2, 3, 4, 5]]
    assert certain_R.tolist() == [6, 6]


@pytest.mark.parametrize("vocabulary", [1, BLOCK, 40 * BLOCK, 40 * BLOCK + 3])
def test_the_likeliest_is_the_first_of_equal_ones(vocabulary: int) -> None:
    logits_RV = (torch.randn(30, vocabulary, generator=torch.Generator().manual_seed(6)) * 3).round()
    best_R = logits_RV.amax(-1, keepdim=True)
    expected = [row.nonzero()[0].item() for row in logits_RV == best_R]
    assert likeliest(logits_RV).tolist() == expected
    assert choose(logits_RV, [SamplingParams()] * 30, [0.5] * 30).tolist() == expected


@pytest.mark.parametrize("count", [1, 64, 90])
def test_the_largest_are_found_block_by_block(count: int) -> None:
    logits_RV = torch.randn(20, 11_000 + 7, generator=torch.Generator().manual_seed(7))
    # The largest of one row side by side, and those of another in its last, shorter block.
    logits_RV[0, 500:600] += 50
    logits_RV[1, -7:] += 50
    values_RC, ids_RC, certain_R = ranked(logits_RV, count)
    expected = logits_RV.sort(dim=-1, descending=True)
    assert torch.equal(ids_RC, expected.indices[:, :count])
    assert torch.equal(values_RC, expected.values[:, :count])
    assert certain_R.tolist() == [count - 1] * 20


def test_best_breaks_ties_by_id_at_any_size() -> None:
    flat_RV = torch.zeros(2, 500)
    flat_RV[1, 400] = 1.0
    assert best(flat_RV, 3).tolist() == [[0, 1, 2], [400, 0, 1]]
    assert best(flat_RV, 0).shape == (2, 0)


def test_sums_that_round_differently_leave_the_token_within_its_block() -> None:
    """A block's sum in one number format and its running sum in another: numbers near 1 fall between the two."""
    logits_RV = torch.randn(300, 2 * BLOCK, generator=torch.Generator().manual_seed(5))
    first_RV = logits_RV[:, :BLOCK]
    plain = [SamplingParams(temperature=1.0)] * 300
    for number in (1 - 1e-12, 1 - 2**-53):
        assert int(choose(first_RV, plain, [number] * 300).max()) < BLOCK
        lone_RV = F.pad(first_RV, (0, BLOCK), value=-1e4)
        assert int(choose(lone_RV, plain, [number] * 300).max()) < BLOCK
        short_RV = F.pad(first_RV[:, :100], (0, BLOCK - 100), value=-1e4)
        assert int(choose(short_RV, plain, [number] * 300).max()) < 100


def test_a_sum_that_is_just_reached() -> None:
    """Of ten equal shares, a half is five for a filter, and the sixth for a number."""
    logits_RV = torch.arange(10.0).flip(0).unsqueeze(0)
    half = SamplingParams(temperature=1e300, top_p=0.5)
    assert choose(logits_RV.expand(2, -1), [half] * 2, [0.999, 0.2]).tolist() == [4, 1]
    assert choose(logits_RV, [SamplingParams(temperature=1e300, top_k=10)], [0.5]).tolist() == [5]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 0.3, "top_k": 40},
    {"temperature": 1.0, "top_p": 0.95},
    {"temperature": 2.0, "min_p": 0.05},
    {"temperature": 1e300, "top_p": 0.9},
    {"temperature": 1e-3, "top_k": 900, "top_p": 0.9999},
    {"temperature": 1.0, "top_k": 700, "top_p": 0.8, "min_p": 1e-4},
    {"temperature": 1.0, "top_k": 1_000_000},
]


@pytest.mark.parametrize("vocabulary", [1, 2, 15, 16, 17, 1000, 3 * BLOCK, 33_001])
@pytest.mark.parametrize("spread", [0.0, 1e-6, 1.0, 30.0])
def test_the_kernel_draws_what_the_formula_draws(
    vocabulary: int, spread: float, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(8)
    logits_RV = (torch.randn(90, vocabulary + 3, generator=draw) * spread)[:, :vocabulary]
    logits_RV[::7, vocabulary // 2 :] = -1e4
    params = [SamplingParams(**OPTIONS[i % len(OPTIONS)]) for i in range(90)]
    numbers = [uniform(5, i) for i in range(90)]
    found = choose(logits_RV, params, numbers).tolist()
    monkeypatch.setattr(sampling, "runs", lambda logits_RV: False)
    assert found == choose(logits_RV, params, numbers).tolist()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_gives_any_token_and_disturbs_no_other(options: dict[str, Any], wrong: float) -> None:
    logits_RV = torch.randn(6, 300, generator=torch.Generator().manual_seed(9))
    logits_RV[1, 7] = 1e4  # In front of what is wrong, sixteen lanes apart: the largest is lost to vectors.
    params, numbers = [SamplingParams(**options)] * 6, [0.1, 0.4, 0.99] * 2
    expected = choose(logits_RV, params, numbers).tolist()
    broken_RV = logits_RV.clone()
    broken_RV[1, 167] = broken_RV[3, :] = broken_RV[4, 250:] = wrong
    found = choose(broken_RV, params, numbers).tolist()
    assert [found[row] for row in (0, 2, 5)] == [expected[row] for row in (0, 2, 5)]
    assert all(0 <= token < 300 for token in found)


def test_no_rows_give_no_tokens() -> None:
    assert choose(torch.zeros(0, 50), [], []).tolist() == []
