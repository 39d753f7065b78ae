"""Files read where the system has them: the same bytes, only while they are needed, and faults told by name."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from zoo.assemble import assemble
from zoo.components import linux
from zoo.components.kinds import KINDS, Kind
from zoo.components.matrix import values
from zoo.loading import mapped
from zoo.loading.files import locate
from zoo.loading.load import load_weights
from zoo.loading.mapped import Mapped
from zoo.loading.quantising import storing_of
from zoo.registry.errors import WeightsError
from zoo.registry.resolve import Plan

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="files are mapped on Linux")

Plans = Callable[..., Plan]
Names = Callable[[Plan], dict[str, tuple[int, ...]]]
Write = Callable[..., Path]

SIZE = 3 << 20


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "bytes"
    path.write_bytes(torch.arange(SIZE // 4, dtype=torch.int32).numpy().tobytes())
    return path


@pytest.fixture
def mapped_always(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Everything is worth a mapping. What was let go of, in bytes."""
    system, gone = linux.system(), []
    assert system is not None

    def madvise(first: int, length: int, advice: int) -> int:
        if advice == mmap.MADV_DONTNEED:
            gone.append(length)
        return int(system.madvise(first, length, advice))

    calls = SimpleNamespace(madvise=madvise, mmap=system.mmap, munmap=system.munmap)
    monkeypatch.setattr(mapped, "system", lambda: calls)
    monkeypatch.setattr(mapped, "LEAST", 1)
    return gone


def test_bytes_from_anywhere(file: Path, mapped_always: list[int]) -> None:
    whole = file.read_bytes()
    with file.open("rb", buffering=0) as opened:
        reader = Mapped(opened)
        for first, size in ((0, SIZE), (1, 5), (4095, 2), (SIZE - 1, 1), (777_777, 2 << 20)):
            found = reader.read(first, size)
            assert found is not None
            assert ctypes.string_at(found, size) == whole[first : first + size]
        assert reader.read(1, SIZE) is None
        assert len(mapped_always) == 4  # each time the part before was let go of
        reader.let_go()
        assert len(mapped_always) == 5
        reader.close()
        assert reader.read(0, SIZE) is None


def test_few_bytes_are_read_otherwise(file: Path) -> None:
    with file.open("rb", buffering=0) as opened:
        reader = Mapped(opened)
        assert reader.read(0, mapped.LEAST) is not None
        assert reader.read(0, mapped.LEAST - 1) is None
        reader.close()


def maps_of(file: Path) -> int:
    """Mappings of a file that this process has."""
    return Path("/proc/self/maps").read_text(encoding="utf-8").count(str(file))


def test_a_closed_file_is_not_mapped(file: Path) -> None:
    with file.open("rb", buffering=0) as opened:
        reader = Mapped(opened)
        assert maps_of(file) == 1
        reader.close()
        reader.close()
        assert maps_of(file) == 0


def test_a_file_that_shrinks_while_it_is_mapped(file: Path, mapped_always: list[int]) -> None:
    with file.open("rb", buffering=0) as opened:
        reader = Mapped(opened)
        os.truncate(file, 4096)
        assert reader.read(0, SIZE) is None
        assert reader.read(0, 4096) is not None
        reader.close()


@pytest.mark.parametrize("without", ["mmap", "madvise", "system"])
def test_systems_that_map_nothing(file: Path, monkeypatch: pytest.MonkeyPatch, without: str) -> None:
    system = linux.system()
    assert system is not None
    answers = {"mmap": lambda *given: mapped._FAILED, "madvise": lambda *given: -1}
    calls = SimpleNamespace(mmap=system.mmap, madvise=system.madvise, munmap=system.munmap)
    if without in answers:
        setattr(calls, without, answers[without])
    monkeypatch.setattr(mapped, "system", lambda: None if without == "system" else calls)
    monkeypatch.setattr(mapped, "LEAST", 1)
    with file.open("rb", buffering=0) as opened:
        reader = Mapped(opened)
        assert reader.read(0, SIZE) is None
        assert maps_of(file) == 0
        reader.close()


def test_an_empty_file(file: Path, mapped_always: list[int]) -> None:
    os.truncate(file, 0)
    with file.open("rb", buffering=0) as opened:
        assert Mapped(opened).read(0, 0) is None


@pytest.mark.parametrize("kind", [None, *KINDS.values()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_the_same(
    tmp_path: Path,
    plan_of: Plans,
    native_names: Names,
    save: Write,
    mapped_always: list[int],
    kind: Kind | None,
    dtype: torch.dtype,
) -> None:
    plan, both = plan_of(), []
    save(tmp_path / "w.safetensors", native_names(plan), torch.bfloat16)
    for least in (1 << 20, 1):
        mapped.LEAST = least  # the fixture's monkeypatch puts it back
        module = assemble(plan, dtype)
        load_weights(module, plan, locate(tmp_path), storing=storing_of(plan, kind, torch.device("cpu")))
        both.append([values(module, tensor.param, tensor.index) for tensor in plan.model.tensors()])
        assert bool(mapped_always) == (least == 1)
    assert all(torch.equal(*pair) for pair in zip(*both, strict=True))


def test_weights_of_a_file_that_shrinks(
    tmp_path: Path,
    plan_of: Plans,
    native_names: Names,
    save: Write,
    mapped_always: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan, read = plan_of(), Mapped.read
    file = save(tmp_path / "w.safetensors", native_names(plan))

    def cut(self: Mapped, offset: int, size: int) -> int | None:
        os.truncate(file, 8192)
        return read(self, offset, size)

    monkeypatch.setattr(Mapped, "read", cut)
    with pytest.raises(WeightsError, match=r"cannot read tensor .*; found it ends \d+ bytes too early"):
        load_weights(assemble(plan, torch.float32), plan, locate(tmp_path))
