"""Products by tiles, on an emulation of the processor's tile operations (emulated_tiles.h), and by multiply-adds.

The emulation shows that the kernels are right where the operations do what Intel describes. Their speed, and whether a
real processor rounds as it is described, only such a processor can show: `check.settle_tiles` looks there.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.cli import system
from zoo.components import native
from zoo.components.compiled import kernels_file
from zoo.components.kinds import INT4, KINDS, Kind
from zoo.components.native import check, measure, quantised
from zoo.components.native.panels import PackedPanels, Panels, packed
from zoo.components.quantised import Quantised
from zoo.registry.errors import ZooError

needs_kernels = pytest.mark.skipif(native.missing() is not None, reason=f"no native kernels: {native.missing()}")
needs_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
needs_eight_bits = pytest.mark.skipif(not quantised.there(), reason="a processor without AVX-512 VNNI")
pytestmark = [needs_kernels, needs_compiler]

SOURCES = Path(native.__file__).parent
FAULTS, THREADS, PRODUCTS = range(3)


@pytest.fixture(scope="session")
def emulated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All sources, with tile operations in plain C."""
    path = tmp_path_factory.mktemp("tiles") / "kernels.so"
    header = Path(__file__).parent / "emulated_tiles.h"
    flags = ["-O1", "-fopenmp", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", f'-DZOO_EMULATED="{header}"']
    subprocess.run(["cc", *flags, *sorted(SOURCES.glob("*.c")), "-lm", "-o", path], check=True)
    return path


@pytest.fixture
def tiles(emulated_file: Path) -> Iterator[native.Kernels]:
    """Products by tiles of any number of rows. No operation may have been one that a processor refuses."""
    kernels = native.Kernels(emulated_file, native.TILES)
    kernels.single = 0
    before = kernels.handle.zoo_emulated(PRODUCTS)
    yield kernels
    assert kernels.handle.zoo_emulated(PRODUCTS) > before
    assert kernels.handle.zoo_emulated(FAULTS) == 0
    assert kernels.handle.zoo_emulated(THREADS) == 0, "tiles were not released"


@pytest.fixture
def multiply_adds() -> native.Kernels:
    path = kernels_file()
    assert path is not None
    return native.Kernels(path, native.MULTIPLY_ADD)


def operands(rows: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(rows)
    sizes = ((rows, inputs), (outputs, inputs), (outputs,))
    x, weight, bias = (torch.randn(size, generator=draw).bfloat16() for size in sizes)
    return x, weight, bias


def surrounded(weight_OI: Tensor) -> Tensor:
    """The same panels between values that are no numbers, so that reading too far is seen."""
    words = Panels.of(weight_OI).words
    room = torch.full((words.numel() + 2 * 4096,), -1, dtype=torch.int32)
    inner = room[4096:-4096].view(words.shape)
    inner.copy_(words)
    return inner


@pytest.mark.parametrize(("inputs", "outputs"), [(2, 16), (32, 32), (74, 48), (96, 40), (1100, 304)])
def test_products_by_tiles_equal_the_formula(
    inputs: int, outputs: int, tiles: native.Kernels, close: Callable[..., None]
) -> None:
    for rows in (*range(1, 71), 300) if inputs < 100 else (1, 16, 33, 64, 270):
        x, weight, bias = operands(rows, inputs, outputs)
        words, apart = surrounded(weight), torch.full((rows, inputs + 3), torch.nan, dtype=x.dtype)
        apart[:, :inputs] = x
        for added in (None, bias):
            found = tiles.panels(apart[:, :inputs], words, outputs, added)
            close(found, native.product_reference(x, weight, added), "bfloat16")


def test_nothing_is_left_of_the_product_before(tiles: native.Kernels) -> None:
    x, weight, _ = operands(5, 62, 16)
    assert tiles.panels(x, Panels.of(weight * torch.nan).words, 16, None).isnan().all()
    assert tiles.panels(x[:, :34], Panels.of(weight[:, :34].contiguous()).words, 16, None).isfinite().all()


@pytest.mark.parametrize(("inputs", "outputs"), [(2, 16), (74, 48), (74, 41), (2100, 416)])
def test_products_by_multiply_adds_equal_the_formula(
    inputs: int, outputs: int, multiply_adds: native.Kernels, close: Callable[..., None]
) -> None:
    for rows in (*range(1, 10), 300):
        x, weight, bias = operands(rows, inputs, outputs)
        words, apart = surrounded(weight), torch.full((rows, inputs + 3), torch.nan, dtype=x.dtype)
        apart[:, :inputs] = x
        for added in (None, bias):
            found = multiply_adds.panels(apart[:, :inputs], words, outputs, added)
            close(found, native.product_reference(x, weight, added), "bfloat16")


@pytest.mark.parametrize(("inputs", "outputs"), [(70, 80), (1100, 48)])
def test_a_row_is_the_same_by_tiles_and_by_multiply_adds(
    inputs: int, outputs: int, tiles: native.Kernels, multiply_adds: native.Kernels
) -> None:
    x, weight, _ = operands(41, inputs, outputs)
    x[3], x[7, :5], weight[2, 4:9] = x[3] * 1e-38, 1e-40, 1e-39
    x[11] *= 1e-25
    weight[5] *= 1e-18
    x[13], weight[6] = 1e-39, weight[6] * 1e12
    x[20, 3], weight[9, 6] = torch.inf, torch.nan
    words = Panels.of(weight).words
    alone = torch.cat([multiply_adds.panels(row.unsqueeze(0), words, outputs, None) for row in x])
    for rows in (1, 2, 4, 5, 16, 17, 32, 33, 41):
        for kernels in (tiles, multiply_adds):
            found = kernels.panels(x[:rows], words, outputs, None)
            assert torch.equal(found.view(torch.int16), alone[:rows].view(torch.int16)), (rows, kernels.level)


PLACES = [(0, 0), (-1, -1), (1, 0), (0, 1), (-1, -2), (-2, 511), (3, 512), (3, 2047), (5, 2048)]


def scarce(inputs: int, outputs: int) -> Tensor:
    """Weights of fifteen upper bytes, and some with another one: the first and the last weight, several of a pair, of a
    line and of a block, those at the borders of what is unpacked at once; among them zeros and subnormal numbers."""
    draw = torch.Generator().manual_seed(inputs)
    usual = torch.tensor([*range(0x38, 0x40), *range(0xB8, 0xBF)])
    upper, lower = (torch.randint(most, (outputs, inputs), generator=draw) for most in (len(usual), 256))
    weight_OI = (usual[upper] << 8 | lower).to(torch.uint16).view(torch.bfloat16)
    odd = torch.tensor([2.0**60, -1e-39, -0.0, 2.0**-60, 1e-39, 0.0, -(2.0**-30)]).bfloat16()
    for at, (output, column) in enumerate(PLACES if inputs > 100 else PLACES[:3]):
        if abs(column) < inputs:
            weight_OI[output, column] = odd[at % len(odd)]
    return weight_OI


def kept(matrix: PackedPanels) -> tuple[Tensor, Tensor]:
    """Its blocks and heads between values that are nobody's, so that reading too far is seen."""
    parts = []
    for part in (matrix.blocks, matrix.heads):
        room = torch.full((part.numel() + 2 * 4096,), 119, dtype=part.dtype)
        room[4096:-4096] = part.flatten()
        parts.append(room[4096:-4096])
    return parts[0], parts[1]


@pytest.mark.parametrize(("inputs", "outputs"), [(66, 16), (74, 41), (224, 144), (1100, 302), (2062, 416)])
@pytest.mark.parametrize("way", ["tiles", "multiply_adds"])
def test_packed_panels_give_the_same_bits(way: str, inputs: int, outputs: int, request: pytest.FixtureRequest) -> None:
    kernels, weight = request.getfixturevalue(way), scarce(inputs, outputs)
    matrix, words = packed(weight), surrounded(weight)
    assert isinstance(matrix, PackedPanels)
    assert matrix.heads.numel() >= 6 * -(-outputs // 16) + 2 * 3, "of each panel a head, and some escapes"
    blocks, heads = kept(matrix)
    for rows in (*range(1, 36), 257, 600) if inputs < 100 else (1, 2, 3, 4, 5, 8, 9, 16, 33, 270):
        x, _, bias = operands(rows, inputs, outputs)
        apart = torch.full((rows, inputs + 3), torch.nan, dtype=x.dtype)
        apart[:, :inputs] = x
        for added in (None, bias):
            found, expected = (
                kernels.panels(apart[:, :inputs], stored, outputs, added, own).view(torch.int16)
                for stored, own in ((blocks, heads), (words, None))
            )
            assert torch.equal(found, expected), rows


def test_threads_share_panels(tiles: native.Kernels, multiply_adds: native.Kernels) -> None:
    x, weight, bias = operands(40, 640, 528)
    words, threads = Panels.of(weight).words, torch.get_num_threads()
    matrix, found = packed(weight), []
    assert isinstance(matrix, PackedPanels)
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            for kernels in (tiles, multiply_adds):
                found.append(kernels.panels(x, words, 528, bias))
                found.append(kernels.panels(x, matrix.blocks, 528, bias, matrix.heads))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, found[0]) for one in found)


def test_numbers_of_other_computations_keep_their_small_ones(multiply_adds: native.Kernels) -> None:
    x, weight, _ = operands(9, 640, 528)
    multiply_adds.panels(x, Panels.of(weight).words, 528, None)
    assert (torch.full((4096,), 1e-39) * 0.5).count_nonzero() == 4096


def test_few_rows_are_multiply_adds_where_there_are_tiles(tiles: native.Kernels) -> None:
    tiles.single = native.SINGLE
    x, weight, _ = operands(9, 64, 32)
    words, used = Panels.of(weight).words, []
    for rows in range(10):
        before = tiles.handle.zoo_emulated(PRODUCTS)
        tiles.panels(x[:rows], words, 32, None)
        used.append(tiles.handle.zoo_emulated(PRODUCTS) > before)
    assert used == [False] * 5 + [True] * 5


@pytest.mark.parametrize(("off", "level", "single"), [(0.0, native.TILES, 4), (2e-3, native.TILES, 0), (0.1, 1, 4)])
def test_tiles_are_checked_where_they_are_first_used(
    off: float, level: int, single: int, tiles: native.Kernels, caplog: pytest.LogCaptureFixture
) -> None:
    """Wrong ones are left out. Where they round otherwise than multiply-adds, they take few rows as well."""
    real = tiles.panels
    tiles.single = native.SINGLE

    def altered(x: Tensor, *rest: Any) -> Tensor:
        by_tiles = tiles.level == native.TILES and len(x) > tiles.single
        return real(x, *rest) * (1 + off * by_tiles)

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(tiles, "panels", altered)
        check.settle_tiles(tiles)
    assert (tiles.level, tiles.single) == (level, single)
    assert ("are left out" in caplog.text) == (level == native.MULTIPLY_ADD)


def test_levels_are_chosen(multiply_adds: native.Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    native.missing.cache_clear()
    monkeypatch.setenv("ZOO_NATIVE", "multiply-add")
    monkeypatch.setattr(native, "library", lambda: multiply_adds)
    multiply_adds.level = native.DOT
    try:
        assert native.missing() is None
        assert multiply_adds.level == native.MULTIPLY_ADD
        native.missing.cache_clear()
        monkeypatch.setenv("ZOO_NATIVE", "tiles")
        with pytest.raises(ZooError, match=r"ZOO_NATIVE: this processor has no such products; found 'tiles'"):
            native.missing()
    finally:
        monkeypatch.undo()
        native.missing.cache_clear()
        assert native.missing() is None


@pytest.fixture
def coded(tiles: native.Kernels, monkeypatch: pytest.MonkeyPatch) -> native.Kernels:
    """Products of quantised weights are those of the emulation."""
    monkeypatch.setattr(native, "library", lambda: tiles)
    library = quantised._library.__wrapped__()
    monkeypatch.setattr(quantised, "_library", lambda: library)
    monkeypatch.setattr(quantised, "by_tiles", lambda: True)
    return tiles


@needs_eight_bits
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("inputs", "outputs"), [(5, 7), (40, 33), (96, 48), (300, 130), (2100, 80)])
def test_codes_give_the_same_by_tiles(kind: Kind, inputs: int, outputs: int, coded: native.Kernels) -> None:
    made = Quantised.of(kind, torch.randn(outputs, inputs))
    for rows in (*range(9, 71), 300) if inputs < 50 else (9, 16, 33, 64, 270):
        x, _, bias = operands(rows, inputs, outputs)
        x[rows // 2, inputs // 2] = torch.nan
        for dtype in (torch.bfloat16, torch.float32):
            given = (kind, made.codes, made.scales, made.shape, x.to(dtype), bias.to(dtype))
            plain, tiled = (quantised._product(*given, tiled) for tiled in (False, True))
            assert plain[-1].isfinite().all() and plain[rows // 2].isnan().all()
            assert torch.equal(tiled.nan_to_num(), plain.nan_to_num()), rows


@needs_eight_bits
def test_many_rows_of_codes_use_tiles(coded: native.Kernels) -> None:
    made, used = Quantised.of(INT4, torch.randn(20, 40)), []
    for rows in (0, 1, 8, 9):
        before = coded.handle.zoo_emulated(PRODUCTS)
        quantised.product(made.kind, made.codes, made.scales, made.shape, torch.randn(rows, 40), None)
        used.append(coded.handle.zoo_emulated(PRODUCTS) > before)
    assert used == [False, False, False, True]


@needs_eight_bits
def test_tiles_of_codes_are_checked_where_they_are_first_used(
    tiles: native.Kernels, coded: native.Kernels, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(native, "library", lambda: tiles)
    library, real = quantised._library.__wrapped__(), quantised._product
    monkeypatch.setattr(quantised, "_library", lambda: library)
    assert quantised.by_tiles.__wrapped__()
    monkeypatch.setattr(quantised, "_product", lambda *given: real(*given) * (1 + 1e-6 * given[-1]))
    with caplog.at_level(logging.WARNING):
        assert not quantised.by_tiles.__wrapped__()
    assert "int8 weights by tiles are wrong on this processor and are left out" in caplog.text
    tiles.level = native.MULTIPLY_ADD
    assert not quantised.by_tiles.__wrapped__()


@pytest.mark.parametrize(
    ("level", "single", "way"),
    [
        (native.MULTIPLY_ADD, 4, "by multiply-adds of AVX-512: one"),
        (native.TILES, 4, "by AMX tiles, up to 4 rows by multiply-adds: one"),
        (native.TILES, 0, "by AMX tiles: one"),
    ],
)
def test_doctor_names_the_way(
    level: int, single: int, way: str, multiply_adds: native.Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    multiply_adds.level, multiply_adds.single = level, single
    monkeypatch.setattr(native, "library", lambda: multiply_adds)
    monkeypatch.setattr(measure, "product_rates", lambda: {"native": 5e9, "torch": 4e9})
    assert system._native().startswith(way)
