"""The script of the GPU's gates runs to its end; what it measures without a GPU says nothing."""

from __future__ import annotations

import json
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks import gpu_kernels, on_gpu
from zoo.engine.engine import Engine

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the script itself can be run here")


def run(path: Path, *options: str) -> dict[str, Any]:
    on_gpu.main(["--small", "--out", str(path), *options])
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are recorded, over pages."""
    monkeypatch.setattr(Engine, "__init__", partialmethod(Engine.__init__, storage="pages"))
    monkeypatch.setenv("ZOO_CAPTURE", "on")


def test_all_parts_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(tmp_path / "gpu.json")
    assert found["left_out"] == {}
    assert set(found["versions"]) == {"zoo", "torch", "transformers"}
    for name in ("dense", "mixture", "recurrent"):
        assert set(found[name]["decode"]) == {"1", "3"}
        for one in (*found[name]["decode"].values(), found[name]["prefill"]):
            assert one["share"] == pytest.approx(one["roofline_seconds"] / one["seconds"])
        step = found[name]["decode"]["1"]
        assert step["between_microseconds"] == pytest.approx(1e6 * (step["seconds"] - step["replay_seconds"]))
        assert found[name]["transformers"]["1"]["tokens_per_second"] > 0
    assert set(found["attention"]) == {"1x20", "3x33"}
    assert set(found["products"]) == {"gate_up 1", "gate_up 5"}
    text = capsys.readouterr().out
    assert text == on_gpu.table(found)
    on_gpu.main(["--table", str(tmp_path / "gpu.json")])
    assert capsys.readouterr().out == text
    assert text.count("| dense | decode, ") == 2
    assert "| mixture, 64 sequences | 70% | - | not measured | - | 1900 tokens/s |" in text


def test_what_there_is_no_time_for_is_said(tmp_path: Path) -> None:
    found = run(tmp_path / "gpu.json", "--only", "dense", "--seconds", "4")
    assert set(found["left_out"]) == {"limits"}
    assert "seconds were left and it takes some 5" in found["left_out"]["limits"]


def test_what_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*rest: Any) -> None:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(gpu_kernels, "products", fails)
    found = run(tmp_path / "gpu.json", "--only", "kernels")
    assert found["left_out"] == {"products": "RuntimeError: out of"}
    assert found["attention"] and found["experts_ms"]


def test_gates_are_judged() -> None:
    step = {"share": 0.86, "between_microseconds": 41.0, "tokens_per_second": 260.0}
    data = {"dense": {"decode": {"1": step, "64": step | {"share": 0.7}}}}
    verdicts = {one["gate"]: one for one in on_gpu.judged(data)}
    assert verdicts["dense, 1 sequence"]["passed"] is True
    assert verdicts["dense, 64 sequences"]["passed"] is False
    assert verdicts["microseconds between steps, 1 sequence"]["passed"] is False
    assert verdicts["dense, 256 sequences"]["passed"] is None
    assert verdicts["dense, 1 sequence"]["tokens_per_second"] == 260.0
