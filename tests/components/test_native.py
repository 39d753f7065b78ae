"""The native kernels against their formulas, and what happens without them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.components import compiled, native
from zoo.components.attention.kernels import attention, reference
from zoo.components.compiled import kernels_file
from zoo.components.kinds import packed_bytes
from zoo.components.linear import Linear
from zoo.components.native import measure, prompts, small
from zoo.components.native.measure import plain_read_rate, product_rates, read_limit
from zoo.components.native.panels import (
    PackedFilling,
    PackedPanels,
    Panels,
    PanelsFilling,
    packed,
    packs,
    words_reference,
)
from zoo.components.norm import residual
from zoo.components.norm.rms import RMS, rms_reference
from zoo.components.norm.rms_plus_one import RMSPlusOne
from zoo.components.norm.spec import RMSPlusOneSpec, RMSSpec
from zoo.components.rope.rotary import rotate
from zoo.registry.errors import ZooError
from zoo.testing import relative_error

needs_kernels = pytest.mark.skipif(native.missing() is not None, reason=f"no native kernels: {native.missing()}")


@pytest.fixture(params=[native.MULTIPLY_ADD, native.DOT], ids=["multiply-add", "dot"])
def kernels(request: pytest.FixtureRequest) -> native.Kernels:
    path = kernels_file()
    assert path is not None
    if request.param > native.Kernels(path).level:
        pytest.skip("not on this processor")
    return native.Kernels(path, request.param)


@pytest.fixture
def fresh() -> Iterator[None]:
    """The kernels are looked for anew, and again afterwards."""
    native.missing.cache_clear()
    yield
    native.missing.cache_clear()


def operands(rows: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(rows)
    return (
        torch.randn(rows, inputs).bfloat16(),
        torch.randn(outputs, inputs).bfloat16(),
        torch.randn(outputs).bfloat16(),
    )


@needs_kernels
@pytest.mark.parametrize("inputs", [1, 32, 107])
@pytest.mark.parametrize("rows", [*range(1, 9), 13, 21])
def test_products_equal_the_formula(
    rows: int, inputs: int, kernels: native.Kernels, close: Callable[..., None]
) -> None:
    x, weight, bias = operands(rows, inputs, 53)
    for added in (None, bias):
        close(kernels.product(x, weight, added), native.product_reference(x, weight, added), "bfloat16")
    apart = torch.randn(rows, inputs + 5).bfloat16()[:, :inputs]
    close(kernels.product(apart, weight, None), native.product_reference(apart, weight), "bfloat16")


@needs_kernels
def test_rows_do_not_depend_on_their_neighbours(kernels: native.Kernels) -> None:
    x, weight, bias = operands(21, 1099, 77)
    alone = torch.cat([kernels.product(row.unsqueeze(0), weight, bias) for row in x])
    for rows in range(2, 22):
        assert torch.equal(kernels.product(x[:rows], weight, bias), alone[:rows]), rows


@needs_kernels
def test_what_is_not_a_number_stays_so(kernels: native.Kernels) -> None:
    x, weight, _ = operands(2, 40, 9)
    x[1, 3], weight[4, 7] = float("nan"), float("inf")
    found = kernels.product(x, weight, None)
    assert found[1].isnan().all()
    assert found[0].isfinite().tolist() == [n != 4 for n in range(9)]


needs_dots = pytest.mark.skipif(
    native.missing() is not None or native.library().level != native.DOT, reason="no fast bfloat16 dot products here"
)


@needs_kernels
@pytest.mark.parametrize(("inputs", "outputs"), [(2, 16), (74, 48), (74, 23), (2100, 144), (2100, 267)])
def test_panels_equal_the_formula(inputs: int, outputs: int, close: Callable[..., None]) -> None:
    for rows in (*range(1, 26), 530, 300):
        x, weight, bias = operands(rows, inputs, outputs)
        panels = Panels.of(weight)
        for added in (None, bias):
            close(panels.product(x, added), native.product_reference(x, weight, added), "bfloat16")
    apart = torch.randn(inputs, 7).bfloat16().T
    close(panels.product(apart, None), native.product_reference(apart, weight), "bfloat16")
    assert panels.product(x.view(3, 100, inputs), None).shape == (3, 100, outputs)
    assert panels.product(x[:0], None).shape == (0, outputs)


def spread(inputs: int, outputs: int) -> Tensor:
    """Weights as a model has them, with some that are far from the others, no numbers among them."""
    draw = torch.Generator().manual_seed(inputs)
    weight_OI = (torch.randn(outputs, inputs, generator=draw) * 0.02).bfloat16()
    odd = torch.tensor([0.0, -0.0, 2.0**60, -(2.0**-60), 2.0**-130, 1e-9, torch.inf]).bfloat16()
    places = torch.randperm(weight_OI.numel(), generator=draw)[: weight_OI.numel() // 2000 + 2]
    weight_OI.view(-1)[places] = odd[torch.arange(len(places)) % len(odd)]
    return weight_OI


needs_packing = pytest.mark.skipif(native.missing() is not None or not packs(), reason="panels are not packed here")


@needs_packing
@pytest.mark.parametrize(("inputs", "outputs"), [(74, 48), (2100, 144), (2100, 267), (4102, 16), (2048, 784)])
def test_packed_panels_are_the_same_numbers_in_less(
    inputs: int, outputs: int, kernels: native.Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "library", lambda: kernels)
    weight = spread(inputs, outputs)
    matrix, panels = packed(weight), Panels.of(weight)
    assert isinstance(matrix, PackedPanels)
    assert matrix.nbytes < weight.nbytes * (0.79 if inputs > 100 else 0.85)
    escapes = matrix.heads[: 6 * -(-outputs // 16)][-2:].sum()
    assert matrix.nbytes == packed_bytes(outputs, inputs) + 8 * escapes, "what plans count, and the escapes"
    assert torch.equal(matrix.plain().view(torch.int16), weight.view(torch.int16))
    finite = matrix.renewed(torch.where(weight.isinf(), 1.0, weight))
    assert isinstance(finite, PackedPanels)
    plain = Panels.of(finite.plain())
    for rows in (*range(1, 26), 530, 300):
        x, _, bias = operands(rows, inputs, outputs)
        for added in (None, bias):
            assert torch.equal(finite.product(x, added), plain.product(x, added)), rows
        assert torch.equal(matrix.product(x, None).isfinite(), panels.product(x, None).isfinite()), rows
    apart = torch.randn(inputs, 7).bfloat16().T
    assert torch.equal(finite.product(apart, None), plain.product(apart, None))
    assert finite.product(x.view(3, 100, inputs), None).shape == (3, 100, outputs)
    assert finite.product(x[:0], None).shape == (0, outputs)


@needs_kernels
def test_plans_know_whether_panels_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZOO_UNPACKED", raising=False)
    assert compiled.packs() and packs()
    for way in native.LEVELS:
        monkeypatch.setenv("ZOO_NATIVE", way)
        assert compiled.packs()
    monkeypatch.setenv("ZOO_NATIVE", "off")
    assert not compiled.packs()
    monkeypatch.delenv("ZOO_NATIVE")
    monkeypatch.setenv("ZOO_UNPACKED", "1")
    assert not compiled.packs() and not packs()
    for known in (compiled.packs, packs):
        monkeypatch.setenv("ZOO_UNPACKED", "perhaps")
        with pytest.raises(ZooError, match="ZOO_UNPACKED: neither on nor off; found 'perhaps'"):
            assert known() and False


@needs_kernels
def test_plain_panels_stay_plain() -> None:
    """Where they are in use, they were asked for (ZOO_UNPACKED), or packing did not pay."""
    weight = spread(74, 48)
    renewed = Panels.of(weight).renewed(weight + 1)
    assert isinstance(renewed, Panels)
    assert torch.equal(renewed.plain(), weight + 1)


@needs_packing
@pytest.mark.parametrize("outputs", [144, 150])
def test_pieces_of_packed_panels(outputs: int) -> None:
    weight = spread(2100, outputs)
    matrix = packed(weight)
    for index in (
        (),
        (slice(3, 40),),
        (17,),
        (slice(0, 144, 5),),
        (slice(5, 5),),
        (slice(-3, None), slice(7)),
        (-1, 3),
    ):
        assert torch.equal(matrix.plain(index), weight[index]), index


@needs_packing
def test_what_lies_behind_the_last_row_is_not_packed() -> None:
    """Here rows of weights of all sizes: with them in the last panel the whole matrix would be stored plain."""
    weight = spread(2100, 160)
    weight[150:] = torch.randint(-(2**15), 2**15, (10, 2100), dtype=torch.int16).view(torch.bfloat16)
    found, expected = packed(weight[:150]), packed(weight[:150].clone())
    assert isinstance(found, PackedPanels) and isinstance(expected, PackedPanels)
    assert torch.equal(found.blocks, expected.blocks) and torch.equal(found.heads, expected.heads)


@needs_packing
@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("outputs", [144, 150])
def test_packed_panels_are_made_of_rows_in_any_order(outputs: int, odd: bool) -> None:
    """Where rows have weights of all sizes the whole matrix is stored plain."""
    weight = spread(2100, outputs)
    if odd:
        weight[50:52] = torch.randint(-(2**15), 2**15, (2, 2100), dtype=torch.int16).view(torch.bfloat16)
    filling = PackedFilling(weight.shape, weight.dtype)
    for first in (96, 32, 0, 16):
        filling.put(first, weight[first : None if first == 96 else first + (64 if first == 32 else 16)])
    made = filling.matrix()
    assert isinstance(made, Panels if odd else PackedPanels)
    assert torch.equal(made.plain().view(torch.int16), weight.view(torch.int16))
    if not odd:
        x, _, bias = operands(3, 2100, outputs)
        found, expected = made.product(x, bias), packed(weight).product(x, bias)
        assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


@needs_kernels
def test_rows_of_panels_do_not_depend_on_their_neighbours() -> None:
    x, weight, bias = operands(530, 2306, 80)
    panels = Panels.of(weight)
    alone = torch.cat([panels.product(row.unsqueeze(0), bias) for row in x])
    for rows in (2, 3, *range(8, 26), 100, 530):
        assert torch.equal(panels.product(x[:rows], bias), alone[:rows]), rows


@needs_kernels
@pytest.mark.parametrize("width", [16, 37, 2050])
def test_norms_equal_the_formula(width: int, close: Callable[..., None]) -> None:
    wide, weight = torch.randn(6, 3, width + 3).bfloat16() * 3, torch.randn(width).bfloat16()
    for x in (wide[..., :width], wide[:, 1, 1 : width + 1], wide.flatten()[: 4 * width].view(4, width)):
        close(small.rms(x, weight, 1e-5), rms_reference(x, weight, 1e-5), "bfloat16")
        once = rms_reference(x.float(), 1 + weight.float(), 1e-5)
        close(small.rms(x, weight, 1e-5, plus_one=True).float(), once, "bfloat16")
    for plus in (False, True):
        rows = wide[:, 0, :width]
        alone = torch.cat([small.rms(row.unsqueeze(0), weight, 1e-5, plus_one=plus) for row in rows])
        assert torch.equal(small.rms(rows, weight, 1e-5, plus_one=plus), alone)


@needs_kernels
@torch.no_grad()
def test_a_norm_whose_weight_is_stored_less_one_runs_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, x = RMSPlusOne(RMSPlusOneSpec(dim=37, eps=1e-3)).bfloat16(), torch.randn(5, 3, 37).bfloat16()
    norm.weight.normal_()
    found = norm(x)
    monkeypatch.setattr(small, "runs", lambda x: False)
    assert relative_error(found.float(), norm(x).float()) < 1e-3
    monkeypatch.setattr(small, "runs", lambda x: True)
    monkeypatch.setattr(small, "rms", lambda x, *_, plus_one: x if plus_one else None)
    assert norm(x) is x


@needs_kernels
@pytest.mark.parametrize("width", [16, 37, 2050])
@torch.no_grad()
def test_sums_and_their_norms_equal_the_formula(width: int) -> None:
    x, y = (torch.randn(5, 2 * width + 1).bfloat16()[:, at : at + width] for at in (0, width))
    norm = RMS(RMSSpec(dim=width, eps=1e-5)).bfloat16()
    norm.weight.copy_(torch.randn(width))
    expected, normed = x + y, norm(x + y)
    assert torch.equal(residual.added(x, y), expected)
    for found in (small.add_rms(x, y, norm.weight, 1e-5), residual.added_and_normed(x, y, norm)):
        assert torch.equal(found[0], expected)
        assert torch.equal(found[1], normed)
    norm.register_forward_hook(lambda *_: torch.zeros(1))
    assert residual.added_and_normed(x, y, norm)[1].shape == (1,), "hooks of the norm are heeded"


@needs_kernels
def test_gates_equal_the_formula(close: Callable[..., None]) -> None:
    x = torch.randn(7, 2 * 531).bfloat16() * 4
    x[0, :5] = torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4])
    expected = torch.nn.functional.silu(x[:, :531]) * x[:, 531:]
    close(small.gate(x), expected, "bfloat16")
    assert (small.gate(x) != expected).float().mean() < 0.01
    close(small.gate(x[::2]), expected[::2], "bfloat16")


@needs_kernels
def test_gates_of_extremes_are_the_formulas() -> None:
    extremes = torch.tensor(
        [-3e38, -1e20, -200, -89, 0, 89, 1e20, 3e38, float("nan"), float("inf"), -float("inf")]
    ).bfloat16()
    with torch.inference_mode():
        found = small.gate(torch.cat([extremes, torch.ones_like(extremes)])[None])[0]
    assert torch.equal(found.nan_to_num(7.0), F.silu(extremes).nan_to_num(7.0))
    assert torch.equal(found.isnan(), F.silu(extremes).isnan())
    numbers = ~found.isnan()
    assert torch.equal(found[numbers].signbit(), F.silu(extremes)[numbers].signbit())


@needs_kernels
@pytest.mark.parametrize("lanes", [40, 12])
def test_rotations_equal_the_formula(lanes: int, close: Callable[..., None]) -> None:
    x = torch.randn(5, 9, 40).bfloat16()[:, 2:8]
    angles = torch.randn(5, 1, lanes // 2)
    cos, sin = torch.cat((angles.cos(), angles.cos()), -1), torch.cat((-angles.sin(), angles.sin()), -1)
    with torch.enable_grad():
        close(small.rotate(x, cos, sin), rotate(x, (cos, sin)), "bfloat16")


@needs_dots
@pytest.mark.parametrize("window", [None, 1, 7, 30])
@pytest.mark.parametrize(("heads", "groups", "width"), [(6, 2, 48), (4, 4, 256), (32, 2, 16)])
def test_attention_of_prompts_equals_the_formula(
    heads: int, groups: int, width: int, window: int | None, close: Callable[..., None]
) -> None:
    slab = torch.randn(2, groups, 90, width).bfloat16()
    for rows, positions in ((1, 1), (3, 40), (17, 17), (21, 90), (40, 77)):
        q = torch.randn(rows, heads + 2, width).bfloat16()[:, :heads] * 2
        k, v = slab[:, :, :positions]
        expected = reference(q, k, v, 0.3, positions - rows, window, {})
        close(prompts.attend(q, k, v, 0.3, window), expected, "bfloat16")


@needs_dots
@pytest.mark.parametrize("window", [None, 30])
def test_attention_of_chunks_equals_that_of_the_prompt(window: int | None) -> None:
    q, slab = torch.randn(72, 6, 32).bfloat16(), torch.randn(2, 2, 100, 32).bfloat16()
    k, v = slab

    def chunk(rows: int, end: int) -> Tensor:
        return prompts.attend(q[end - rows : end], k[:, : 20 + end], v[:, : 20 + end], 0.3, window)

    whole = chunk(72, 72)
    for lengths in ([36, 36], [17, 38, 17], [1] * 72):
        chunks = [chunk(rows, end) for rows, end in zip(lengths, accumulate(lengths), strict=True)]
        assert torch.equal(torch.cat(chunks), whole), lengths


@needs_dots
def test_prompts_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    real = prompts.attend

    def noted(q: Tensor, *rest: Any) -> Tensor:
        used.append(len(q))
        return real(q, *rest)

    monkeypatch.setattr(prompts, "attend", noted)
    k = torch.randn(2, 40, 16).bfloat16()
    odd = torch.randn(2, 40, 17).bfloat16()
    with torch.inference_mode():
        for rows in (1, 16, 17):
            attention(torch.randn(rows, 4, 16).bfloat16(), k, k, scale=0.25, past=40 - rows, window=None)
        attention(torch.randn(20, 4, 17).bfloat16(), odd, odd, scale=0.25, past=20, window=None)
        attention(torch.randn(20, 4, 16), k.float(), k.float(), scale=0.25, past=20, window=None)
        monkeypatch.setenv("ZOO_ATTENTION", "sdpa")
        attention(torch.randn(20, 4, 16).bfloat16(), k, k, scale=0.25, past=20, window=None)
    assert used == [17]


@needs_kernels
def test_linear_maps_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = operands(3, 24, 17)
    layer = Linear(24, 17, bias=True).bfloat16()
    layer.load_state_dict({"weight": weight, "bias": bias})
    used: list[int] = []
    real = native.product

    def noted(x: Tensor, *rest: Tensor | None) -> Tensor:
        used.append(len(x))
        return real(x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(native, "product", noted)
    layer(x)
    layer.float()(x.float())
    assert not used
    with torch.inference_mode():
        assert torch.equal(layer.bfloat16()(x), real(x, weight, bias))
        layer.float()(x.float())
        layer.bfloat16()(x.T.contiguous().T)
    assert used == [3]


def test_switch(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_NATIVE", "off")
    assert native.missing() == "ZOO_NATIVE=off"
    assert read_limit() is None
    native.missing.cache_clear()
    monkeypatch.setenv("ZOO_NATIVE", "on")
    with pytest.raises(ZooError, match=r"ZOO_NATIVE.*'on'.*one of 'auto', 'off', 'multiply-add', 'dot', 'tiles'"):
        native.missing()


def test_absence_is_said(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZOO_NATIVE", raising=False)
    monkeypatch.setattr(native, "kernels_file", lambda: None)
    assert str(native.missing()).startswith("not built")


@needs_kernels
def test_older_kernels_are_left_out(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    path = kernels_file()
    assert path is not None
    monkeypatch.setitem(native._ARGUMENTS, "zoo_of_tomorrow", [])
    monkeypatch.setattr(native, "library", lambda: native.Kernels(path))
    assert native.missing() == "built from older sources than these, install zoo again"


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_other_processors_have_nothing_to_offer(tmp_path: Path) -> None:
    source = Path(native.__file__).parent / "kernels.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-DZOO_PLAIN", source, "-o", tmp_path / "kernels.so"], check=True)
    assert native.Kernels(tmp_path / "kernels.so").level == native.NONE


@needs_kernels
def test_kernels_that_err_are_left_out(
    fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = small.gate
    monkeypatch.setattr(small, "gate", lambda x: real(x) * 1.1)
    assert native.missing() == "on this processor gate is off by 1e-01"
    assert "left out" in caplog.text


@needs_kernels
def test_rates_are_of_a_memorys_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SHAPE", (64, 4096))
    rates = product_rates(0.001)
    assert rates.keys() == {"torch", "native"}
    for found in (*rates.values(), plain_read_rate(0.001, 1 << 20), read_limit(0.001, 1 << 22)):
        assert found is not None
        assert 1e7 < found < 1e13


def test_sources_are_beside_the_loader() -> None:
    assert (Path(native.__file__).parent / "kernels.c").is_file()


@needs_kernels
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 74), (16, 2), (160, 62), (32, 256), (45, 40)])
def test_panels_are_made_of_rows_in_any_order(outputs: int, inputs: int) -> None:
    _, weight_OI, _ = operands(1, inputs, outputs)
    filling = PanelsFilling(weight_OI.shape, weight_OI.dtype)
    for first in reversed(range(0, outputs, 16)):
        filling.put(first, weight_OI[first : first + 16])
    made = filling.matrix()
    assert torch.equal(made.words, words_reference(weight_OI))
    assert torch.equal(made.words, Panels.of(weight_OI).words)
    assert torch.equal(made.plain(), weight_OI)
