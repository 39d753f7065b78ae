"""The check of predictions: what is kept of earlier results, what is judged, and how it is shown."""

from typing import Any

import pytest
import torch

from tests.benchmarks import prediction
from zoo.bench import machine
from zoo.bench.limits import machine_limits
from zoo.bench.shapes import MAMBA2, gated
from zoo.costs.profile import Key, Pace, Profile, Speed


def row(shape: str, form: str, ratio: float, steady: bool = True) -> dict[str, Any]:
    about = {"shape": shape, "format": form, "parameters": 310_000_000, "fitted": shape == "dense"}
    case = {
        "measured": "2026-11-28T01:02:03",
        "memory": 4e10,
        "steady": steady,
        "kind": "decode",
        "batch": 8,
        "context": 79,
    }
    return about | case | {"measured_s": 0.0168, "predicted_s": 0.0168 * ratio, "ratio": ratio}


def test_new_rows_take_the_place_of_old_ones() -> None:
    old = [row("dense", "bfloat16", 1.0), row("wide", "int8", 1.0), row("wide", "bfloat16", 1.0)]
    found = prediction.merged(old, [row("wide", "int8", 1.1)])
    told = [(r["shape"], r["format"], r["ratio"]) for r in found]
    assert told == [("dense", "bfloat16", 1.0), ("wide", "bfloat16", 1.0), ("wide", "int8", 1.1)]


def test_the_page_tells_what_holds_and_leaves_out_another_memory() -> None:
    rows = [row("dense", "bfloat16", 1.2), row("wide", "bfloat16", 1.3), row("wide", "int8", 0.5, steady=False)]
    key = {"processor": "A processor", "cores": 2, "torch": "2.13.0"}
    page = "before\n<!-- predictions: written by hand -->\nof last year\n<!-- end of predictions -->\nafter\n"
    told = prediction.report({"rows": rows, "machine": {"key": key}}, page)
    assert "last year" not in told and told.startswith("before\n") and told.endswith("\nafter\n")
    assert "1 of 2 hold, others (in brackets) met memory that changed meanwhile." in told
    assert "| dense | 310 M | a step after 79 | 8 | 16.8 ms, 1.20 |" in told
    assert "| wide | 310 M | a step after 79 | 8 | 16.8 ms, **1.30** | 16.8 ms, (0.50) |" in told


def test_a_shape_is_measured_beside_its_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small: the figures mean nothing."""
    for name, value in {"PROMPT": 40, "SHORT": 8, "FAR": 60, "STEPS": 2}.items():
        monkeypatch.setattr(prediction, name, value)
    small = prediction.Shape(64, 2, MAMBA2 | {"num_heads": 4, "head_dim": 16, "state_size": 16}, gated(128), 300)
    monkeypatch.setitem(prediction.SHAPES, "wide", small)
    limits = machine_limits(torch.device("cpu"), 1 << 20, 64, 1)
    monkeypatch.setattr(machine, "SHAPES", ((64, 64),))
    monkeypatch.setattr(machine, "WEIGHTS", 1 << 13)
    speed = Speed(
        memory={"plain": 1e9},
        products={"plain": machine.times_of_products(torch.device("cpu"), torch.bfloat16)},
        elements=1e9,
        step_s=1e-4,
        sequence_s=0.0,
        paces={"mamba2": Pace(call_s=1e-5, item_s=0.0, read=1e9, multiply=1e9)},
    )
    known = Profile(key=Key.here(), measured="2026-11-28", seconds=1.0, limits=limits, speeds={"bfloat16": speed})
    rates = iter([3.0e10, 4.5e10, 4.6e10, 4.4e10, 3e10, 3e10, *[6e10, 4e10] * 6])
    rows = [*prediction.compare("wide", known, "bfloat16", lambda: next(rates))]
    assert [(r["kind"], r["batch"]) for r in rows] == [("prefill", 1), ("decode", 1), ("decode", 8), ("decode", 1)]
    assert all(r["ratio"] == pytest.approx(r["predicted_s"] / r["measured_s"]) for r in rows)
    met = [(r["memory"], r["steady"]) for r in rows]
    assert met == [(4.5e10, True), (3e10, True), (5e10, False), (5e10, False)]
    steps = [r["terms"]["products"] for r in rows if r["batch"] == 1 and r["kind"] == "decode"]
    assert steps[0] > steps[1], "of the same products, beside memory of 30 and of 50 GB/s"
    assert all(map(prediction.line, rows))
