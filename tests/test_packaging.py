"""What an installed zoo holds: the wheel, unpacked far from the sources, with nothing but its dependencies."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"zoo": "zoo", "zoo/registry": "registry", "zoo/components": "components", "zoo/cards": "cards"}
NOT_SHIPPED = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so", "*.pyd")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _built(tmp_path_factory.mktemp("wheel"))


def _built(place: Path, **environment: str) -> Path:
    """A wheel built from a copy of the sources, without network and without leaving files beside them."""
    tree, out = place / "tree", place / "out"
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, tree / folder, ignore=NOT_SHIPPED)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree / file)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command = [*pip, "--wheel-dir", str(out), str(tree)]
    built = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert built.returncode == 0, built.stderr
    return next(out.glob("zoo_inference-*.whl"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def _python(site: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=site, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_wheel_holds_every_file_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        f"{inside}/{file.relative_to(ROOT / folder).as_posix()}"
        for inside, folder in FOLDERS.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and file.suffix not in (".so", ".pyd")
    }
    built = {name for name in names if name.startswith("zoo/components/native/kernels.") and not name.endswith(".c")}
    assert names - built == expected
    assert len(built) == (1 if shutil.which("cc") else 0)


NATIVE = "from zoo.components import native; print(native.missing())"


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_wheel_brings_its_kernels(site: Path) -> None:
    assert _python(site, "-c", NATIVE).strip() in ("None", "this processor has no AVX-512")


def test_without_a_compiler_a_wheel_has_no_kernels(tmp_path: Path) -> None:
    wheel = _built(tmp_path, CC="no-such-compiler")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert _python(tmp_path / "site", "-c", NATIVE).startswith("not built")


def test_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 16 * 2**20


def test_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    text = archive.read(info).decode()
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Python: >=3.11" in text
    assert not re.search(r"^Requires-Dist: xformers(?!.*extra)", text, re.MULTILINE)
    assert b"zoo = zoo.__main__:main" in archive.read(info.replace("METADATA", "entry_points.txt"))


def test_unpacked_wheel_is_one_package(site: Path) -> None:
    """Parts that a wheel forgot would be found in the sources, so each says where it came from."""
    code = (
        "import zoo, zoo.registry, zoo.components, zoo.cards\n"
        "for module in (zoo, zoo.registry, zoo.components, zoo.cards): print(module.__file__)\n"
        "print(len(zoo.list()))"
    )
    *files, cards = _python(site, "-c", code).splitlines()
    assert all(Path(file).is_relative_to(site) for file in files)
    assert int(cards) == len(list((ROOT / "cards").rglob("*.yaml")))


def test_unpacked_wheel_lists_its_cards(site: Path) -> None:
    listed = _python(site, "-c", "import sys; from zoo.cli import main; sys.argv = ['zoo', 'list']; main()")
    assert all(file.stem in listed for file in (ROOT / "cards").rglob("*.yaml"))


def test_constraints_pin_every_dependency() -> None:
    """`make run` installs exact versions, within the ranges that pyproject.toml gives."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if not line.startswith("#"))
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    for line in [*project["dependencies"], *extras]:
        found = re.fullmatch(r"([\w-]+)(?:\[\w+\])?(?:>=([\d.]+))?", line)
        assert found, line
        pin = pins[found[1].lower().replace("_", "-")]
        assert _version(pin) >= _version(found[2] or "0"), line


def _version(text: str) -> list[int]:
    return [int(part) for part in text.split(".")]
