"""Measuring a machine: what is found, with sizes so small that it takes a moment."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from zoo.bench import machine, suite
from zoo.bench.limits import machine_limits, reading
from zoo.bench.shapes import MIXERS
from zoo.costs.profile import Profile


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> tuple[Profile, list[str]]:
    monkeypatch.setattr(machine, "machine_limits", lambda device: machine_limits(device, 1 << 20, 64, 1))
    monkeypatch.setattr(machine, "reading", partial(reading, total_bytes=1 << 20))
    for name, value in {"SHAPES": ((64, 64),), "ROWS": (1, 4), "WEIGHTS": 1 << 13, "WIDE": (4, 16, 32)}.items():
        monkeypatch.setattr(machine, name, value)
    for name, value in {"DIM": 32, "LONG": 128, "CUT": 16, "STEPS": 4, "MANY": 3, "LAYERS": 3}.items():
        monkeypatch.setattr(machine, name, value)
    lengths = {"prompt": 40, "long_prompt": 80}
    short = {name: lambda model, n=tokens: machine._prompt(model, n) for name, tokens in lengths.items()}
    monkeypatch.setattr(machine, "RUNS", machine.RUNS | short)
    monkeypatch.setattr(machine, "MIXERS", {n: MIXERS[n] for n in ("attention", "mamba2")})
    monkeypatch.setattr(machine, "DTYPES", {"bfloat16": torch.bfloat16})
    told = list[str]()
    return machine.profile(torch.device("cpu"), told.append), told


def test_every_part_is_measured(measured: tuple[Profile, list[str]]) -> None:
    profile, told = measured
    speed = profile.speeds["bfloat16"]
    assert set(speed.products) == {"plain", "int8", "int4"}
    assert [(p.elements, p.rows) for p in speed.products["plain"]] == [(4096, 1), (4096, 4)]
    assert set(speed.paces) == {"attention", "mamba2", "gated", "moe", "mlp", "clamped"}
    assert all((speed.paces[name].read or 0) > 0 for name in ("attention", "mamba2"))
    assert speed.paces["mlp"] == speed.paces["gated"]
    assert profile == Profile.model_validate_json(profile.model_dump_json())
    assert "mamba2 in bfloat16" in told
    assert set(speed.memory) == {"plain", "int8", "int4"} and min(speed.memory.values()) > 0


def test_products_are_told_without_their_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorded step has no such calls, and where there are some, the paces of parts have them."""
    for name, value in {"SHAPES": ((64, 64),), "ROWS": (1,), "WEIGHTS": 2 << 12, "CALLS": 20}.items():
        monkeypatch.setattr(machine, name, value)
    for name in ("fastest", "typical"):
        monkeypatch.setattr(machine, name, lambda work, repeats: 1e-3)
    (found,) = machine.times_of_products(torch.device("cpu"), torch.bfloat16)
    assert found.seconds * 4096 == pytest.approx(1e-3 / 2 - 1e-3 / 20)
    hot = machine.Hot(torch.device("cpu"), torch.bfloat16)
    assert hot._seconds(1, 32, 48, 1) == 0.0


def test_a_product_of_more_rows_takes_no_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where fewer rows took longer, memory was slower."""
    for name, value in {"SHAPES": ((64, 64),), "ROWS": (1, 2, 4, 8)}.items():
        monkeypatch.setattr(machine, name, value)
    monkeypatch.setattr(machine, "empty_seconds", lambda device, dtype, kind: 1e-3)
    monkeypatch.setattr(machine, "_linears", lambda *sizes: [])
    times = {1: 5e-3, 2: 4e-3, 4: 6e-3, 8: 9e-3}
    monkeypatch.setattr(machine, "_each", lambda layers, x_TI: times[len(x_TI)])
    found = machine.times_of_products(torch.device("cpu"), torch.bfloat16)
    assert [p.seconds * 4096 for p in found] == pytest.approx([3e-3, 3e-3, 5e-3, 8e-3])


def test_matrices_of_a_small_model_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the model: one alone would stay in the nearest cache."""
    used, made = list[int](), machine._linears

    def counted(count: int, *sizes: Any) -> list[Any]:
        layers = made(count, *sizes)
        for at, layer in enumerate(layers):
            layer.register_forward_hook(lambda *_, at=at: used.append(at))
        return layers

    monkeypatch.setattr(machine, "_linears", counted)
    monkeypatch.setattr(machine, "CALLS", 5)
    hot = machine.Hot(torch.device("cpu"), torch.float32)
    hot._call = 0.0
    assert 0 < hot._seconds(3, 32, 48, 2) < 1
    assert used[:12] == [0, 1, 2] * 4 and len(used) == 6 * 6


def test_what_is_measured_while_memory_changes_is_measured_again() -> None:
    rates = iter([4e10, 5e10, 5e10, 3e10, 3e10, 3.2e10, 1e10, 2e10, 1e10, 2e10, 1e10, 2e10])
    count = iter(range(9))
    found = [machine.steadily(lambda: next(rates), lambda: next(count)) for _ in range(2)]
    assert found == [(2, 3.1e10, True), (5, 1.5e10, False)]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_bench_predicts_for_memory_as_it_has_just_read_it(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's memory is its own."""
    asked: list[Any] = []
    monkeypatch.setattr(suite, "forecast", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(suite, "work_of", lambda model: "work")
    report = SimpleNamespace(limits=SimpleNamespace(bytes_per_second=3e10))
    model = SimpleNamespace(placement=SimpleNamespace(device=torch.device(device)))
    suite._forecast(cast(Any, report), cast(Any, "profile"), cast(Any, model))
    assert asked == [("profile", "work", device, 3e10 if device == "cpu" else None)]


@dataclass
class Pretended:
    """Prompts that take this many seconds."""

    taken: float
    adds: float
    states: float

    def left(self, name: str, speed: object) -> float:
        return self.taken

    def mixed(self, name: str) -> float:
        return self.adds

    def channels(self, name: str) -> float:
        return self.states


def prompts(times: Pretended, narrow: Pretended | None) -> dict[str, float]:
    return machine._prompts(cast(Any, times), cast(Any, narrow), cast(Any, None))


def test_states_of_two_sizes_tell_channels_from_multiply_adds() -> None:
    wide, narrow = (Pretended(1e6 * 2e-9 + adds / 1e11, adds, 1e6) for adds in (1e8, 3e7))
    assert prompts(wide, narrow) == {"multiply": pytest.approx(1e11), "channel_s": pytest.approx(2e-9)}
    assert prompts(wide, None) == {"multiply": pytest.approx(1e8 / 3e-3)}
    noisy = prompts(wide, replace(narrow, taken=4e-3))
    assert noisy["multiply"] > 1e15 and noisy["channel_s"] == pytest.approx(3e-9, rel=1e-3)
