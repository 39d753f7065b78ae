"""What is said of more devices where a model does not fit on one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from tests.devices.likes import make_plan
from zoo import inspection
from zoo.costs.memory import MemoryPlan
from zoo.costs.work import Work
from zoo.devices.advice import elsewhere, fewest, free_for_each
from zoo.devices.mesh import Mesh, Wish
from zoo.devices.run import Spread
from zoo.registry.errors import CapacityError

PLAN = make_plan(layers=[{"repeat": 4, "mixer": None, "ffn": {"kind": "gated", "hidden_dim": 600}}])
SHORT = MemoryPlan(Work(PLAN, "float32"), 64, 0, device="cuda", process=0)


def advised(share: float, count: int, **options: Any) -> list[str]:
    """The advice for `count` devices that each have room for this share of all."""
    frees = [int(share * SHORT.total)] * count
    return fewest(SHORT, plan=PLAN, frees=frees, counts=range(1, count + 1), **options)


def test_the_fewest_devices_that_fit_are_named() -> None:
    assert advised(1.0, 4) == ["--device cuda"]
    assert advised(0.7, 4) == ["--devices 2"]
    assert advised(0.45, 4) == ["--devices 3"]
    assert advised(0.2, 2) == []
    assert advised(0.01, 8) == []
    one = replace(SHORT, context=1).total / SHORT.total
    [short] = advised((one + 1) / 2, 1)
    assert short.startswith("--device cuda with --max-context ")


def test_machines_of_torchrun_are_named() -> None:
    frees = [int(0.45 * SHORT.total)] * 8
    assert fewest(SHORT, plan=PLAN, frees=frees, counts=range(4, 9, 2), near=2) == ["torchrun over 2 machines"]


def test_ranks_on_one_cpu_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    here = torch.device("cpu")
    monkeypatch.setattr("zoo.devices.advice.memory_free", lambda _: 1000)
    own = Spread(Mesh(4), Wish(4), 0, own=True)
    assert elsewhere(PLAN, None, here) is elsewhere(PLAN, own, here) is None
    assert free_for_each(None, here) == 1000
    assert free_for_each(own, here) == 250
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert elsewhere(PLAN, replace(own, own=False), here) is not None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert elsewhere(PLAN, replace(own, own=False), here) is None


@pytest.mark.parametrize("devices", [None, 2])
def test_more_devices_are_no_advice_on_one_cpu(monkeypatch: pytest.MonkeyPatch, devices: int | None) -> None:
    monkeypatch.setattr("zoo.devices.advice.memory_free", lambda _: 1 << 20)
    with pytest.raises(CapacityError, match="the model does not fit") as refused:
        zoo.load("tiny", device="cpu", devices=devices)
    assert "--devices" not in str(refused.value)


def test_more_gpus_are_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr("zoo.devices.advice.memory_free", lambda _: int(0.7 * SHORT.total))
    more = elsewhere(PLAN, None, torch.device("cuda", 0))
    assert more is not None
    refused = replace(SHORT, free=100, elsewhere=more).refusal("cuda:0")
    assert "What would fit: --devices 2" in str(refused)


def test_inspect_asks_for_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "free_memory", lambda: 1 << 20)
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not any("--device" in line for line in zoo.inspect("tiny").to_dict()["memory"]["advice"])
    program.write_text("#!/bin/sh\necho 4\necho 4\n")
    program.chmod(0o755)
    assert zoo.inspect("tiny").memory_plan(64).advice[-1] == "--devices 2"
    program.write_text("#!/bin/sh\necho broken\n")
    assert not any("--device" in line for line in zoo.inspect("tiny").memory_plan(64).advice)
