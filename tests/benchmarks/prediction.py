"""What `zoo inspect` predicts beside what is measured, of random weights: shapes like those that the paces of a
machine's parts are fitted on, and others, on which nothing was fitted.

    python -m tests.benchmarks.prediction                  # the machine and all shapes; renews docs/benchmarks.md
    python -m tests.benchmarks.prediction --machine        # only the first: others use what it stored
    python -m tests.benchmarks.prediction wide odd --format int8
    python -m tests.benchmarks.prediction --check          # judges the results: exit status 1 where one does not hold

Rows are merged into docs/benchmarks/predictions.json, and docs/benchmarks.md shows them. A prediction holds where
measured and predicted times differ by no more than a quarter. Memory is read before and after each shape; where it was
not as fast as when the machine was measured, the row is told and not judged: it was another machine.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import zoo
from tests.benchmarks.report import markdown
from zoo.bench import measure_decode, measure_prefill, work_of
from zoo.bench.limits import READ_BYTES, read_ways
from zoo.bench.machine import profile
from zoo.bench.measure import TOLERANCE
from zoo.bench.shapes import ATTENTION, MAMBA2, MIXERS, Node, card, gated, moe
from zoo.bench.timing import fastest
from zoo.costs.forecast import forecast
from zoo.costs.profile import Limits, Profile, store, stored

DOCS = Path(__file__).parents[2] / "docs"
FORMATS = ("bfloat16", "int8", "int4")
PROMPT, SHORT, FAR, STEPS = 512, 64, 4096, 24
"""Tokens of prompts and of sequences that decode; steps of each."""

SAME = 0.15
"""By how much memory may be faster or slower than when the machine was measured."""

PATIENCE = 8
"""Seconds to wait for it."""


@dataclass(frozen=True)
class Shape:
    """A model of equal layers. fitted: sizes are those from which the paces come, or near them."""

    dim: int
    repeat: int
    mixer: Node
    ffn: Node | None
    vocab: int = 32768
    fitted: bool = False

    def card(self, name: str) -> Node:
        layers = [{"repeat": self.repeat, "mixer": self.mixer, "ffn": self.ffn}]
        return card(name, dim=self.dim, layers=layers, vocab_size=self.vocab, context_length=8192)

    @property
    def cases(self) -> list[tuple[int, int]]:
        """Sequences that decode, and their tokens."""
        return [(1, PROMPT), (8, SHORT), (32, SHORT)] if self.fitted else [(1, PROMPT), (8, SHORT), (1, FAR)]


def heads(num_heads: int, num_kv_heads: int, head_dim: int) -> Node:
    return ATTENTION | {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}


SHAPES = {
    "dense": Shape(1024, 16, ATTENTION, gated(4096), fitted=True),
    "windowed": Shape(1024, 16, MIXERS["attention window"], gated(4096), fitted=True),
    "mixture": Shape(1024, 8, ATTENTION, moe(8, 2, 2048), fitted=True),
    "mamba": Shape(1024, 24, MAMBA2, None, fitted=True),
    "small": Shape(512, 8, heads(8, 4, 64), gated(2048), fitted=True),
    "wide": Shape(1536, 24, heads(12, 4, 128), gated(6144), 65536),
    "odd": Shape(896, 16, heads(14, 2, 64), gated(7840), 40000),
    "experts": Shape(768, 12, heads(12, 4, 64), moe(32, 4, 640), 24000),
    "states": Shape(1280, 20, MAMBA2 | {"num_heads": 40, "num_groups": 4, "state_size": 64}, None, 50000),
}


class Memory:
    """How fast memory is read now, over when the machine was measured."""

    def __init__(self, limits: Limits) -> None:
        self.data = torch.ones(READ_BYTES // 4)
        self.work, self.then = read_ways(self.data)[limits.read_way], limits.bytes_per_second

    def now(self) -> float:
        return self.data.nbytes / fastest(self.work, 3) / self.then

    def settled(self) -> float:
        """As soon as it is as fast as then, or when patience ends."""
        end = time.perf_counter() + PATIENCE
        while abs((found := self.now()) - 1) > SAME and time.perf_counter() < end:
            time.sleep(0.5)
        return found


def compare(name: str, machine: Profile, form: str, memory: Memory) -> Iterator[dict[str, Any]]:
    """Rows of one shape in one format of weights."""
    shape = SHAPES[name]
    kind = None if form == "bfloat16" else form
    options: dict[str, Any] = {"device": "cpu", "dtype": "bfloat16", "quantize": kind, "prefix_cache": False}
    with zoo.load(shape.card(name), weights="random", max_batch_size=32, **options) as model:
        known, before = forecast(machine, work_of(model)), memory.settled()
        found = measure_prefill(model, machine.limits, tokens=PROMPT, repeats=3)
        cases = [(found, known.prefill(PROMPT), PROMPT)]
        for batch, context in shape.cases:
            found = measure_decode(model, machine.limits, batch=batch, context=context, new_tokens=STEPS)
            cases.append((found, known.decode(batch, found.context), found.context))
        memories = [before, memory.now()]
    about = {"shape": name, "format": form, "parameters": zoo.inspect(shape.card(name)).parameters}
    about |= {"fitted": shape.fitted, "measured": machine.measured, "memory": memories}
    for m, p, tokens in cases:
        case = {"kind": m.kind, "batch": m.batch, "context": tokens, "of_limit": m.of_limit}
        times = {"measured_s": m.seconds, "fastest_s": m.fastest, "predicted_s": p.total, "ratio": p.total / m.seconds}
        yield about | case | times | {"terms": p.to_dict()}


def alike(row: Mapping[str, Any]) -> bool:
    """Whether memory was as fast as when the machine was measured."""
    return all(abs(rate - 1) <= SAME for rate in row["memory"])


def holds(row: Mapping[str, Any]) -> bool:
    return 1 / (1 + TOLERANCE) <= float(row["ratio"]) <= 1 + TOLERANCE


def line(row: Mapping[str, Any]) -> str:
    """A row for who waits for it."""
    terms = " ".join(f"{term} {value * 1e3:.2f}" for term, value in row["terms"].items())
    return (
        f"{row['shape']:9}{row['format']:9}{row['kind']:8}{row['batch']:3} of {row['context']:4}: "
        f"measured {row['measured_s'] * 1e3:8.2f} ms, predicted {row['predicted_s'] * 1e3:8.2f}, "
        f"ratio {row['ratio']:.2f}, of limit {row['of_limit']:.0%}, memory {row['memory'][0]:.2f} "
        f"{row['memory'][1]:.2f} ({terms})\n"
    )


# --- the results and the page -----------------------------------------------------------------------------------


def merged(known: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Old rows but those of shapes and formats that were measured anew, in the order of the shapes."""
    again = {(row["shape"], row["format"]) for row in new}
    rows = [row for row in known if (row["shape"], row["format"]) not in again and row["shape"] in SHAPES]
    return sorted([*rows, *new], key=lambda row: ([*SHAPES].index(row["shape"]), FORMATS.index(row["format"])))


def report(results: Mapping[str, Any], page: str) -> str:
    """The page with the part between its marks renewed."""
    rows, key = results["rows"], results["machine"]["key"]
    judged = [row for row in rows if alike(row)]
    days = sorted({row["measured"][:10] for row in rows})
    told = [
        f"{' and '.join(dict.fromkeys((days[0], days[-1])))}. {key['processor']}, {key['cores']} cores; "
        f"torch {key['torch']}; random weights, products in bfloat16. {sum(map(holds, judged))} of {len(judged)} hold"
        f"{', others (in brackets) met another memory' if len(judged) < len(rows) else ''}."
    ]
    for fitted, words in ((False, "Shapes on which nothing was fitted"), (True, "Shapes like the fitted ones")):
        if chosen := [row for row in rows if row["fitted"] == fitted]:
            told.append(f"{words}:\n\n{_table(chosen)}")
    middle = "\n\n".join(told)
    text, count = re.subn(
        r"(<!-- predictions: .*? -->\n).*?(\n<!-- end of predictions -->)",
        lambda found: f"{found[1]}\n{middle}\n{found[2]}",
        page,
        flags=re.DOTALL,
    )
    assert count == 1, "the page has no place for the predictions"
    return text


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each work of each shape, with every format beside it."""
    forms = [form for form in FORMATS if any(row["format"] == form for row in rows)]
    lines: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in rows:
        work = f"a prompt of {row['context']}" if row["kind"] == "prefill" else f"a step after {row['context']}"
        key = (row["shape"], f"{row['parameters'] / 1e6:.0f} M", work, str(row["batch"]))
        ratio = f"{row['ratio']:.2f}"
        ratio = f"({ratio})" if not alike(row) else ratio if holds(row) else f"**{ratio}**"
        value = f"{row['measured_s'] * 1e3:.1f} ms, {ratio}"
        lines.setdefault(key, {})[row["format"]] = value
    body = [[*key, *(found.get(form, "-") for form in forms)] for key, found in lines.items()]
    return markdown(["shape", "parameters", "work", "sequences", *forms], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="*", choices=[*SHAPES, []], help="all of them, if none is named")
    parser.add_argument("--format", nargs="+", choices=FORMATS, help="of weights; bfloat16 alone for fitted shapes")
    parser.add_argument("--machine", action="store_true", help="measure the machine, and no shape that is not named")
    parser.add_argument("--check", action="store_true", help="judge the stored results")
    parser.add_argument("--out", type=Path, default=DOCS / "benchmarks" / "predictions.json")
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}
    if args.check:
        judged = [row for row in results["rows"] if alike(row)]
        wrong = [row for row in judged if not holds(row)]
        sys.stdout.write("".join(map(line, wrong)) + f"{len(wrong)} of {len(judged)} do not hold\n")
        sys.exit(bool(wrong))
    measure(args, results)


def tell(what: str) -> None:
    sys.stderr.write(f"{what}\n")


def measure(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Measures what was asked for, keeps rows as they come, and renews the page."""
    if args.machine or not args.shape:
        store(profile(torch.device("cpu"), tell), "cpu")
    machine = stored("cpu")
    results["machine"] = machine.model_dump()
    names = args.shape or ([] if args.machine else [*SHAPES])
    memory = Memory(machine.limits)
    for name in names:
        for form in args.format or (FORMATS[:1] if SHAPES[name].fitted else FORMATS):
            rows = []
            for row in compare(name, machine, form, memory):
                rows.append(row)
                sys.stdout.write(line(row))
                sys.stdout.flush()
            results["rows"] = merged(results["rows"], rows)
            args.out.write_text(json.dumps(results, indent=1) + "\n")
    page = DOCS / "benchmarks.md"
    if names and args.out.parent == DOCS / "benchmarks":
        page.write_text(report(results, page.read_text()))


if __name__ == "__main__":
    main()
