"""The benchmarks by name: each takes a Bench, that is a shape and who takes part, and returns plain data."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import linear_regression, median
from typing import Any
from unittest.mock import patch

import torch

from tests.benchmarks import guessing, loading, ranks, traffic
from tests.benchmarks.shapes import LLAMA_FILES, Shape, folder_of, recurrent_folder
from tests.benchmarks.sides import LlamaCpp, Machine, Prompts, Side, Timed, Transformers, Turn, Zoo, turns
from zoo.bench import (
    Arrival,
    arrivals,
    bytes_per_step,
    measure_traffic,
    multiply_adds_of_prompt,
    random_prompts,
)
from zoo.engine.pack import Batch
from zoo.engine.request import Request, SamplingParams

Case = Callable[["Bench"], dict[str, Any]]
CASES: dict[str, Case] = {}


@dataclass(frozen=True)
class Bench:
    """What a benchmark may choose from. batches, contexts: None for what the benchmark itself is about."""

    shape: Shape
    root: Path
    peers: Sequence[str] = ("transformers", "llama.cpp")
    batches: Sequence[int] | None = None
    contexts: Sequence[int] | None = None
    prompt: int | None = None
    steps: int = 32
    rounds: int = 2
    zoo_options: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return folder_of(self.shape, self.root, llama="llama.cpp" in self.peers)

    @contextmanager
    def sides(self, *, llama: Sequence[str] = ("bf16",)) -> Iterator[list[Side]]:
        """zoo first, then the peers, all loaded."""
        with ExitStack() as stack:
            folder, found = self.folder, list[Side]()
            found.append(Zoo(folder, max_batch_size=256, **self.zoo_options))
            if "transformers" in self.peers:
                found.append(Transformers(folder))
            if "llama.cpp" in self.peers:
                found += [LlamaCpp(folder / f"{kind}.gguf") for kind in llama]
            for side in found:
                stack.callback(side.close)
            yield found

    def prompts(self, batch: int, length: int) -> Prompts:
        generator = torch.Generator().manual_seed(batch)
        return torch.randint(3, self.shape.vocab, (batch, length), generator=generator).tolist()


def case(function: Case) -> Case:
    CASES[function.__name__.replace("_", "-")] = function
    return function


@case
def prefill(bench: Bench) -> dict[str, Any]:
    """From a prompt to its first new token, one prompt at a time."""
    rows = []
    with bench.sides() as sides:
        assert isinstance(sides[0], Zoo)
        machine = Machine()
        for length in bench.contexts or (512,):
            times = _turns(bench, [*sides, machine], bench.prompts(1, length), 0)
            _, limit = machine.limits(times.pop(machine.name))
            taken = {name: median(t.prefill for t in runs) for name, runs in times.items()}
            rates = {name: length / seconds for name, seconds in taken.items()}
            share = multiply_adds_of_prompt(sides[0].model, length) / taken["zoo"] / limit
            row = {"prompt": length, "tokens_per_second": rates, "ratios": _ratios(rates)}
            rows.append(row | {"of_multiply_limit": share})
    return {"rows": rows}


@case
def decode(bench: Bench) -> dict[str, Any]:
    """Steps of equal sequences: medians over all steps, the sides by turns."""
    bandwidths, rows = [], []
    with bench.sides() as sides:
        assert isinstance(sides[0], Zoo)
        machine = Machine()
        for batch in bench.batches or (1, 8):
            length = bench.prompt or (512 if batch == 1 else 64)
            times = _turns(bench, [*sides, machine], bench.prompts(batch, length), bench.steps)
            bandwidths.append(machine.limits(times.pop(machine.name))[0])
            step = {name: median(s for run in runs for s in run.steps) for name, runs in times.items()}
            rates = {name: batch / seconds for name, seconds in step.items()}
            read = bytes_per_step(sides[0].model, batch, length + bench.steps // 2)
            row = {"batch": batch, "prompt": length, "step_seconds": step, "tokens_per_second": rates}
            total = {name: _total(batch, length, runs) for name, runs in times.items() if batch == 1 or _honest(name)}
            row |= {"ratios": _ratios(rates), "total_tokens_per_second": total, "total_ratios": _ratios(total)}
            rows.append(row | {"of_read_limit": read / step["zoo"] / bandwidths[-1]})
    return {"read_bytes_per_second": max(bandwidths), "rows": rows}


@case
def quantised(bench: Bench) -> dict[str, Any]:
    """One sequence with int8 and int4 weights beside zoo's own bfloat16, packed and not, and llama.cpp's kinds."""
    length, folder = bench.prompt or 128, bench.folder
    with patch.dict(os.environ, ZOO_UNPACKED="1"):
        sides: list[Side] = [Zoo(folder, "zoo unpacked")]
    sides.append(Zoo(folder))
    sides += [Zoo(folder, f"zoo {kind}", quantize=kind) for kind in ("int8", "int4")]
    if "llama.cpp" in bench.peers:
        sides += [LlamaCpp(folder / f"{kind}.gguf") for kind in ("bf16", *LLAMA_FILES)]
    times = _turns(bench, sides, bench.prompts(1, length), bench.steps)
    decoded = {name: 1 / median(s for run in runs for s in run.steps) for name, runs in times.items()}
    read = {name: length / median(run.prefill for run in runs) for name, runs in times.items()}
    sizes = {side.name: side.model.memory.weights for side in sides if isinstance(side, Zoo)}
    sizes |= {f"llama.cpp {file.stem}": file.stat().st_size for file in folder.glob("*.gguf")}
    for side in sides:
        side.close()
    rates = {"tokens_per_second": decoded, "prefill_tokens_per_second": read}
    return {"prompt": length, "bytes": {name: sizes[name] for name in decoded}} | rates


@case
def context(bench: Bench) -> dict[str, Any]:
    """Cost of one decode step against the context, few small layers so that the cache is what is read."""
    small = replace(bench.shape, layers=4, hidden=bench.shape.dim, vocab=512)
    bench = replace(bench, shape=small)
    window = {"mixer": small.card()["model"]["layers"][0]["mixer"] | {"window": 1024}}
    sizes = {
        "num_heads": small.heads,
        "head_dim": 2 * small.head_dim,
        "num_groups": 2,
        "state_size": 128,
        "conv_size": 4,
    }
    recurrent = {"mixer": {"kind": "mamba2", "conv_size": 4, "norm_eps": 1e-5} | sizes}
    kinds: dict[str, dict[str, Any]] = {"full": {}, "window of 1024": window, "recurrent": recurrent}
    coded = {f"full, {kind} cache": kind for kind in ("int8", "fp8")}
    contexts = bench.contexts or (512, 1024, 2048, 4096, 8192)
    found, machine = dict[str, Any](), Machine()
    for name in (*kinds, *coded):
        card, cache_dtype = small.card(**kinds.get(name, {})), coded.get(name, "auto")
        zoo_side = Zoo(card, weights="random", dtype="bfloat16", cache_dtype=cache_dtype)
        steps = _steps_at(bench, zoo_side, contexts)
        found[name] = {"step_seconds": steps}
        if name == "full":
            cache = (bytes_per_step(zoo_side.model, 1, 2048) - bytes_per_step(zoo_side.model, 1, 1024)) / 1024
            slope = linear_regression(contexts, steps).slope
            bandwidth, _ = machine.limits([machine.run([], bench.steps)])
            found[name] |= {"slope_of_read_limit": cache / bandwidth / slope, "cache_bytes_per_token": cache}
        zoo_side.close()
    if bench.peers:
        with bench.sides() as sides:
            for side in sides[1:]:
                found[side.name] = {"step_seconds": _steps_at(bench, side, contexts)}
    return {"contexts": list(contexts), "read_bytes_per_second": bandwidth, "kinds": found}


@case
def mixed(bench: Bench) -> dict[str, Any]:
    """Requests of many lengths that arrive one after the other: new tokens per second until the last has ended."""
    with replace(bench, peers=[p for p in bench.peers if p == "transformers"]).sides() as sides:
        plan, prompts, found = _plan(bench, sides)
        for side in sides[1:]:
            assert isinstance(side, Transformers)
            for size in bench.batches or (8, 16, 32):
                name = f"transformers, batches of {size}"
                found[name] = traffic.by_static_batches(side, plan, prompts, size)
    return _compared(plan, found)


@case
def mixed_continuous(bench: Bench) -> dict[str, Any]:
    """The same requests as `mixed`, beside transformers' own continuous batching."""
    with replace(bench, peers=["transformers"]).sides() as sides:
        plan, prompts, found = _plan(bench, sides)
        assert isinstance(sides[1], Transformers)
        found["transformers, continuous batching"] = traffic.by_continuous_batching(sides[1], plan, prompts)
    return _compared(plan, found)


def _plan(bench: Bench, sides: Sequence[Side]) -> tuple[list[Arrival], Prompts, dict[str, Any]]:
    """What arrives, 8 at once and two more each second, and zoo's figures of serving it."""
    assert isinstance(sides[0], Zoo)
    plan, model = arrivals(32, 0.5, (16, 8 * (bench.prompt or 48)), (8, 192), burst=8), sides[0].model
    for side in sides:
        side.run(bench.prompts(2, 256), 2)
    prompts = [random_prompts(model, 1, one.prompt, seed=number)[0] for number, one in enumerate(plan)]
    return plan, prompts, {"zoo": measure_traffic(model, plan).to_dict()}


@case
def mixture(bench: Bench) -> dict[str, Any]:
    """Eight experts of which two are active, beside a dense model of as many active parameters; random weights."""
    shape = replace(bench.shape, layers=min(bench.shape.layers, 8))
    expert = {"kind": "gated", "hidden_dim": shape.hidden // 2}
    experts = {"kind": "moe", "num_experts": 8, "experts_per_token": 2, "expert": expert}
    sides: list[Side] = [
        Zoo(shape.card(), "dense", weights="random", dtype="bfloat16"),
        Zoo(shape.card(ffn=experts), "mixture", weights="random", dtype="bfloat16"),
    ]
    rows = []
    for batch in bench.batches or (1, 8):
        times = _turns(bench, sides, bench.prompts(batch, bench.prompt or 64), bench.steps)
        step = {name: median(s for run in runs for s in run.steps) for name, runs in times.items()}
        read = {side.name: bytes_per_step(side.model, batch, 64) for side in sides if isinstance(side, Zoo)}
        row = {"batch": batch, "step_seconds": step, "bytes_per_step": read}
        rows.append(row | {"ratio": step["mixture"] / step["dense"], "bytes_ratio": read["mixture"] / read["dense"]})
    for side in sides:
        side.close()
    return {"layers": shape.layers, "rows": rows}


@case
def recurrent(bench: Bench) -> dict[str, Any]:
    """A state-space model beside transformers' own, both by what runs on a CPU: a prompt, and steps."""
    folder, rows = recurrent_folder(bench.shape, bench.root), []
    sides: list[Side] = [Zoo(folder, max_batch_size=256), Transformers(folder)]
    for batch in bench.batches or (1, 8):
        length = bench.prompt or (512 if batch == 1 else 64)
        times = _turns(bench, sides, bench.prompts(batch, length), bench.steps)
        rates = {name: batch / median(s for run in runs for s in run.steps) for name, runs in times.items()}
        read = {name: batch * length / median(run.prefill for run in runs) for name, runs in times.items()}
        row = {"batch": batch, "prompt": length, "tokens_per_second": rates, "prefill_tokens_per_second": read}
        rows.append(row | {"ratios": _ratios(rates), "prefill_ratios": _ratios(read)})
    for side in sides:
        side.close()
    return {"rows": rows}


@case
def overhead(bench: Bench) -> dict[str, Any]:
    """What a step spends outside of the model: scheduling, packing, sampling, writing; also with many waiting."""
    side, spent = Zoo(bench.folder, max_batch_size=64, **bench.zoo_options), [0.0]
    runner = side.model.engine.parts[1]
    run = runner.run

    def timed(batch: Batch) -> torch.Tensor:
        start = time.perf_counter()
        logits_RV = run(batch)
        spent.append(time.perf_counter() - start)
        return logits_RV

    rows = []
    with closing(side), patch.object(runner, "run", timed):
        for waiting, (name, options) in product((0, 4000), SAMPLING.items()):
            whole, inside = _steps_of_64(bench, side, options, waiting, spent)
            outside = median(w - i for w, i in zip(whole, inside, strict=True))
            row = {"waiting": waiting, "sampling": name, "step_seconds": median(whole), "outside_seconds": outside}
            rows.append(row | {"share": outside / median(whole)})
    return {"batch": 64, "rows": rows}


SAMPLING: dict[str, dict[str, float]] = {
    "greedy": {},
    "temperature 0.7": {"temperature": 0.7},
    "temperature 0.7, top_k 40": {"temperature": 0.7, "top_k": 40},
    "temperature 0.7, top_p 0.95": {"temperature": 0.7, "top_p": 0.95},
    "temperature 0.7, min_p 0.05": {"temperature": 0.7, "min_p": 0.05},
}


def _steps_of_64(
    bench: Bench, side: Zoo, options: dict[str, Any], waiting: int, spent: list[float]
) -> tuple[list[float], list[float]]:
    """Seconds of steps of 64 sequences while others wait: of the whole, and inside of the model."""
    engine, whole = side.model.engine, []
    prompts = [*bench.prompts(64, 8), *(bench.prompts(waiting, 8) if waiting else ())]
    params = SamplingParams(max_tokens=1000, seed=1, ignore_eos=True, **options)
    names = [engine.submit(Request(prompt, params)) for prompt in prompts]
    while len(engine.step()) < 64:
        pass
    for _ in range(bench.steps):
        start = time.perf_counter()
        engine.step()
        whole.append(time.perf_counter() - start)
    for name in names:
        engine.cancel(name)
    engine.run()
    return whole, spent[-bench.steps :]


@case
def drafts(bench: Bench) -> dict[str, Any]:
    """One answer with guessed tokens beside the same without: where none is right, and where many are."""
    return guessing.measured(bench.shape, 8 * bench.steps, bench.rounds)


@case
def load(bench: Bench) -> dict[str, Any]:
    """Seconds and peak memory of loading into each format, from disk and from the system's cache, beside `cat`."""
    return loading.loads(bench)


@case
def devices(bench: Bench) -> dict[str, Any]:
    """Two ranks of one thread, as stages and sharing out layers, beside one process with one thread and with two."""
    return ranks.layouts(bench)


@case
def pieces(bench: Bench) -> dict[str, Any]:
    """Two stages of one thread each: steps as zoo cuts them, not at all, in 2 and 4 pieces, and of two groups."""
    return ranks.pieces(bench)


@case
def apart(_: Bench) -> dict[str, Any]:
    """How far logits of quantised weights are off the plain ones, in one process and shared out among two."""
    return ranks.apart()


@case
def shares(bench: Bench) -> dict[str, Any]:
    """What each of two ranks reads of the files, holds of the weights, and takes at most while it loads."""
    return ranks.shares(bench)


def _turns(bench: Bench, sides: Sequence[Turn], prompts: Prompts, steps: int) -> dict[str, list[Timed]]:
    return turns(sides, prompts, steps, bench.rounds)


def _steps_at(bench: Bench, side: Side, lengths: Sequence[int]) -> list[float]:
    """The median decode step of one sequence after so many tokens, the least of several rounds over all lengths."""
    rounds = [[side.run(bench.prompts(1, length), bench.steps) for length in lengths] for _ in range(bench.rounds)]
    return [min(median(run.steps) for run in runs) for runs in zip(*rounds, strict=True)]


def _ratios(rates: dict[str, float]) -> dict[str, float]:
    """How many times faster zoo is than each peer."""
    return {name: rates["zoo"] / rate for name, rate in rates.items() if name != "zoo"}


def _honest(name: str) -> bool:
    """Whether a side reads all prompts of a batch."""
    return not name.startswith("llama.cpp")


def _total(batch: int, length: int, runs: Sequence[Timed]) -> float:
    """Tokens per second, those of the prompts too, of whole runs."""
    counted = (batch * (length + 1 + len(run.steps)) + run.meanwhile for run in runs)
    return median(tokens / (run.prefill + sum(run.steps)) for tokens, run in zip(counted, runs, strict=True))


def _compared(plan: Sequence[Arrival], found: dict[str, Any]) -> dict[str, Any]:
    rates = {name: side["new_tokens_per_second"] for name, side in found.items()}
    lengths = [(one.prompt, one.answer) for one in plan]
    return {"requests": len(plan), "lengths": lengths, "sides": found, "ratios": _ratios(rates)}
