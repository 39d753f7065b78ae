"""What the figures of the 1.1 B shape on a CPU are to reach, and whether they do."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """A figure beside its aim.

    at_most: the aim is a ceiling. found: None where it was not measured. possible: what the figure would be if zoo ran
    at the machine's measured limit and the peer as it did; None where no limit is known.
    """

    what: str
    aim: float
    found: float | None
    possible: float | None = None
    at_most: bool = False

    @property
    def word(self) -> str:
        if self.found is None:
            return "not measured"
        if self.found <= self.aim if self.at_most else self.found >= self.aim:
            return "reached"
        return "missed" if self.possible is None or self.possible >= self.aim else "beyond this machine"


def verdicts(results: Results) -> list[Verdict]:
    """Every aim, in the order of the benchmarks."""
    return [verdict for part in (_decode, _prefill, _quantised, _batch, _rest) for verdict in part(results)]


def _decode(results: Results) -> Iterator[Verdict]:
    row = _row(results, "decode", "batch", 1)
    share = row.get("of_read_limit")
    yield Verdict("decode, one sequence: share of the read limit", 0.75, share, 1.0)
    for peer, aim in (("transformers", 2.2), ("llama.cpp bf16", 1.3)):
        yield _beside(f"decode, one sequence: over {peer}", aim, row.get("ratios", {}).get(peer), share)


def _prefill(results: Results) -> Iterator[Verdict]:
    row = _row(results, "prefill", "prompt", 512)
    for peer, aim in (("transformers", 1.2), ("llama.cpp bf16", 4.0)):
        found = row.get("ratios", {}).get(peer)
        yield _beside(f"prefill of 512: over {peer}", aim, found, row.get("of_multiply_limit"))


def _quantised(results: Results) -> Iterator[Verdict]:
    rates, sizes = (results.get("quantised", {}).get(name, {}) for name in ("tokens_per_second", "bytes"))
    for kind, aim, peer in (("int8", 1.7, "q8_0"), ("int4", 2.6, "q4_0")):
        ours = rates.get(f"zoo {kind}")
        yield Verdict(f"{kind} decode: over bfloat16 of 16 bits", aim, _over(ours, rates.get("zoo unpacked")))
        yield Verdict(
            f"{kind} decode: over packed bfloat16",
            aim,
            _over(ours, rates.get("zoo")),
            _over(sizes.get("zoo"), sizes.get(f"zoo {kind}")),
        )
        yield Verdict(f"{kind} decode: over llama.cpp {peer}", 1.0, _over(ours, rates.get(f"llama.cpp {peer}")))


def _batch(results: Results) -> Iterator[Verdict]:
    found = _row(results, "decode", "batch", 8).get("total_ratios", {}).get("transformers")
    yield Verdict("whole runs of 8: over transformers", 1.6, found)
    ratios = [r for name, r in results.get("mixed", {}).get("ratios", {}).items() if "batches of" in name]
    yield Verdict("mixed traffic: over transformers' best batches", 3.0, min(ratios, default=None))


def _rest(results: Results) -> Iterator[Verdict]:
    ratio = _row(results, "mixture", "batch", 1).get("ratio")
    yield Verdict("mixture, one sequence: over dense", 1.25, ratio, at_most=True)
    rows = results.get("overhead", {}).get("rows", [])
    share = max((row["share"] for row in rows), default=None)
    yield Verdict("engine of 64, any sampling: share of a step", 0.03, share, at_most=True)
    times = {(r["sampling"], r["waiting"]): r["outside_seconds"] for r in rows}
    more = _over(times.get(("greedy", 4000)), times.get(("greedy", 0)))
    yield Verdict("engine of 64: with 4000 waiting over none", 1.1, more, at_most=True)
    kinds = results.get("context", {}).get("kinds", {})
    for name in ("window of 1024", "recurrent"):
        times = kinds.get(name, {}).get("step_seconds")
        # A window is full from the second length on.
        yield Verdict(
            f"context of 8192 over 1024: {name}", 1.1, times and _over(times[-1], min(times[1:3])), at_most=True
        )


def _beside(what: str, aim: float, found: float | None, share: float | None) -> Verdict:
    """A ratio to a peer, of which zoo reached a share of the machine's limit."""
    return Verdict(what, aim, found, found / share if found and share else None)


def _row(results: Results, name: str, key: str, value: int) -> Mapping[str, Any]:
    return next((row for row in results.get(name, {}).get("rows", []) if row[key] == value), {})


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


Table = Callable[[list[str], list[list[str]]], str]


def table(results: Results, draw: Table) -> str:
    """The verdicts as a table of the docs."""
    rows = [
        [
            one.what,
            f"{'at most' if one.at_most else 'at least'} {one.aim:g}",
            "-" if one.found is None else f"{one.found:.3g}",
            "" if one.possible is None else f"{one.possible:.3g}",
            one.word,
        ]
        for one in verdicts(results)
    ]
    return draw(["aim", "asked", "found", "at the machine's limit", ""], rows)
