"""Mixtures by the kernels in mixture.c against every expert by itself, and records of them that follow the choices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.components import native
from zoo.components.build import build
from zoo.components.compiled import kernels_file
from zoo.components.ffn.moe import MoE
from zoo.components.ffn.spec import (
    ClampedSpec,
    Expert,
    GatedSpec,
    MLPSpec,
    MoESpec,
    SigmoidSpec,
    SoftmaxSpec,
    SoftmaxTopkSpec,
)
from zoo.components.kinds import INT4, INT8
from zoo.components.native import mixture
from zoo.components.native.calls import Arena, Record
from zoo.components.native.panels import Panels, packed
from zoo.components.quantised import Quantised, is_native

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"no native kernels: {native.missing()}")

SIZES: dict[str, Any] = {"dim": 32, "num_experts": 6, "experts_per_token": 3}
FORMS: dict[str, Expert] = {
    "odd": GatedSpec(dim=32, hidden_dim=44),
    "gated": GatedSpec(dim=32, hidden_dim=48),
    "gelu": GatedSpec(dim=32, hidden_dim=48, activation="gelu"),
    "plain": MLPSpec(dim=32, hidden_dim=48, activation="relu2"),
    "clamped": ClampedSpec(dim=32, hidden_dim=48, gain=1.7, limit=0.5),
}
STORES: dict[str, Callable[[Tensor], Any]] = {
    "panels": Panels.of,
    "packed": packed,
    "int8": lambda weight: Quantised.of(INT8, weight),
    "int4": lambda weight: Quantised.of(INT4, weight),
}


def stored(form: str = "gated", store: str = "panels", **changes: Any) -> MoE:
    """A mixture in bfloat16 whose experts are stored so."""
    if store.startswith("int") and not is_native():
        pytest.skip("a processor without AVX-512 VNNI")
    spec = MoESpec(**SIZES, router=SoftmaxTopkSpec(**SIZES), expert=FORMS[form], **changes)
    moe, draw = build(spec, device="cpu").bfloat16(), torch.Generator().manual_seed(0)
    assert isinstance(moe, MoE)
    for parameter in moe.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    for name in moe.MATRICES:
        moe.store(name, STORES[store])
    return moe


def rows(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each call of the kernels."""
    real, found = MoE._by_kernels, list[int]()

    def counted(self: MoE, x_TD: Tensor, *rest: Tensor) -> Tensor:
        found.append(len(x_TD))
        return real(self, x_TD, *rest)

    monkeypatch.setattr(MoE, "_by_kernels", counted)
    return found


@torch.inference_mode()
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("form", FORMS)
def test_kernels_equal_every_expert_by_itself(
    form: str, store: str, used: list[int], close: Callable[..., None]
) -> None:
    moe = stored(form, store)
    for count in (1, 2, 7, 65):
        close(moe(rows(count)), moe._by_expert(rows(count), *moe.router(rows(count))), "bfloat16")
    assert moe(rows(0)).shape == (0, 32)
    assert used == [1, 2, 7, 65, 0]


@torch.inference_mode()
@pytest.mark.parametrize("store", STORES)
def test_a_row_does_not_depend_on_its_neighbours(store: str) -> None:
    moe, x_TD = stored("gated", store), rows(40)
    alone_TD = torch.cat([moe(row.unsqueeze(0)) for row in x_TD])
    for count in (2, 9, 40):
        assert torch.equal(moe(x_TD[:count]), alone_TD[:count]), count
    x_TD[7] = torch.nan
    found_TD = moe(x_TD)
    assert found_TD[7].isnan().all()
    assert torch.equal(found_TD[8:], alone_TD[8:])


@torch.inference_mode()
@pytest.mark.parametrize(("inputs", "experts"), [(16, 1), (75, 3), (1030, 17)])
def test_logits_equal_the_formula(inputs: int, experts: int, close: Callable[..., None]) -> None:
    draw = torch.Generator().manual_seed(inputs)
    x_TD, weight_ED = (torch.randn(*size, generator=draw).bfloat16() for size in ((9, inputs), (experts, inputs)))
    expected_TE = torch.nn.functional.linear(x_TD.float(), weight_ED.float())
    alone_TE = torch.cat([mixture.logits(row.unsqueeze(0), weight_ED) for row in x_TD])
    for count in range(10):
        found_TE = mixture.logits(x_TD[:count], weight_ED)
        assert found_TE.dtype is torch.float32
        assert torch.equal(found_TE, alone_TE[:count])
    close(alone_TE, expected_TE)
    apart = torch.full((9, inputs + 3), torch.nan).bfloat16()
    apart[:, :inputs] = x_TD
    assert torch.equal(mixture.logits(apart[:, :inputs], weight_ED), alone_TE)


@torch.inference_mode()
@pytest.mark.parametrize("spec", [SoftmaxTopkSpec, SoftmaxSpec, SigmoidSpec])
def test_what_a_router_chooses_does_not_depend_on_the_rows_beside(
    spec: type[SoftmaxTopkSpec | SoftmaxSpec | SigmoidSpec], close: Callable[..., None]
) -> None:
    """Weights but for the last bits of PyTorch's sigmoid, which differ with a number's place."""
    router, draw = build(spec(**SIZES | {"dim": 1030}), device="cpu").bfloat16(), torch.Generator().manual_seed(0)
    for parameter in router.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    x_TD = torch.randn(70, 1030, generator=draw).bfloat16()
    alone = [router(row.unsqueeze(0)) for row in x_TD]
    for count in (2, 9, 70):
        weights_TK, experts_TK = router(x_TD[:count])
        assert torch.equal(experts_TK, torch.cat([one[1] for one in alone[:count]])), count
        close(weights_TK, torch.cat([one[0] for one in alone[:count]]))


@pytest.mark.parametrize("chosen", [1, 3])
def test_pairs_are_sorted_as_a_stable_sort_does(chosen: int) -> None:
    experts_TK = torch.randint(5, (23, chosen), generator=torch.Generator().manual_seed(2))
    order = mixture.order(experts_TK, 4)
    sorted_N = experts_TK.flatten().argsort(stable=True)
    assert torch.equal(order.rows_N.long(), sorted_N // chosen)
    assert torch.equal(order.places_TK.flatten().long()[sorted_N], torch.arange(23 * chosen))
    assert torch.equal(order.ends_E.long(), experts_TK.flatten().bincount(minlength=5).cumsum(0))


@torch.inference_mode()
def test_experts_of_other_devices_are_left_out(used: list[int], close: Callable[..., None]) -> None:
    """Two halves of the experts add up to the whole, also where a row has none of a half's."""
    whole, x_TD, total_TD = stored("clamped"), rows(70), torch.zeros(70, 32)
    assert (whole.router(x_TD)[1] >= 3).all(1).any()
    for first in (0, 3):
        half = stored("clamped", held=(first, first + 3))
        for name, value in whole.named_parameters():
            if name.startswith("experts"):
                for e in range(3):
                    piece = whole.values(name, (first + e,))
                    half.replace(name, (e,), piece)
            else:
                half.get_parameter(name).data.copy_(value)
        total_TD += half(x_TD)
    close(total_TD, whole(x_TD).float(), "bfloat16")
    assert used == [70, 70, 70]


def follows(moe: MoE, count: int, tries: int) -> int:
    """Inputs change behind a record, and the experts with them: to how many sets of experts it went."""
    x_TD, record, seen = rows(count), Record(Arena()), set[tuple[int, ...]]()
    found_TD = record.make(lambda: moe(x_TD))
    assert record.refused is None, "no number is asked for on the way"
    for seed in range(tries):
        x_TD.copy_(rows(count, seed))
        record.run()
        assert torch.equal(found_TD, moe(x_TD))
        seen.update(tuple(sorted(one)) for one in moe.router(x_TD)[1].tolist())
    return len(seen)


@torch.inference_mode()
@pytest.mark.parametrize("store", STORES)
def test_a_record_follows_the_choices(store: str) -> None:
    assert follows(stored("gated", store), 2, 12) > 8, "other experts at most steps"


@torch.inference_mode()
def test_a_record_of_a_router_in_groups_follows_the_choices() -> None:
    spec = SigmoidSpec(**SIZES, groups=3, groups_per_token=2, scale=2.5)
    moe = stored("gated")
    moe.router = build(spec, device="cpu").bfloat16()
    moe.router.get_parameter("weight").data.normal_()
    moe.router.get_parameter("bias").data = torch.linspace(-1, 1, 6)
    assert follows(moe, 3, 4) > 2


@torch.inference_mode()
def test_new_matrices_are_taken_and_old_ones_kept_for_records(used: list[int], close: Callable[..., None]) -> None:
    moe, x_TD = stored(), rows(5)
    record = Record(Arena())
    found_TD = record.make(lambda: moe(x_TD))
    before_TD = found_TD.clone()
    other = copy.deepcopy(moe)
    for e in range(6):
        moe.replace("experts_down", (e,), 2 * moe.values("experts_down", (e,)).float())
    filler = [torch.full((2, 16, 24), -1, dtype=torch.int32) for _ in range(200)]
    close(moe(x_TD), 2 * before_TD, "bfloat16")
    assert torch.equal(other(x_TD), before_TD)
    record.run()
    assert torch.equal(found_TD, before_TD)
    assert len(filler) == 200
    assert used == [5, 5, 5]


@torch.inference_mode()
def test_what_the_kernels_do_not_know_goes_expert_by_expert(used: list[int], close: Callable[..., None]) -> None:
    moe, x_TD = stored(), rows(4)
    expected_TD = moe(x_TD)
    moe.put("experts_in", [*moe.stored["experts_in"][:5], Quantised.of(INT8, moe.values("experts_in", (5,)))])
    found_TD = moe(x_TD)
    assert used == [4], "experts that are not stored alike"
    close(found_TD, expected_TD, "bfloat16")


@torch.inference_mode()
@pytest.mark.parametrize("store", ["panels", "packed"])
@pytest.mark.parametrize("level", ["multiply-add", "dot"])
def test_products_of_other_processors(
    level: str, store: str, monkeypatch: pytest.MonkeyPatch, close: Callable[..., None]
) -> None:
    moe, x_TD = stored("gated", store), rows(19)
    expected_TD, path = moe(x_TD), kernels_file()
    assert path is not None
    if native.LEVELS[level] > native.Kernels(path).level:
        pytest.skip("not on this processor")
    monkeypatch.setattr(native, "library", lambda: native.Kernels(path, native.LEVELS[level]))
    close(moe(x_TD), expected_TD, "bfloat16")
