"""Whether the kernels in C were built, and what is said where they were not."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest

from zoo.cli import system
from zoo.components import compiled, native, quantised
from zoo.components.native import attention, measure
from zoo.components.native import quantised as native_quantised
from zoo.device import choose

ROOT = Path(__file__).parent.parent.parent
needs_compiler = pytest.mark.skipif(compiled.compiler() is None, reason="no C compiler")


@needs_compiler
def test_an_installation_with_a_compiler_has_its_kernels() -> None:
    """Nothing here is skipped quietly: other tests of the kernels are, where these are not there."""
    assert compiled.kernels_file() is not None or compiled.unbuilt() is None, compiled.unbuilt()
    if "ZOO_NATIVE" not in os.environ:
        assert native.missing() in (None, native.PLAIN)
        assert attention.missing() == native.missing()
        assert quantised.is_native() == native_quantised.there()


def test_they_are_built_as_an_installation_does() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (extension,) = project["tool"]["setuptools"]["ext-modules"]
    assert tuple(extension["extra-compile-args"]) == compiled.FLAGS
    assert {ROOT / file for file in extension["sources"]} == {*(ROOT / "components/native").glob("*.c")}


@pytest.fixture
def unbuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of sources from which nothing was built yet."""
    monkeypatch.setattr(compiled, "FOLDER", tmp_path)
    monkeypatch.setattr(compiled, "FLAGS", ())
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    (tmp_path / "kernels.c").write_text("int zoo_level(void) { return 1; }\n")
    return tmp_path


def test_no_compiler_is_said(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -pthread")
    assert str(compiled.unbuilt()).startswith("there is no C compiler")


def test_nothing_is_missed_on_other_processors(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert compiled.unbuilt() is None


@needs_compiler
def test_what_the_compiler_says_is_said(unbuilt: Path) -> None:
    assert "install zoo again" in str(compiled.unbuilt())
    (unbuilt / "more.c").write_text("int twice(int x) { return 2 * y; }\n")
    assert "error: 'y' undeclared" in str(compiled.unbuilt()).replace("‘", "'").replace("’", "'")


def test_a_load_and_the_doctor_tell_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "unusable", lambda: native.NOT_BUILT)
    monkeypatch.setattr(native, "missing", native.unusable)
    monkeypatch.setattr(system, "unbuilt", lambda: "cc fails on them: kernels.c:1: error: no")
    monkeypatch.setattr(measure, "product_rates", lambda: {"torch": 4e9})
    monkeypatch.setattr(measure, "plain_read_rate", lambda: 8e9)
    assert "not built" in choose("cpu", "bfloat16", "bfloat16").note
    assert system._native().startswith("not built: cc fails on them: kernels.c:1: error: no; one token reads")


@pytest.mark.parametrize("reason", [native.OFF, native.PLAIN])
def test_nobody_is_told_of_what_was_asked_for_or_cannot_be(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "unusable", lambda: reason)
    assert choose("cpu", "auto", "bfloat16").note == "cpu, bfloat16"
