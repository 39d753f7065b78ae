"""The plan of memory: against adding up by hand, and against what processes really take."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

import zoo
from zoo.costs.memory import PROCESS_BYTES, MemoryPlan
from zoo.costs.work import Work
from zoo.registry.errors import CapacityError

TOLERANCE = 0.25
"""By which planned and measured memory may differ: allocators keep some, and threads have stacks."""


def plan(name: str, context: int, free: int, dtype: str = "bfloat16", **changes: Any) -> MemoryPlan:
    quantize = changes.pop("quantize", None)
    return MemoryPlan(Work(zoo.inspect(name).plan, dtype, quantize), context, free, **changes)


def test_the_parts_add_up() -> None:
    found = plan("mistral-7b-v0.3", 4096, 32 << 30, batch=3)
    assert found.weights == zoo.inspect("mistral-7b-v0.3").weight_bytes
    assert found.cache == 3 * 4096 * 131072
    assert found.total == found.weights + found.cache + found.working + PROCESS_BYTES
    assert found.fits
    assert not replace(found, free=found.total - 1).fits


def test_working_memory_is_of_the_widest_part() -> None:
    """512 rows of 2 gates of 14336 lanes, the stream in and out, and what stands around them."""
    found = plan("mistral-7b-v0.3", 512, 0)
    gated = 512 * 2 * (4096 + 3 * 14336 + 4096)
    stream = 512 * 4096 * (4 * 2 + 2 * 4)
    assert found.working == gated + stream + 32768 * (2 + 8)
    assert plan("mistral-7b-v0.3", 10, 0).working < found.working / 10


def test_a_gpu_makes_quantised_matrices_numbers_for_prompts() -> None:
    """Room for the largest of a dense model; a mixture's experts are multiplied as they lie."""
    for name, numbers in (("mistral-7b-v0.3", 32768 * 4096), ("mixtral-8x7b", 32000 * 4096)):
        for device, scratch in (("cpu", 0), ("cuda", numbers * 2)):
            eight = MemoryPlan(Work(zoo.inspect(name).plan, "bfloat16", "int8"), 100, 1 << 40, device=device)
            plain = replace(eight, work=replace(eight.work, quantize=None))
            assert eight.working - plain.working == scratch
            assert plain.scratch == 0


def test_masks_grow_with_what_is_seen_up_to_the_window() -> None:
    far = plan("mistral-7b-v0.3", 30000, 0)
    assert far.working >= 512 * 30000 * 5
    windowed = plan("mistral-7b-v0.1", 30000, 0)
    assert windowed.working == plan("mistral-7b-v0.1", 20000, 0).working < far.working


def test_the_largest_context_is_where_it_stops_fitting() -> None:
    found = plan("mistral-7b-v0.3", 32768, 16 << 30)
    length = found.largest_context(32768)
    assert 0 < length < 32768
    assert replace(found, context=length).fits
    assert not replace(found, context=length + 1).fits


def test_a_model_that_guesses_counts() -> None:
    """Its weights, and a cache as far as it reads."""
    alone = plan("mistral-7b-v0.3", 20000, 40 << 30)
    other = Work(zoo.inspect("mistral-7b-v0.1", dtype="bfloat16").plan, "bfloat16")
    both = replace(alone, guesser=other)
    assert both.guessing == zoo.inspect("mistral-7b-v0.1").weight_bytes + other.cache_bytes(20000)
    assert both.total == alone.total + both.guessing
    assert 0 < replace(both, free=both.total - (1 << 28)).largest_context(20000) < 20000 == alone.largest_context(20000)
    assert "the model that guesses 1" in both.note
    assert "guesses" not in alone.note
    advice = replace(both, free=20 << 30).advice()
    assert advice[0] == "no --draft, or --draft lookup"
    assert "--quantize int8" in advice, "both are quantised"


def test_advice_names_what_would_fit() -> None:
    assert plan("mistral-7b-v0.3", 4096, 16 << 30, "float32").advice()[0] == "--dtype bfloat16"
    found = plan("mistral-7b-v0.3", 32768, 12 << 30).advice()
    assert found == ["--quantize int8", "--quantize int4"]
    assert plan("mistral-7b-v0.3", 32768, 5 << 30).advice()[0].startswith("--quantize int4 with --max-context ")
    assert plan("mistral-7b-v0.3", 32768, 16 << 30).advice()[0].startswith("--max-context ")
    assert plan("mistral-7b-v0.3", 4096, 16 << 30, batch=64).advice()[0] == "a smaller max_batch_size"
    assert plan("mistral-7b-v0.3", 4096, 1 << 30).advice() == []


def test_advice_names_no_kind_that_the_device_refuses() -> None:
    for device, kinds in (("cpu", True), ("cuda", True), ("mps", False)):
        words = " ".join(plan("mistral-7b-v0.3", 4096, 10 << 30, device=device, process=0).advice())
        assert ("--quantize int4" in words) == kinds, device


def test_load_and_inspect_agree_and_say_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("zoo.device.free_memory", "zoo.inspection.free_memory"):
        monkeypatch.setattr(place, lambda: 12 << 30)
    told = zoo.inspect("mistral-7b-v0.3").to_dict()["memory"]
    assert not told["fits"]
    assert told["advice"] == ["--quantize int8", "--quantize int4"]
    with pytest.raises(CapacityError, match=r"work in between .*hat would fit: --quantize int8, or --quantize int4"):
        zoo.load("mistral-7b-v0.3", weights="random", device="cpu")


MEASURE = """
import json, sys, torch, zoo
from zoo.costs.memory import MemoryPlan
from zoo.costs.work import Work
card, tokens, batch = json.loads(sys.argv[1]), 700, 2
plan = MemoryPlan(Work(zoo.inspect(card).plan, "bfloat16"), tokens + 4, 1 << 40, batch)
with zoo.load(card, weights="random", device="cpu", max_batch_size=batch) as model:
    prompts = torch.randint(3, 900, (batch, tokens)).tolist()
    model.generate(prompts, max_tokens=4, temperature=0.0, ignore_eos=True)
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
print(peak, plan.total)
needless = {"torch._dynamo", "triton", "xformers", "sympy", "transformers"} & sys.modules.keys()
assert not needless, f"a run on a CPU imported {sorted(needless)}"
"""

ATTENTION = {"kind": "attention", "num_heads": 16, "num_kv_heads": 4, "head_dim": 64, "rope": {"theta": 1e4}}
EXPERT = {"kind": "gated", "hidden_dim": 1024}
MAMBA = {"kind": "mamba2", "num_heads": 32, "head_dim": 64, "num_groups": 1, "state_size": 64, "conv_size": 4}
LAYERS = {
    "dense": {"repeat": 10, "mixer": ATTENTION, "ffn": {"kind": "gated", "hidden_dim": 4096}},
    "mixture": {
        "repeat": 6,
        "mixer": ATTENTION,
        "ffn": {"kind": "moe", "num_experts": 8, "experts_per_token": 2, "expert": EXPERT},
    },
    "mamba": {"repeat": 16, "mixer": MAMBA | {"norm_eps": 1e-5}, "ffn": None},
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measured with Linux's peak of resident memory")
@pytest.mark.parametrize("name", LAYERS)
def test_a_process_takes_what_was_planned(name: str) -> None:
    norm = {"kind": "rms", "eps": 1e-5}
    card = {
        "name": "shape",
        "family": "shapes",
        "summary": "A shape.",
        "context_length": 2048,
        "source": {"dtype": "bfloat16"},
        "text": {"features": []},
        "model": {"dim": 1024, "vocab_size": 32768, "norm": norm, "layers": [LAYERS[name]]},
    }
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(card)], capture_output=True, text=True, timeout=200, check=False
    )
    assert run.returncode == 0, run.stderr
    peak, planned = map(int, run.stdout.split())
    assert planned == pytest.approx(peak, rel=TOLERANCE)
