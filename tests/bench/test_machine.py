"""Measuring a machine: what is found, with sizes so small that it takes a moment."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch

from zoo.bench import machine
from zoo.bench.limits import machine_limits
from zoo.bench.shapes import MIXERS
from zoo.costs.profile import Profile


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> tuple[Profile, list[str]]:
    monkeypatch.setattr(machine, "machine_limits", lambda device: machine_limits(device, 1 << 20, 64, 1))
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


def test_products_are_told_without_their_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorded step has no such calls, and where there are some, the paces of parts have them."""
    for name, value in {"SHAPES": ((64, 64),), "ROWS": (1,), "WEIGHTS": 2 << 12, "CALLS": 20}.items():
        monkeypatch.setattr(machine, name, value)
    monkeypatch.setattr(machine, "fastest", lambda work, repeats: 1e-3)
    (found,) = machine.times_of_products(torch.device("cpu"), torch.bfloat16)
    assert found.seconds * 4096 == pytest.approx(1e-3 / 2 - 1e-3 / 20)
    hot = machine.Hot(torch.device("cpu"), torch.bfloat16)
    assert hot._seconds(32, 48, 1) == 0.0


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
