"""Archives of torch.save: tensors only, and nothing from them runs."""

from __future__ import annotations

import fractions
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo.loading.pickled import open_archive
from zoo.loading.reader import read_headers
from zoo.registry.errors import WeightsError


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def saved(path: Path, data: Any) -> Path:
    torch.save(data, path)
    return path


def test_headers_of_an_archive(tmp_path: Path) -> None:
    data = {"x": torch.arange(6.0).reshape(2, 3), "y": torch.ones(5, dtype=torch.bfloat16)}
    file = saved(tmp_path / "consolidated.00.pth", data)
    found = read_headers(file)
    assert {n: (i.shape, i.dtype, i.nbytes) for n, i in found.items()} == {
        "x": ((2, 3), "F32", 24),
        "y": ((5,), "BF16", 10),
    }
    assert all(info.pickled for info in found.values())
    assert found["x"].start < found["y"].start
    assert torch.equal(open_archive(file)["x"], data["x"])


def test_code_in_an_archive_is_refused_by_name_and_does_not_run(tmp_path: Path) -> None:
    file = saved(tmp_path / "w.pth", {"x": torch.ones(2), "y": Bomb(tmp_path / "made")})
    with pytest.raises(WeightsError, match=r"could run code; found (posix|nt)\.mkdir; expected a dict"):
        read_headers(file)
    assert not (tmp_path / "made").exists()


def test_harmless_but_foreign_objects_are_refused_by_name(tmp_path: Path) -> None:
    file = saved(tmp_path / "w.pth", {"x": fractions.Fraction(1, 2)})
    with pytest.raises(WeightsError, match=r"found fractions\.Fraction"):
        read_headers(file)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([torch.ones(2)], "not a table of tensors; found a list"),
        ({"epoch": 3, "x": torch.ones(2)}, "'epoch' is a int; expected names and tensors only"),
        ({1: torch.ones(2)}, "1 is a Tensor"),
    ],
)
def test_archives_that_are_no_table(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(WeightsError) as caught:
        read_headers(saved(tmp_path / "w.pth", data))
    assert message in str(caught.value)


def test_cut_archive(tmp_path: Path) -> None:
    file = saved(tmp_path / "w.pth", {"x": torch.ones(1000)})
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(WeightsError, match="cut off or damaged; found 2000 bytes"):
        read_headers(file)


def test_a_zip_that_torch_did_not_write(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(WeightsError, match=r"not a whole archive of torch\.save"):
        read_headers(tmp_path / "w.pth")
