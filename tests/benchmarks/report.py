"""Results -> the tables of docs/benchmarks.md and docs/devices.md, and the plots beside them."""

import re
from collections.abc import Callable, Mapping, Sequence
from math import ceil, log2
from pathlib import Path
from typing import Any

from tests.benchmarks import gates

Line = Sequence[tuple[float, float]]

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 680, 380, 64, 48, 40, 190
# Middle tones, readable on light and on dark paper.
COLOURS = ("#d9480f", "#3b82c4", "#2f9e6e", "#9a6fd0", "#b08900", "#7a8794")


def report(results: Mapping[str, Any], docs: Path) -> None:
    """Writes the plots, and the pages' parts between their marks."""
    plots = docs / "benchmarks"
    if "decode" in results:
        (plots / "batch.svg").write_text(_batch_plot(results["decode"]))
    if "context" in results:
        (plots / "context.svg").write_text(_context_plot(results["context"]))
    parts = [_TABLES[name](results[name]) for name in _TABLES if name in results]
    aims = "What was asked of this shape on a CPU, and what came of it:\n\n" + gates.table(results, markdown)
    _put(docs / "benchmarks.md", "results", "\n\n".join([_machine(results), *parts, aims]))
    if {"devices", "pieces"} <= {*results}:
        speeds = [_speeds(results[name], head) for name, head in (("devices", "ranks"), ("pieces", "`pp=2`"))]
        _put(docs / "devices.md", "speeds", "\n\n".join([_of_ranks(results["devices"]), *speeds]))
    if "apart" in results:
        _put(docs / "devices.md", "errors", _apart(results["apart"]))
    if "shares" in results:
        _put(docs / "devices.md", "shares", _shares(results["shares"]))


def _put(page: Path, what: str, middle: str) -> None:
    text, count = re.subn(
        rf"(<!-- {what}: .*? -->\n).*?(\n<!-- end of {what} -->)",
        lambda found: f"{found[1]}\n{middle}\n{found[2]}",
        page.read_text(),
        flags=re.DOTALL,
    )
    assert count == 1, f"{page} has no place for the {what}"
    page.write_text(text)


# --- tables -----------------------------------------------------------------------------------------------------


def _machine(results: Mapping[str, Any]) -> str:
    shown = [results[name] for name in _TABLES if name in results] or [*results.values()]
    last = max(shown, key=lambda result: result["date"])
    machine, versions = last["machine"], last["versions"]
    bandwidth = max((r["read_bytes_per_second"] for r in results.values() if "read_bytes_per_second" in r), default=0.0)
    dates = sorted({result["date"] for result in results.values()})
    names = ", ".join(f"{name} {number}" for name, number in versions.items())
    return (
        f"{' and '.join(dict.fromkeys((dates[0], dates[-1])))}. {machine['processor']} with "
        f"{', '.join(machine['instructions'])}; {machine['threads']} threads on {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB.\nMeasured limits: {bandwidth / 1e9:.0f} GB/s read, "
        f"{machine['bfloat16_multiply_adds_per_second'] / 1e9:.0f} G multiply-adds/s in bfloat16. {names}."
    )


def _prefill(result: Mapping[str, Any]) -> str:
    table = _rates(result["rows"], "prompt", "tokens_per_second", ("of_multiply_limit", "of multiply limit"))
    return f"Prefill, tokens of one prompt per second:\n\n{table}"


def _decode(result: Mapping[str, Any]) -> str:
    table = _rates(result["rows"], "batch", "tokens_per_second", ("of_read_limit", "of read limit"))
    whole = _rates(
        [r for r in result["rows"] if len(r["total_tokens_per_second"]) > 1], "batch", "total_tokens_per_second"
    )
    return (
        "Decode, new tokens per second, all sequences together:\n\n"
        f"{table}\n\nWhole runs, tokens of prompts and answers per second:\n\n{whole}\n\n"
        "![tokens per second against sequences](benchmarks/batch.svg)"
    )


def _quantised(result: Mapping[str, Any]) -> str:
    ours, prefill, sizes = result["tokens_per_second"], result["prefill_tokens_per_second"], result["bytes"]
    rows = [
        [name, f"{sizes[name] / 1e9:.2f}", f"{rate:.1f}", f"{rate / ours['zoo']:.2f}", f"{prefill[name]:.0f}"]
        for name, rate in ours.items()
    ]
    head = ["", "GB", "decode tokens/s", "over zoo's bfloat16", "prefill tokens/s"]
    return f"Quantised weights, one sequence, a prompt of {result['prompt']}:\n\n{markdown(head, rows)}"


def _context(result: Mapping[str, Any]) -> str:
    rows = [[name, *(f"{1000 * s:.2f}" for s in kind["step_seconds"])] for name, kind in result["kinds"].items()]
    table = markdown(["ms per token", *map(str, result["contexts"])], rows)
    share = result["kinds"]["full"]["slope_of_read_limit"]
    return (
        f"One decode step against the context, four layers:\n\n{table}\n\nFull attention's slope is that of reading "
        f"the cache at {share:.0%} of the read limit.\n\n![milliseconds against context](benchmarks/context.svg)"
    )


def _mixed(result: Mapping[str, Any]) -> str:
    ours = result["sides"]["zoo"]["new_tokens_per_second"]
    rows = [
        [
            name,
            f"{side['new_tokens_per_second']:.1f}",
            f"{ours / side['new_tokens_per_second']:.2f}",
            f"{side['in_flight']:.0f}",
            f"{side['first_median']:.1f}",
        ]
        for name, side in result["sides"].items()
    ]
    head = ["", "new tokens/s", "zoo over it", "in flight", "first token after, s"]
    return f"Mixed traffic, {result['requests']} requests that arrive over time:\n\n{markdown(head, rows)}"


def _mixture(result: Mapping[str, Any]) -> str:
    rows = [
        [
            str(row["batch"]),
            f"{1000 * row['step_seconds']['dense']:.1f}",
            f"{1000 * row['step_seconds']['mixture']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['bytes_ratio']:.2f}",
        ]
        for row in result["rows"]
    ]
    head = ["batch", "dense, ms", "mixture, ms", "ratio", "ratio of bytes to read"]
    return (
        "Eight experts, two active, beside a dense model of the active parameters, per step "
        f"({result['layers']} layers):\n\n{markdown(head, rows)}"
    )


def _recurrent(result: Mapping[str, Any]) -> str:
    read, made = (_rates(result["rows"], "batch", rate) for rate in ("prefill_tokens_per_second", "tokens_per_second"))
    return (
        "A state-space model (Mamba 2) of this size, whose kernels transformers has for CUDA only; tokens of prompts "
        f"per second:\n\n{read}\n\nnew tokens per second:\n\n{made}"
    )


def _overhead(result: Mapping[str, Any]) -> str:
    rows = [
        [
            row["sampling"],
            str(row["waiting"]),
            f"{1000 * row['step_seconds']:.0f}",
            f"{1000 * row['outside_seconds']:.2f}",
            f"{row['share']:.1%}",
        ]
        for row in result["rows"]
    ]
    head = ["sampling", "waiting", "step, ms", "outside of the model, ms", "share"]
    return f"The engine's own time in a step of {result['batch']} sequences:\n\n{markdown(head, rows)}"


def _drafts(result: Mapping[str, Any]) -> str:
    rows = [
        [
            row["guesses"],
            f"{1000 * row['seconds_per_token']:.1f}",
            f"{row['speed']:.2f}",
            f"{row['accepted_tokens']} of {row['drafted_tokens']}",
        ]
        for row in result["rows"]
    ]
    head = ["what guesses", "ms per token", "over no guesses", "right"]
    return (
        f"Guessed tokens, an answer of {result['answer']} after a prompt of {result['prompt']}, what is said written "
        f"down beforehand:\n\n{markdown(head, rows)}"
    )


def _load(result: Mapping[str, Any]) -> str:
    rows = []
    for name, side in result["sides"].items():
        rates = [f"{result['file_bytes'] / side[f'{place}_seconds'] / 1e9:.1f}" for place in ("cold", "warm")]
        token, peak = (side.get(what) for what in ("cold_first_token_seconds", "cold_peak_over_weights"))
        rows.append([name, *rates, "-" if token is None else f"{token:.1f}", "-" if peak is None else f"{peak:.2f}"])
    head = ["to", "cold, GB/s", "from the system's cache, GB/s", "first token, cold, s", "peak memory over weights"]
    size = f"{result['file_bytes'] / 1e9:.1f} GB"
    return f"Loading {size} of bfloat16, and one token after that:\n\n{markdown(head, rows)}"


def _of_ranks(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    return (
        f"{result['date']}, {machine['processor']} with {', '.join(machine['instructions'])}, {machine['cores']} cores."
        f" Tokens per second of sequences that decode together, and of a prompt of {result['prompt']} tokens:"
    )


def _speeds(result: Mapping[str, Any], head: str) -> str:
    decode, prompt = result["decode_tokens_per_second"], result["prefill_tokens_per_second"]
    columns = [*decode.values(), prompt]
    rows = [[name, *(f"{column[name]:.0f}" for column in columns)] for name in prompt]
    return markdown([head, *(f"{batch} sequences" for batch in decode), "prompt"], rows)


def _apart(result: Mapping[str, Any]) -> str:
    errors = result["relative_errors"]
    rows = [[kind, *(f"{error:.2%}" for error in pairs.values())] for kind, pairs in errors.items()]
    return markdown(["", "one process, off the plain weights", "`tp=2`, off them", "`tp=2`, off one process"], rows)


def _shares(result: Mapping[str, Any]) -> str:
    """Ranks that are alike in a row together."""
    layouts: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for rank in result["ranks"]:
        layouts.setdefault((rank["layout"], rank["quantize"]), []).append(rank)
    rows = []
    for (layout, kind), ranks in layouts.items():
        name = "1 process" if layout == "1" else f"each of `{layout}`"
        columns = ([round(rank[what] / 1e6) for rank in ranks] for what in ("reads", "holds", "grows"))
        rows.append([name, kind, *(" and ".join(map(str, dict.fromkeys(column))) for column in columns)])
    return markdown(["", "`--quantize`", "reads", "holds", "grows"], rows)


_TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "prefill": _prefill,
    "decode": _decode,
    "quantised": _quantised,
    "mixed": _mixed,
    "mixed-continuous": _mixed,
    "mixture": _mixture,
    "context": _context,
    "recurrent": _recurrent,
    "overhead": _overhead,
    "drafts": _drafts,
    "load": _load,
}


def _rates(rows: Sequence[Mapping[str, Any]], first: str, rate: str, limit: tuple[str, str] | None = None) -> str:
    """A row for each of `rows`: every side's rate, and in brackets how many times faster zoo is.

    limit: key and heading of the share of a limit that zoo reached.
    """
    names = list(dict.fromkeys(name for row in rows for name in row[rate]))
    head = [first, *names, *([limit[1]] if limit else [])]
    lines = []
    for row in rows:
        cells = [str(row[first])]
        for name in names:
            found = row[rate].get(name)
            ratio = "" if name == "zoo" or found is None else f" ({row[rate]['zoo'] / found:.2f})"
            cells.append("-" if found is None else f"{found:.1f}{ratio}")
        lines.append([*cells, *([f"{row[limit[0]]:.0%}"] if limit else [])])
    return markdown(head, lines)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- plots ------------------------------------------------------------------------------------------------------


def _batch_plot(result: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["tokens_per_second"]))
    lines = {
        name: [(r["batch"], r["tokens_per_second"][name]) for r in result["rows"] if name in r["tokens_per_second"]]
        for name in names
    }
    return plot("Decode: new tokens per second, all sequences", "sequences", lines)


def _context_plot(result: Mapping[str, Any]) -> str:
    lines = {
        name: [(x, 1000 * y) for x, y in zip(result["contexts"], kind["step_seconds"], strict=True)]
        for name, kind in result["kinds"].items()
    }
    return plot("Milliseconds per token", "tokens of context", lines)


def plot(title: str, across: str, lines: Mapping[str, Line]) -> str:
    """An SVG of curves over powers of two, from zero up."""
    xs = sorted({x for line in lines.values() for x, _ in line})
    top = _round_up(max(y for line in lines.values() for _, y in line))
    low, span = log2(xs[0]), max(log2(xs[-1]) - log2(xs[0]), 1.0)

    def place(x: float, y: float) -> tuple[float, float]:
        wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return LEFT + (log2(x) - low) / span * wide, HEIGHT - BOTTOM - y / top * high

    parts = [f'<text x="{LEFT}" y="22" class="title">{title}</text>']
    for share in range(5):
        x, y = place(xs[0], top * share / 4)
        parts.append(f'<path class="grid" d="M{x:.1f} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{top * share / 4:g}</text>')
    for x in xs:
        parts.append(f'<text x="{place(x, 0)[0]:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{across}</text>')
    for number, (name, line) in enumerate(lines.items()):
        colour, points = COLOURS[number % len(COLOURS)], [place(x, y) for x, y in line]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        parts.append(f'<path fill="none" stroke="{colour}" stroke-width="2" d="M{path}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in points]
        y = TOP + 8 + 20 * number
        parts.append(f'<circle cx="{WIDTH - RIGHT + 20}" cy="{y}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 30}" y="{y + 4}">{name}</text>')
    style = (
        "text{font:12px system-ui,sans-serif;fill:#57606a}.title{font-size:14px;font-weight:600}"
        ".grid{stroke:#8b949e;stroke-opacity:.35}@media(prefers-color-scheme:dark){text{fill:#a9b3bd}}"
    )
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">\n'
        f"<style>{style}</style>\n{body}\n</svg>\n"
    )


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 6, 8 times a power of ten."""
    power = 1.0
    while power * 10 < value:
        power *= 10
    while power > value:
        power /= 10
    return next(m * power for m in (1, 2, 4, 6, 8, 10) if m * power >= value) if value else float(ceil(value) or 1)
