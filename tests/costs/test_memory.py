"""The plan of memory: against adding up by hand, and against what processes really take."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import zoo
from zoo.bench.shapes import ATTENTION, MAMBA2, card, gated, moe
from zoo.cli import main
from zoo.components import native
from zoo.components.attention.room import room_bytes
from zoo.components.cache.pages import PAGE
from zoo.components.cache.slab import STEP
from zoo.costs import memory
from zoo.costs.memory import PROCESS_BYTES, MemoryPlan
from zoo.costs.work import Work, grain_tokens
from zoo.device import Placement, choose
from zoo.fitting import fitting
from zoo.registry.errors import CapacityError

TOLERANCE = 0.25
"""By which planned and measured memory may differ: allocators keep some, and threads have stacks."""


@pytest.fixture(autouse=True)
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights take what they take everywhere, but where a test says otherwise."""
    monkeypatch.setattr(memory, "packs", lambda: False)


def plan(name: str, context: int, free: int, dtype: str = "bfloat16", **changes: Any) -> MemoryPlan:
    quantize = changes.pop("quantize", None)
    return MemoryPlan(Work(zoo.inspect(name).plan, dtype, quantize), context, free, **changes)


def test_a_processor_that_packs_keeps_bfloat16_in_three_quarters(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = [plan("mistral-7b-v0.3", 100, 0, **changes).weights for changes in ({}, {"dtype": "float32"})]
    monkeypatch.setattr(memory, "packs", lambda: True)
    kept = 2 * (32768 + 65) * 4096
    heads = 24 * (32 * (6144 + 4096 + 2 * 14336 + 4096) + 32768) // 16
    assert plan("mistral-7b-v0.3", 100, 0).weights == (plain[0] - kept) * 3 // 4 + kept + heads
    assert plan("mistral-7b-v0.3", 100, 0, device="cuda").weights == plain[0]
    assert plan("mistral-7b-v0.3", 100, 0, dtype="float32").weights == plain[1]
    eight = plan("mistral-7b-v0.3", 100, 0, quantize="int8").weights
    assert eight == plan("mistral-7b-v0.3", 100, 0, quantize="int8", device="cuda").weights


def test_the_parts_add_up() -> None:
    found = plan("mistral-7b-v0.3", 4096, 32 << 30, batch=3)
    assert found.weights == zoo.inspect("mistral-7b-v0.3").weight_bytes
    assert found.cache == 3 * 4096 * 131072
    assert found.total == found.weights + found.cache + found.working + found.spare + PROCESS_BYTES
    assert found.spare == found.cache // 4 - found.working > 0
    assert plan("mistral-7b-v0.3", 64, 32 << 30).spare == 0
    assert found.fits
    assert not replace(found, free=found.total - 1).fits


def test_working_memory_is_of_the_widest_part() -> None:
    """512 rows of 2 gates of 14336 lanes, the stream in and out, and what stands around them."""
    found = plan("mistral-7b-v0.3", 512, 0)
    gated = 512 * 2 * (4096 + 3 * 14336 + 4096)
    stream = 512 * 4096 * (4 * 2 + 2 * 4)
    assert found.working == gated + stream + 32768 * (2 + 8) + found.kernels
    assert replace(found, device="cuda").kernels == 0
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
    assert both.total == alone.total + both.guessing + both.spare - alone.spare > alone.total + both.guessing
    assert 0 < replace(both, free=both.total - (1 << 28)).largest_context(20000) < 20000 == alone.largest_context(20000)
    assert "the model that guesses 1" in both.note
    assert "guesses" not in alone.note
    advice = replace(both, free=20 << 30).advice
    assert advice[0] == "no --draft, or --draft lookup"
    assert "--quantize int8" in advice, "both are quantised"


def test_advice_names_what_would_fit() -> None:
    assert plan("mistral-7b-v0.3", 4096, 16 << 30, "float32").advice[0] == "--dtype bfloat16"
    found = plan("mistral-7b-v0.3", 32768, 13 << 30).advice
    assert found == ["--quantize int8", "--quantize int4"]
    assert plan("mistral-7b-v0.3", 32768, 5 << 30).advice[0].startswith("--quantize int4 with --max-context ")
    part = plan("mistral-7b-v0.3", 32768, 16 << 30)
    assert part.advice == ["--quantize int8", "--quantize int4"]
    assert part.advice == replace(part, elsewhere=lambda _: ["--devices 2 with --max-context 30000"]).advice
    assert replace(part, free=18 << 30).advice[0] == "--cache-dtype int8"
    assert replace(part, asked=True).advice[0] == f"--max-context {part.most}"
    assert plan("mistral-7b-v0.3", 4096, 1 << 30).advice == []


def test_advice_does_not_name_more_bits_than_there_are() -> None:
    found = plan("mistral-7b-v0.3", 32768, 9 << 30, quantize="int4").advice
    assert found
    assert "--quantize" not in " ".join(found)


def test_advice_names_no_kind_that_the_device_refuses() -> None:
    for device, kinds in (("cpu", True), ("cuda", True), ("mps", False)):
        words = " ".join(plan("mistral-7b-v0.3", 4096, 10 << 30, device=device, process=0).advice)
        assert ("--quantize int4" in words) == kinds, device


FAR = card(
    "far",
    dim=64,
    layers=[{"repeat": 4, "mixer": ATTENTION | {"num_kv_heads": 16}, "ffn": gated(256)}],
    vocab_size=200,
    context_length=65536,
)
"""A gigabyte of cache for its whole context, and hardly any weights."""


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets what main memory has free; the process that loads is counted whole, as where it is yet to start."""

    def set_to(count: int) -> None:
        for place in ("zoo.device.free_memory", "zoo.inspection.free_memory"):
            monkeypatch.setattr(place, lambda: count)

    monkeypatch.setattr("zoo.fitting.resident_memory", lambda: 0)
    monkeypatch.setattr("zoo.inspection.gpus_free", list)
    return set_to


@pytest.mark.parametrize(("room", "quantize"), [(2000, None), (200, None), (200, "int8")])
def test_load_says_what_inspect_says(free: Callable[[int], None], room: int, quantize: str | None) -> None:
    """Where all fits and where a part does, plain and quantised."""
    free(PROCESS_BYTES + (room << 20))
    told = zoo.inspect(FAR, quantize=quantize).to_dict()["memory"]
    with zoo.load(FAR, weights="random", device="cpu", quantize=quantize) as model:
        (note,) = (note for note in model.notes if note.startswith("memory for 65536 tokens"))
    assert told["fits"] == (room == 2000)
    if told["fits"]:
        assert told["verdict"] == "fits" and "fits" not in note
    else:
        assert told["verdict"] == f"fits up to {told['largest_context']} of 65536 tokens"
        assert note.endswith("; ".join(filter(None, ("", told["verdict"], told["hint"]))))


def test_the_context_that_was_promised_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache's budget is what is free when weights are loaded, less what is kept free."""
    plan = zoo.inspect(FAR).memory_plan()
    start = replace(plan, free=PROCESS_BYTES + (200 << 20), elsewhere=None)
    frees = iter([start.free, start.free - start.process - start.weights])
    monkeypatch.setattr("zoo.fitting.resident_memory", lambda: 0)
    monkeypatch.setattr("zoo.device.free_memory", lambda: next(frees))
    with zoo.load(FAR, weights="random", device="cpu") as model:
        assert plan.work.cache_bytes(start.most) <= model.memory.cache_budget < plan.work.cache_bytes(start.most + 256)


def test_what_cannot_run_is_refused_in_the_same_words(free: Callable[[int], None]) -> None:
    """No room for a short sequence; room for that, and not for as long a one as was asked for."""
    free(13 << 30)
    told = zoo.inspect("mistral-7b-v0.3").to_dict()["memory"]
    assert (told["verdict"], told["runs"]) == ("does not fit", False)
    assert told["hint"] == "what would fit: --quantize int8, or --quantize int4"
    with pytest.raises(CapacityError, match=rf"cache for 512 tokens .*{told['hint'][1:]}"):
        zoo.load("mistral-7b-v0.3", weights="random", device="cpu")
    free(PROCESS_BYTES + (200 << 20))
    asked = zoo.inspect(FAR).to_dict(60000)["memory"]
    assert asked["verdict"] == f"does not fit, with {asked['largest_context']} tokens it does"
    assert asked["hint"].startswith(f"what would fit: --max-context {asked['largest_context']}, or ")
    with pytest.raises(CapacityError, match=rf"cache for 60000 tokens .*{asked['hint'][1:]}; "):
        zoo.load(FAR, weights="random", device="cpu", max_context=60000)


def test_a_gpu_is_judged_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that runs on one, by the driver's figure and by torch's."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    inspected = zoo.inspect("mistral-7b-v0.3")
    for count, words in ((24 << 30, "fits"), (17 << 30, "fits up to "), (8 << 30, "does not fit")):
        monkeypatch.setattr("zoo.devices.advice.memory_free", lambda _, count=count: count)
        monkeypatch.setattr("zoo.inspection.gpus_free", lambda count=count: [count])
        told = inspected.to_dict()["gpu_memory"]
        assert told["verdict"].startswith(words)
        placed = Placement(torch.device("cuda", 0), torch.bfloat16, "")
        judge = partial(fitting, inspected.plan, None, placed, 32768, None, asked=False)
        if words == "does not fit":
            with pytest.raises(CapacityError, match=told["hint"][1:]):
                judge()
        else:
            assert judge().to_dict() == told


def test_a_format_that_a_cpu_does_not_compute_is_judged_as_it_runs(free: Callable[[int], None]) -> None:
    """Cards in float16 run in float32 there if nothing else is asked for."""
    free(20 << 30)
    found = zoo.inspect("llama-2-7b")
    assert found.dtype == "float16"
    assert found.to_dict()["memory"]["weights_bytes"] == 2 * found.weight_bytes
    assert zoo.inspect("llama-2-7b", dtype="float16").to_dict()["memory"]["weights_bytes"] == found.weight_bytes
    assert choose("cpu", "auto", "float16").dtype_name == found.to_dict()["memory"]["dtype"] == "float32"


def test_the_command_says_it(free: Callable[[int], None], capsys: pytest.CaptureFixture[str]) -> None:
    free(17 << 30)
    with pytest.raises(SystemExit):
        main(["inspect", "mistral-7b-v0.3"])
    shown = capsys.readouterr().out
    assert re.search(r"here +17\.0 GiB free: fits up to \d+ of 32768 tokens; for all 32768 tokens: --", shown)
    assert "left free" in shown


def test_rooms_grow_as_stores_have_it() -> None:
    assert (grain_tokens("cpu"), grain_tokens("cuda")) == (STEP, PAGE)


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

ROOM = """
import sys, torch
from zoo.components.cache.code import RowCode
from zoo.components.native import attention, latent
from zoo.components.native.attention import addresses, attend_latents, attend_slabs
sequences, slots, heads, groups, width, values = map(int, sys.argv[1:])
code, scores = RowCode(None, (width,), torch.bfloat16), {"scale": 1.0, "window": None, "softcap": None, "sinks_H": None}
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) * 1024
def attend(slots):
    shape = (1, 1) if width != values else (2, groups)
    slabs = [torch.zeros(*shape, slots, width, dtype=torch.bfloat16) for _ in range(sequences)]
    rows = [(seq, slots - 16 + row) for seq in range(sequences) for row in range(16)]
    numbers = torch.tensor([number for seq, at in rows for number in (slots, at, at + 1, 16 * seq)])
    q, k = torch.zeros(len(rows), heads, width).bfloat16(), torch.zeros(len(rows), groups, width).bfloat16()
    where = addresses([slabs[seq] for seq, _ in rows]), numbers
    before = resident()
    if width != values:
        found = attend_latents(q, *where, code, latent=values, scale=1.0)
    else:
        found = attend_slabs(q, k, k, *where, code, scores)
    return resident() - before - found.nbytes
with torch.no_grad():
    torch.set_num_threads(2)
    assert attention.missing() is latent.missing() is None
    print(attend(slots))
"""
"""Prints by how much a process has grown after the kernel's first large work: what it keeps."""


@pytest.mark.skipif(sys.platform != "linux", reason="measured with Linux's peak of resident memory")
@pytest.mark.skipif(native.missing() is not None, reason=f"no native kernels: {native.missing()}")
@pytest.mark.parametrize(
    "numbers",
    [(3, 8192, 32, 8, 64, 64), (1, 8192, 128, 1, 576, 512), (4, 4096, 32, 1, 160, 128)],
    ids=["sequences that take turns", "blocks of latents' heads", "latents of several sequences"],
)
def test_kernels_keep_what_was_planned(numbers: tuple[int, ...]) -> None:
    sequences, slots, heads, groups, width, values = numbers
    run = subprocess.run(
        [sys.executable, "-c", ROOM, *map(str, numbers)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # Memory that was used before is not used again.
    )
    assert run.returncode == 0, run.stderr
    planned = room_bytes(sequences, slots, (heads, groups), (width // 2, values), 2, latents=width != values)
    assert planned == pytest.approx(int(run.stdout), rel=TOLERANCE)


LATENT = {"kind": "latent_attention", "num_heads": 16, "q_lora_rank": None, "kv_lora_rank": 256, "nope_head_dim": 64}
LATENT |= {"rope_head_dim": 32, "v_head_dim": 64, "rope": {"theta": 1e4}}
LAYERS = {
    "dense": {"repeat": 10, "mixer": ATTENTION, "ffn": gated(4096)},
    "latent": {"repeat": 10, "mixer": LATENT, "ffn": gated(4096)},
    "mixture": {"repeat": 6, "mixer": ATTENTION, "ffn": moe(8, 2, 1024)},
    "mamba": {"repeat": 16, "mixer": MAMBA2 | {"state_size": 64}, "ffn": None},
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measured with Linux's peak of resident memory")
@pytest.mark.parametrize("name", LAYERS)
def test_a_process_takes_what_was_planned(name: str) -> None:
    shape = card("shape", dim=1024, layers=[LAYERS[name]], vocab_size=32768, context_length=2048)
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(shape)], capture_output=True, text=True, timeout=200, check=False
    )
    assert run.returncode == 0, run.stderr
    peak, planned = map(int, run.stdout.split())
    assert planned == pytest.approx(peak, rel=TOLERANCE)
