"""zoo beside its peers on this machine: named benchmarks, results as JSON, plots and tables from them.

    python -m tests.benchmarks prepare                     # writes the random models, once
    python -m tests.benchmarks decode --batch 1 8          # one benchmark; results are merged into the file
    python -m tests.benchmarks prefill decode overhead --peers transformers
    python -m tests.benchmarks --list
    python -m tests.benchmarks gates                       # what the results are to reach; fails where they do not
    python -m tests.benchmarks report                      # plots and tables of docs/benchmarks.md from the results
    python -m tests.benchmarks decode --shape tiny         # a quick try; says nothing

Sides read the same random weights, run one after the other in one process with the same number of threads, and take
turns; figures are medians. llama.cpp takes part where llama_cpp and gguf are installed (docs/benchmarks.md says how).
"""

import argparse
import json
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import zoo
from tests.benchmarks import gates
from tests.benchmarks.cases import CASES, Bench
from tests.benchmarks.report import report
from tests.benchmarks.shapes import SHAPES, folder_of
from zoo.bench.limits import multiply_rates
from zoo.machine import processor

DOCS = Path(__file__).parents[2] / "docs"


def machine() -> dict[str, Any]:
    """What was measured on, with the rate of large bfloat16 products."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return {
        "processor": processor(),
        "instructions": [
            flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if flag in flags
        ],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "bfloat16_multiply_adds_per_second": multiply_rates(torch.device("cpu"))["bfloat16"],
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("zoo-inference", "torch", "transformers", "llama-cpp-python"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*CASES, "prepare", "gates", "report", []], help="what to measure")
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--context", type=int, nargs="+")
    parser.add_argument("--prompt-tokens", type=int)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peers", nargs="*", choices=("transformers", "llama.cpp"))
    parser.add_argument("--models", type=Path, default=Path("build/benchmarks"), help="folder of the random models")
    parser.add_argument("--out", type=Path, default=DOCS / "benchmarks" / "cpu.json")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.list or not args.names:
        for name, case in CASES.items():
            sys.stdout.write(f"{name:18}{case.__doc__}\n")
        return
    # torch was imported before zoo could tell its threads how to wait; those of peers that come later are to wait as
    # libgomp has it, too.
    if os.environ.get("GOMP_SPINCOUNT") == zoo.SPINS:
        del os.environ["GOMP_SPINCOUNT"]
    able = [peer for peer in ("transformers", "llama.cpp") if find_spec(peer.replace("llama.cpp", "llama_cpp"))]
    bench = Bench(
        SHAPES[args.shape],
        args.models,
        able if args.peers is None else args.peers,
        args.batch,
        args.context,
        args.prompt_tokens,
        args.steps,
        args.rounds,
    )
    for name in args.names:
        if name == "prepare":
            folder_of(bench.shape, args.models, llama="llama.cpp" in bench.peers)
        elif name == "gates":
            judge(json.loads(args.out.read_text()))
        elif name == "report":
            report(json.loads(args.out.read_text()), DOCS)
        else:
            keep(args.out, name, CASES[name](bench), args)


def judge(results: dict[str, Any]) -> None:
    """Prints every aim; leaves with 1 where one was missed that this machine allows, or was not measured."""
    found = gates.verdicts(results)
    for one in found:
        aim = f"{'<=' if one.at_most else '>='} {one.aim:g}"
        value = "-" if one.found is None else f"{one.found:.3g}"
        sys.stdout.write(f"{one.what:54}{aim:>8}{value:>8}  {one.word}\n")
    if any(one.word in ("missed", "not measured") for one in found):
        sys.exit(1)


def keep(file: Path, name: str, result: dict[str, Any], args: argparse.Namespace) -> None:
    """Prints the result and merges it into the file, rows of a benchmark by their batch or length."""
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    file.parent.mkdir(parents=True, exist_ok=True)
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    about = {"date": datetime.now(UTC).date().isoformat(), "shape": args.shape}
    about |= {"machine": machine(), "versions": versions()}
    old = known.get(name, {})
    for key in ("rows", "sides"):
        if key in result and key in old and old.get("shape") == args.shape:
            result[key] = _merged(old[key], result[key])
    known[name] = about | result
    file.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")


def _merged(old: Any, new: Any) -> Any:
    if isinstance(old, dict):
        return old | new
    keys = ("batch", "prompt", "waiting", "sampling", "guesses")
    rows = {tuple(row.get(key) for key in keys): row for row in [*old, *new]}
    return [rows[key] for key in sorted(rows, key=lambda key: [k or 0 for k in key[:3]])]


if __name__ == "__main__":
    main()
