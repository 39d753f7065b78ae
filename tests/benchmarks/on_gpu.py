"""zoo on a GPU against the gates that its design sets itself, in one run of eight minutes at most.

    python -m tests.benchmarks.on_gpu --out gpu.json
    python -m tests.benchmarks.on_gpu --out gpu.json --only limits dense
    python -m tests.benchmarks.on_gpu --table gpu.json                      the table of a run, for docs/benchmarks.md

Measured are what the device copies and multiplies, the kernels one by one, and the shapes of three models with random
weights: a dense one, a mixture, a state-space model; decoding of 1, 64 and 256 sequences after 1024 tokens and a prompt
of 8192, with transformers' `generate` beside. A roofline is the larger of bytes over the copy rate and of operations
over the product rate, as both were measured in the same run: no program can be faster.

Every part is written to the file as soon as it is measured, so that a run that is cut off keeps what it had. What does
not fit the device, fails, or would begin after the time is up is left out, and the file says why.

--small runs the same parts with small shapes on any device, which shows that the script works and nothing else.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from math import prod
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

import zoo
from tests.benchmarks import gpu_kernels
from zoo.bench import decode_steps, multiply_adds_of_prompt, random_prompts, seconds, work_of
from zoo.bench.limits import copy_rates, multiply_rates, read_rates
from zoo.costs.work import Step

SECONDS = 480


@dataclass(frozen=True)
class Shape:
    """A model: its card, the bytes of device memory without which it is not tried, and what is measured of it.

    batches: sequences that decode. peers: those of them that transformers decodes too.
    """

    card: str | dict[str, Any]
    needs: int
    batches: tuple[int, ...]
    peers: tuple[int, ...]


DRAWN = 1 << 26
"""Numbers that are drawn at a time."""

ATTENTION = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "rope": {"theta": 1e4}}
GATED = {"kind": "gated", "hidden_dim": 96}
MIXTURE = {"kind": "moe", "num_experts": 4, "experts_per_token": 2, "expert": GATED}
MAMBA2: dict[str, Any] = {"kind": "mamba2", "num_heads": 16, "head_dim": 8, "num_groups": 2, "state_size": 16}
MAMBA2 |= {"conv_size": 4, "norm_eps": 1e-5}


def _small(mixer: dict[str, Any], ffn: dict[str, Any] | None) -> dict[str, Any]:
    model = {"dim": 64, "vocab_size": 160, "norm": {"kind": "rms", "eps": 1e-5}}
    layers = [{"repeat": 2, "mixer": mixer, "ffn": ffn}]
    return {"name": "small", "context_length": 512, "model": model | {"layers": layers}}


LARGE = {
    "dense": Shape("mistral-7b-v0.3", 20 << 30, (1, 64, 256), (1, 64)),
    "mixture": Shape("mixtral-8x7b", 105 << 30, (1, 64, 256), (1, 64)),
    "recurrent": Shape("mamba-codestral-7b", 20 << 30, (1, 64, 256), (1,)),
}
SMALL = {
    "dense": Shape(_small(ATTENTION, GATED), 0, (1, 3), (1,)),
    "mixture": Shape(_small(ATTENTION, MIXTURE), 0, (1, 3), (1,)),
    "recurrent": Shape(_small(MAMBA2, None), 0, (1, 3), (1,)),
}


@dataclass(frozen=True)
class Sizes:
    """How much is measured. context: tokens before those that are decoded. prompt: of one sequence alone."""

    shapes: dict[str, Shape]
    context: int
    prompt: int
    steps: int
    peer_steps: int
    attention: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    products: dict[str, tuple[int, int]]
    experts: tuple[int, int, int]
    room: int


FULL = Sizes(
    LARGE,
    context=1024,
    prompt=8192,
    steps=48,
    peer_steps=12,
    attention=((1, 1024), (64, 1024), (256, 1024), (8, 32768)),
    rows=(1, 2, 4, 8, 16, 64, 256),
    products={"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    experts=(8, 28672, 4096),
    room=1 << 30,
)
TINY = Sizes(
    SMALL,
    context=24,
    prompt=40,
    steps=4,
    peer_steps=2,
    attention=((1, 20), (3, 33)),
    rows=(1, 5),
    products={"gate_up": (64, 48)},
    experts=(3, 32, 48),
    room=1 << 16,
)


@dataclass(frozen=True)
class Gate:
    """What is asked. place: where the share of what is possible stands in the report. share: at least so much of it.

    rate: on an H200, what that share was reckoned to be, with its unit; at_most: the figure must not be larger instead.
    """

    what: str
    place: tuple[str, ...]
    share: float = 0.0
    rate: str = ""
    at_most: float | None = None


GATES = (
    Gate("dense, 1 sequence", ("dense", "decode", "1"), 0.85, "254 tokens/s"),
    Gate("dense, 64 sequences", ("dense", "decode", "64"), 0.75, "9000 tokens/s"),
    Gate("dense, 256 sequences", ("dense", "decode", "256"), 0.70, "16000 tokens/s"),
    Gate("dense, a prompt of 8192", ("dense", "prefill"), 0.70, "34000 tokens/s"),
    Gate("mixture, 1 sequence", ("mixture", "decode", "1"), 0.80, "135 tokens/s"),
    Gate("mixture, 64 sequences", ("mixture", "decode", "64"), 0.70, "1900 tokens/s"),
    Gate("attention over pages, 256 x 1024", ("attention", "256x1024"), 0.80, "3.4 TB/s"),
    Gate("microseconds between steps, 1 sequence", ("dense", "decode", "1"), at_most=40.0),
)


class Report:
    """What was measured so far, written to a file after each part. Parts begin while there is time."""

    def __init__(self, path: Path, device: torch.device, allowed: float, only: list[str]) -> None:
        self.path, self.only, self.began, self.allowed = path, only, time.perf_counter(), allowed
        name = torch.cuda.get_device_name() if device.type == "cuda" else str(device)
        self.data: dict[str, Any] = {
            "device": name,
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "versions": {"zoo": zoo.__version__, "torch": torch.__version__},
            "left_out": {},
        }

    @property
    def left(self) -> float:
        """Seconds until no part begins any more."""
        return self.allowed - (time.perf_counter() - self.began)

    def part(self, place: tuple[str, ...], measure: Callable[[], Any], takes: float = 5.0) -> bool:
        """Measures a part that takes about so many seconds, and writes it down; whether that went well."""
        name, start = " ".join(place), time.perf_counter()
        if self.left < takes:
            return self.leave(name, f"{self.left:.0f} seconds were left and it takes some {takes:.0f}")
        try:
            found = measure()
        except Exception as error:
            traceback.print_exc()
            return self.leave(name, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        self.put(place, found)
        sys.stderr.write(f"{name} ({time.perf_counter() - start:.1f} s): {json.dumps(found)}\n")
        return True

    def put(self, place: tuple[str, ...], found: Any) -> None:
        *above, last = place
        within = self.data
        for name in above:
            within = within.setdefault(name, {})
        within[last] = found
        self.write()

    def leave(self, name: str, why: str) -> bool:
        self.data["left_out"][name] = why
        sys.stderr.write(f"{name} is left out: {why}\n")
        self.write()
        return False

    def write(self) -> None:
        self.data["seconds"] = round(time.perf_counter() - self.began, 1)
        self.data["gates"] = judged(self.data)
        whole = self.path.with_suffix(".part")
        whole.write_text(json.dumps(self.data, indent=1) + "\n")
        whole.replace(self.path)


def limits(device: torch.device) -> dict[str, float]:
    """Bytes per second of a copy, read and written; operations per second of a bfloat16 product."""
    if device.type != "cuda":
        read, multiply = read_rates(1 << 24, 1), multiply_rates(device, 64, 1)
        return {"copy_bytes_per_second": max(read.values()), "operations_per_second": 2 * multiply["bfloat16"]}
    copy, multiply = copy_rates(device), multiply_rates(device)
    torch.cuda.empty_cache()
    return {"copy_bytes_per_second": max(copy.values()), "operations_per_second": 2 * multiply["bfloat16"]}


@contextmanager
def loaded(shape: Shape, device: torch.device, sizes: Sizes) -> Iterator[zoo.Model]:
    """The model with random weights, drawn where they are: the same ones on every device would take minutes."""

    def drawn(key: str, shape: tuple[int, ...], piece: Any) -> Iterator[torch.Tensor]:
        for first in range(0, prod(shape), DRAWN):
            yield torch.empty(min(DRAWN, prod(shape) - first), device=device).normal_(0.0, 0.02)

    longest = 2 * sizes.prompt if device.type == "cuda" else 256
    with patch("zoo.loading.load._drawn", drawn):
        model = zoo.load(
            shape.card,
            weights="random",
            device=str(device),
            dtype="bfloat16",
            max_batch_size=max(shape.batches),
            max_context=longest,
            prefix_cache=False,
        )
    try:
        yield model
    finally:
        model.close()


def emptied(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def shares(report: Report, took: float, read: float, multiply_adds: float) -> dict[str, float]:
    """The time that the device's limits allow, and its share of what was taken."""
    known = report.data["limits"]
    allowed = max(read / known["copy_bytes_per_second"], 2 * multiply_adds / known["operations_per_second"])
    return {"seconds": took, "roofline_seconds": allowed, "share": allowed / took}


def prefill(report: Report, model: zoo.Model, tokens: int) -> dict[str, float]:
    """A prompt of one sequence up to its first new token: the faster of two, after one that does not count."""

    def run(seed: int) -> float:
        prompts = random_prompts(model, 1, tokens, seed)
        return seconds(lambda: model.generate(prompts, max_tokens=1, temperature=0.0, ignore_eos=True))

    run(0)
    took, work = min(run(1), run(2)), work_of(model)
    found = shares(report, took, work.weight_bytes(Step(1, tokens, 0, 1)), multiply_adds_of_prompt(model, tokens))
    return found | {"tokens_per_second": tokens / took}


def decode(report: Report, model: zoo.Model, batch: int, sizes: Sizes, device: torch.device) -> dict[str, float]:
    """Steps of one token of each sequence: the median, and what of it is not the recorded step's own time."""
    run = decode_steps(model, random_prompts(model, batch, sizes.context, seed=batch), sizes.steps)
    took, work, step = median(run.steps), work_of(model), Step.decode(batch, round(run.context))
    found = shares(report, took, work.read_bytes(step), work.multiply_adds(step))
    found |= {"tokens_per_second": batch / took, "context": run.context}
    captured = model.engine._runner.captured if model.engine._runner else None
    if captured is not None and captured._steps:
        again = next(reversed(captured._steps.values())).run
        with torch.inference_mode():
            replay = gpu_kernels.replayed(again, 10) if device.type == "cuda" else seconds(again)
        found |= {"replay_seconds": replay, "between_microseconds": 1e6 * (took - replay)}
    return found


def measure_model(report: Report, name: str, sizes: Sizes, device: torch.device) -> None:
    """Everything of one shape by zoo; decoding of few sequences first."""
    shape = sizes.shapes[name]
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 1 << 62
    if memory < shape.needs:
        report.leave(name, f"it needs {shape.needs >> 30} GiB and the device has {memory >> 30}")
        return
    start = time.perf_counter()
    with loaded(shape, device, sizes) as model:
        report.put((name, "load_seconds"), time.perf_counter() - start)
        for batch in shape.batches:
            room, one = model.memory.cache_budget, work_of(model).cache_bytes(sizes.context + 2 * sizes.steps + batch)
            if room < batch * one:
                report.leave(f"{name} decode {batch}", f"the caches take {batch * one >> 30} GiB of {room >> 30}")
                continue
            report.part(
                (name, "decode", str(batch)), partial(decode, report, model, batch, sizes, device), 2 + batch / 10
            )
        report.part((name, "prefill"), lambda: prefill(report, model, sizes.prompt))


def measure_peer(report: Report, name: str, sizes: Sizes, device: torch.device) -> None:
    """transformers' `generate` on the same shape: whole batches of equal prompts, its best case."""
    shape = sizes.shapes[name]
    if name not in report.data:
        report.leave(f"{name} transformers", "zoo did not run it")
        return
    model = peer(shape, device)

    def run(batch: int, tokens: int, count: int) -> float:
        ids = torch.randint(3, 100, (batch, tokens), device=device)
        options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
        with torch.inference_mode():
            return seconds(lambda: model.generate(ids, max_new_tokens=count, min_new_tokens=count, **options))

    def step(batch: int) -> dict[str, float]:
        run(batch, sizes.context, 2)
        took = (run(batch, sizes.context, 1 + sizes.peer_steps) - run(batch, sizes.context, 1)) / sizes.peer_steps
        return {"seconds": took, "tokens_per_second": batch / took}

    def prompt() -> dict[str, float]:
        run(1, sizes.prompt, 1)
        took = run(1, sizes.prompt, 1)
        return {"seconds": took, "tokens_per_second": sizes.prompt / took}

    for batch in shape.peers:
        report.part((name, "transformers", str(batch)), partial(step, batch), 5 + batch / 8)
    if name != "recurrent":  # Without a package of its own it adds up all of a prompt's pairs in memory.
        report.part((name, "transformers", "prefill"), prompt)


def peer(shape: Shape, device: torch.device) -> Any:
    """transformers' model of the same sizes."""
    import transformers

    spec: Any = zoo.inspect(shape.card).plan.model
    mixer, ffn, common = spec.layers[0].mixer, spec.layers[0].ffn, {"vocab_size": spec.vocab_size}
    common |= {"hidden_size": spec.dim, "num_hidden_layers": len(spec.layers), "tie_word_embeddings": False}
    if mixer.kind == "mamba2":
        config: Any = transformers.Mamba2Config(
            **common,
            num_heads=mixer.num_heads,
            head_dim=mixer.head_dim,
            n_groups=mixer.num_groups,
            state_size=mixer.state_size,
            conv_kernel=mixer.conv_size,
            expand=mixer.num_heads * mixer.head_dim // spec.dim,
        )
    else:
        common |= {"num_attention_heads": mixer.num_heads, "num_key_value_heads": mixer.num_kv_heads}
        common |= {"head_dim": mixer.head_dim, "sliding_window": None, "max_position_embeddings": 32768}
        if ffn.kind == "moe":
            sizes = {"num_local_experts": ffn.num_experts, "num_experts_per_tok": ffn.experts_per_token}
            config = transformers.MixtralConfig(**common, **sizes, intermediate_size=ffn.form.hidden_dim)
        else:
            config = transformers.MistralConfig(**common, intermediate_size=ffn.hidden_dim)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return transformers.AutoModelForCausalLM.from_config(config).eval()
    finally:
        torch.set_default_dtype(before)


def measure_kernels(report: Report, sizes: Sizes, device: torch.device) -> None:
    """Attention over pages, products of few rows, and products of experts."""
    dtype, copy = torch.bfloat16, report.data["limits"]["copy_bytes_per_second"]

    def attention() -> dict[str, Any]:
        found = gpu_kernels.attention(device, dtype, sizes.attention, sizes.room)
        for case in found.values():
            rates = case["bytes_per_second"]
            case["share"] = rates.get(case["used"], rates["gathered"]) / copy
        return found

    def products() -> dict[str, Any]:
        found = gpu_kernels.products(device, dtype, sizes.products, sizes.rows, sizes.room)
        for case in found.values():
            case["share"] = case["bytes_per_second"] / copy
        return found

    with torch.inference_mode():
        report.part(("attention",), attention, 20)
        report.part(("products",), products, 40)
        report.part(("experts_ms",), lambda: gpu_kernels.experts(device, dtype, sizes.rows, sizes.experts))


def judged(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Every gate with what was found and whether that is enough; None for what was not measured."""
    verdicts = []
    for gate in GATES:
        found: Any = data
        for name in gate.place:
            found = found.get(name, {}) if isinstance(found, dict) else {}
        key = "share" if gate.at_most is None else "between_microseconds"
        value = found.get(key) if isinstance(found, dict) else None
        asked = gate.share if gate.at_most is None else gate.at_most
        passed = None if value is None else value >= asked if gate.at_most is None else value <= asked
        rate = {name: found[name] for name in ("tokens_per_second", "bytes_per_second") if value and name in found}
        verdicts.append(
            {"gate": gate.what, "asked": asked, "found": value, "passed": passed, "on_h200": gate.rate} | rate
        )
    return verdicts


def table(data: dict[str, Any]) -> str:
    """The report for docs/benchmarks.md."""
    known = data.get("limits", {"copy_bytes_per_second": 0.0, "operations_per_second": 0.0})
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    lines = [
        f"{data['date']}. {data['device']}; {versions}. Random weights, bfloat16, greedy. Measured in the same run: a "
        f"copy moves {known['copy_bytes_per_second'] / 1e12:.2f} TB/s, a product reaches "
        f"{known['operations_per_second'] / 1e12:.0f} TFLOP/s.",
        "",
        "| gate | asked | found | | rate | reckoned for an H200 |",
        "|---|---:|---:|---|---:|---:|",
    ]
    words = {True: "passed", False: "missed", None: "not measured"}
    for one in data["gates"]:
        share = one["asked"] <= 1
        asked, found = (
            "-" if value is None else f"{100 * value:.0f}%" if share else f"{value:.0f} µs"
            for value in (one["asked"], one["found"])
        )
        rate = f"{one['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in one else "-"
        lines.append(
            f"| {one['gate']} | {asked} | {found} | {words[one['passed']]} | {rate} | {one['on_h200'] or '-'} |"
        )
    lines += [
        "",
        "| shape | work | zoo, tokens/s | of roofline | transformers | ratio |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name in LARGE:
        theirs = data.get(name, {}).get("transformers", {})
        rows = {
            f"decode, {batch}": (found, theirs.get(batch))
            for batch, found in data.get(name, {}).get("decode", {}).items()
        }
        if "prefill" in data.get(name, {}):
            rows["prefill"] = (data[name]["prefill"], theirs.get("prefill"))
        for work, (found, other) in rows.items():
            rate = found["tokens_per_second"]
            beside = (
                f"{other['tokens_per_second']:,.0f} | {rate / other['tokens_per_second']:.2f}" if other else "- | -"
            )
            lines.append(f"| {name} | {work} | {rate:,.0f} | {100 * found['share']:.0f}% | {beside} |")
    lines += ["", *(f"- {name} was left out: {why}." for name, why in data["left_out"].items())]
    return "\n".join(lines).strip() + "\n"


PARTS = ("limits", "dense", "kernels", "mixture", "recurrent", "peers")


def measure(report: Report, sizes: Sizes, device: torch.device) -> None:
    """All parts, the ones that gates are about first."""
    if not report.part(("limits",), lambda: limits(device)):
        return
    for name in PARTS[1:]:
        if report.only and name not in report.only:
            continue
        try:
            if name == "kernels":
                measure_kernels(report, sizes, device)
            elif name in sizes.shapes:
                measure_model(report, name, sizes, device)
            else:
                report.data["versions"]["transformers"] = __import__("transformers").__version__
                for shape in sizes.shapes:
                    measure_peer(report, shape, sizes, device)
                    emptied(device)
        except Exception as error:
            traceback.print_exc()
            report.leave(name, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        emptied(device)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/gpu.json"), help="where results are written")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which no part begins any more")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=[], help="these parts; the limits always")
    parser.add_argument("--small", action="store_true", help="small shapes, on any device")
    parser.add_argument("--table", type=Path, help="print the table of a file of results, and measure nothing")
    args = parser.parse_args(arguments)
    if args.table:
        sys.stdout.write(table(json.loads(args.table.read_text())))
        return
    if not args.small and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is there; --small shows on any other that the script works")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    report = Report(args.out, device, args.seconds, args.only)
    measure(report, TINY if args.small else FULL, device)
    sys.stdout.write(table(report.data))


if __name__ == "__main__":
    main()
