"""What `zoo inspect` predicts beside what is measured, of random weights: shapes like those that the paces of a
machine's parts are fitted on, and others, on which nothing was fitted.

    python -m tests.benchmarks.prediction                  # the machine and all shapes; renews docs/benchmarks.md
    python -m tests.benchmarks.prediction --machine        # only the first: others use what it stored
    python -m tests.benchmarks.prediction wide odd --format int8
    python -m tests.benchmarks.prediction --check          # judges the results: exit status 1 where one does not hold

Rows are merged into docs/benchmarks/predictions.json, and docs/benchmarks.md shows them. A prediction holds where
measured and predicted times differ by no more than a quarter. Memory is read before and after each measurement, and the
prediction is for that rate; where it changed meanwhile, the measurement is tried again, and in the end told and not
judged.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import zoo
from tests.benchmarks.report import markdown
from zoo.bench import measure_decode, measure_prefill, work_of
from zoo.bench.limits import reading
from zoo.bench.machine import Rate, profile, steadily
from zoo.bench.measure import TOLERANCE
from zoo.bench.shapes import ATTENTION, MAMBA2, MIXERS, Node, card, gated, moe
from zoo.costs.forecast import forecast
from zoo.costs.profile import Profile, store, stored

DOCS = Path(__file__).parents[2] / "docs"
FORMATS = ("bfloat16", "int8", "int4")
PROMPT, SHORT, FAR, STEPS = 512, 64, 4096, 24
"""Tokens of prompts and of sequences that decode; steps of each."""


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


def compare(name: str, machine: Profile, form: str, rate: Rate) -> Iterator[dict[str, Any]]:
    """Rows of one shape in one format of weights."""
    shape = SHAPES[name]
    kind = None if form == "bfloat16" else form
    options: dict[str, Any] = {"device": "cpu", "dtype": "bfloat16", "quantize": kind, "prefix_cache": False}
    with zoo.load(shape.card(name), weights="random", max_batch_size=32, **options) as model:
        work, limits = work_of(model), machine.limits
        cases = [partial(measure_prefill, model, limits, tokens=PROMPT, repeats=3)]
        for batch, context in shape.cases:
            cases.append(partial(measure_decode, model, limits, batch=batch, context=context, new_tokens=STEPS))
        measured = [steadily(rate, case) for case in cases]
    about = {"shape": name, "format": form, "parameters": zoo.inspect(shape.card(name)).parameters}
    about |= {"fitted": shape.fitted, "measured": machine.measured}
    for m, now, steady in measured:
        known, read = forecast(machine, work, memory=now), m.kind == "prefill"
        p = known.prefill(PROMPT) if read else known.decode(m.batch, m.context)
        case = {"kind": m.kind, "batch": m.batch, "context": PROMPT if read else m.context}
        times = {"measured_s": m.seconds, "fastest_s": m.fastest, "predicted_s": p.total, "ratio": p.total / m.seconds}
        met = {"of_limit": m.of_limit, "memory": now, "steady": steady}
        yield about | case | times | met | {"terms": p.to_dict()}


def holds(row: Mapping[str, Any]) -> bool:
    return 1 / (1 + TOLERANCE) <= float(row["ratio"]) <= 1 + TOLERANCE


def line(row: Mapping[str, Any]) -> str:
    """A row for who waits for it."""
    terms = " ".join(f"{term} {value * 1e3:.2f}" for term, value in row["terms"].items())
    return (
        f"{row['shape']:9}{row['format']:9}{row['kind']:8}{row['batch']:3} of {row['context']:4}: "
        f"measured {row['measured_s'] * 1e3:8.2f} ms, predicted {row['predicted_s'] * 1e3:8.2f}, "
        f"ratio {row['ratio']:.2f}, of limit {row['of_limit']:.0%}, memory "
        f"{row['memory'] / 1e9:.0f} GB/s{'' if row['steady'] else ', not steady'} ({terms})\n"
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
    judged = [row for row in rows if row["steady"]]
    days = sorted({row["measured"][:10] for row in rows})
    told = [
        f"{' and '.join(dict.fromkeys((days[0], days[-1])))}. {key['processor']}, {key['cores']} cores; "
        f"torch {key['torch']}; random weights, products in bfloat16. {sum(map(holds, judged))} of {len(judged)} hold"
        f"{', others (in brackets) met memory that changed meanwhile' if len(judged) < len(rows) else ''}."
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
        ratio = f"({ratio})" if not row["steady"] else ratio if holds(row) else f"**{ratio}**"
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
        judged = [row for row in results["rows"] if row["steady"]]
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
    rate = reading(machine.limits)
    for name in names:
        for form in args.format or (FORMATS[:1] if SHAPES[name].fitted else FORMATS):
            rows = []
            for row in compare(name, machine, form, rate):
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
