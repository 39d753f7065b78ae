"""All figures of a model, one after the other, so that what was measured is there whenever it is stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from zoo.bench.guessing import Guessing, measure_guessing
from zoo.bench.measure import (
    Measurement,
    answer_tokens,
    measure_decode,
    measure_prefill,
    work_of,
)
from zoo.bench.traffic import Traffic, arrivals, measure_traffic
from zoo.costs.forecast import Forecast, forecast
from zoo.costs.profile import Limits, Profile
from zoo.costs.work import grain_tokens
from zoo.registry.errors import ZooError

if TYPE_CHECKING:
    from zoo.model import Model

BATCHES = (1, 8, 32, 64, 256)
LONGER = 8
"""How much longer than the prompts the long context is, where the model and its memory allow that."""

CURVE_BATCHES = (1, 2, 4, 8, 16, 32, 64)
IN_FLIGHT = 8
"""Requests at a time that mixed traffic aims at."""


@dataclass(frozen=True)
class Case:
    """A figure to measure. part: results, or the curve that it is a point of: context, batch."""

    part: str
    kind: str
    batch: int
    context: int

    @property
    def words(self) -> str:
        many = "sequence" if self.batch == 1 else "sequences"
        return f"{self.kind} of {self.batch} {many} of {self.context} tokens"


@dataclass(frozen=True)
class Options:
    """What to measure.

    requests: of mixed traffic; 0 leaves it out. longest: seconds that reading the prompts of one figure may take
    before it is left out.
    """

    batches: Sequence[int] = BATCHES
    prompt_tokens: int = 512
    new_tokens: int = 16
    repeats: int = 3
    curves: bool = False
    requests: int = 24
    longest: float = 60.0


@dataclass
class Report:
    """What was measured so far. left_out: what was not, and why. why: there are no predictions."""

    name: str
    device: str
    dtype: str
    limits: Limits
    profile: Profile | None = None
    why: str | None = None
    results: list[Measurement] = field(default_factory=list)
    curves: dict[str, list[Measurement]] = field(default_factory=dict)
    traffic: Traffic | None = None
    guessing: Guessing | None = None
    left_out: list[dict[str, str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "name": self.name,
            "device": self.device,
            "dtype": self.dtype,
            "profile": None if self.profile is None else self.profile.key.model_dump() | {"why": self.why},
            "limits": self.limits.model_dump() | {"read_way": self.limits.read_way},
            "results": [r.to_dict() for r in self.results],
            "curves": {name: [r.to_dict() for r in points] for name, points in self.curves.items()},
            "traffic": None if self.traffic is None else asdict(self.traffic),
            "guessing": None if self.guessing is None else self.guessing.to_dict(),
            "left_out": self.left_out,
        }


def fill(report: Report, model: Model, options: Options, progress: Callable[[str], None]) -> None:
    """Measures everything that fits, into the report. `progress` is told what comes next."""
    for case in cases(model, options):
        why = _left_out(report, model, case, options)
        if why:
            report.left_out.append({"what": case.words, "why": why})
            continue
        progress(case.words)
        found = _measured(report, model, case, options)
        (report.results if case.part == "results" else report.curves.setdefault(case.part, [])).append(found)
    if model.engine.guesses:
        progress("guessing ahead")
        sizes = {"prompt_tokens": options.prompt_tokens, "new_tokens": options.new_tokens}
        report.guessing = measure_guessing(model, **sizes, repeats=options.repeats)
    if options.requests and report.results:
        progress(f"{options.requests} requests that arrive while others run")
        report.traffic = _traffic(report, model, options)


def cases(model: Model, options: Options) -> Iterator[Case]:
    """What to measure, in this order: the first prefill tells how long others take."""
    tokens, most = options.prompt_tokens, model.engine.sizes.max_context
    yield Case("results", "prefill", 1, tokens)
    for batch in options.batches:
        yield Case("results", "decode", batch, tokens)
    if (longer := min(LONGER * tokens, most - 64)) > tokens:
        yield Case("results", "prefill", 1, longer)
        yield Case("results", "decode", 1, longer)
    if options.curves:
        yield from (Case("batch", "decode", batch, min(64, tokens)) for batch in CURVE_BATCHES)
        length = 64
        while length <= most - 64:
            yield Case("context", "decode", 1, length)
            length *= 2


def _measured(report: Report, model: Model, case: Case, options: Options) -> Measurement:
    known = None if report.profile is None else _forecast(report, report.profile, model)
    if case.kind == "prefill":
        found = measure_prefill(model, report.limits, tokens=case.context, repeats=options.repeats)
        return found if known is None else replace(found, predicted=case.context / known.prefill(case.context).total)
    sizes = {"batch": case.batch, "context": case.context, "new_tokens": options.new_tokens}
    found = measure_decode(model, report.limits, **sizes)
    if known is None:
        return found
    return replace(found, predicted=case.batch / known.decode(case.batch, found.context).total)


def _forecast(report: Report, profile: Profile, model: Model) -> Forecast | None:
    """What predicts; None, and the report says why, where the profile has not the model's formats."""
    try:
        device = model.placement.device.type
        return forecast(profile, work_of(model), device, report.limits.bytes_per_second if device == "cpu" else None)
    except ZooError as error:
        report.why = str(error)
        return None


def _left_out(report: Report, model: Model, case: Case, options: Options) -> str | None:
    """Why a figure is not measured; None when it is."""
    new = 1 if case.kind == "prefill" else answer_tokens(model, case.batch, case.context, options.new_tokens)
    tokens = case.context + new
    if case.batch > model.engine.sizes.max_batch_size:
        return f"the engine runs {model.engine.sizes.max_batch_size} sequences at once; --max-batch-size allows more"
    if tokens > model.engine.sizes.max_context:
        return f"it needs {tokens} tokens of context, and there are {model.engine.sizes.max_context}"
    grain = grain_tokens(model.placement.device.type)
    need = case.batch * work_of(model).cache_bytes(-(-tokens // grain) * grain)
    have = model.memory.cache_budget
    if need > have:
        return f"its cache would take {need / 2**30:.1f} GiB, and {have / 2**30:.1f} GiB are free for it"
    seconds = _reading(report, case.batch * case.context)
    if seconds > options.longest:
        return f"reading its prompts would take some {seconds:.0f} s; --longest {seconds * 1.2:.0f} allows that"
    return None


def _reading(report: Report, tokens: int) -> float:
    """Seconds that so many tokens of prompts take, as the first measurement says."""
    return tokens / report.results[0].tokens_per_second if report.results else 0.0


def _traffic(report: Report, model: Model, options: Options) -> Traffic:
    """Requests that come as fast as some IN_FLIGHT of them can be served at a time."""
    long = min(options.prompt_tokens, model.engine.sizes.max_context // 2)
    prompts, answers = (max(1, long // 16), long), (8, min(64, model.engine.sizes.max_context // 4))
    decodes = [r for r in report.results if r.kind == "decode" and r.batch <= 2 * IN_FLIGHT]
    step = decodes[-1].seconds if decodes else report.results[0].seconds / 8
    sketch = arrivals(options.requests, 0.0, prompts, answers)
    each = _reading(report, sum(a.prompt for a in sketch)) / options.requests
    whole = step * sum(a.answer for a in sketch) / options.requests
    gap = max(each + whole / IN_FLIGHT, 1e-4)
    return measure_traffic(model, arrivals(options.requests, gap, prompts, answers, burst=IN_FLIGHT))
