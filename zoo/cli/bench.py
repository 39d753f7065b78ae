"""zoo bench: how fast this machine is, and how fast it runs a model."""

from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from zoo.cli.options import load_arguments, load_options, parse_overrides, positive
from zoo.registry.errors import RequestError

if TYPE_CHECKING:
    from zoo.bench.guessing import Guessing
    from zoo.bench.measure import Measurement
    from zoo.bench.suite import Report
    from zoo.bench.traffic import Traffic
    from zoo.costs.profile import Limits

AT_LEAST_ONE = click.IntRange(min=1)
PROMPT_TOKENS = 512


@click.command()
@click.argument("ref", required=False)
@click.option("--machine", is_flag=True, help="Measure this machine anew and store that for `zoo inspect`.")
@click.option(
    "--batch",
    "batches",
    type=AT_LEAST_ONE,
    multiple=True,
    default=(1, 8, 32, 64, 256),
    show_default=True,
    help="Sequences that decode together. May be repeated.",
)
@click.option("--prompt-tokens", type=AT_LEAST_ONE, show_default="512, or half of a short context")
@click.option("--new-tokens", type=AT_LEAST_ONE, default=16, show_default=True, help="Decode steps to time.")
@click.option("--repeats", type=AT_LEAST_ONE, default=3, show_default=True, help="Of prefill.")
@click.option("--curves", is_flag=True, help="Also a step's time against context length and against batch.")
@click.option(
    "--requests", type=click.IntRange(min=0), default=24, show_default=True, help="That arrive while others run."
)
@click.option(
    "--longest", default=60.0, show_default=True, callback=positive, help="Seconds that reading prompts may take."
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@load_options
def bench(ref: str | None, machine: bool, as_json: bool, **flags: Any) -> None:
    """Measure REF's prefill and decode beside this machine's limits (`--weights random` needs no files).

    Interrupted, it shows what it has measured by then.
    """
    if ref is None and not machine:
        raise RequestError("there is nothing to measure", where="zoo bench", expected="REF, or --machine, or both")
    if ref is None:
        _refuse_of_models()
    from zoo.cli.console import emit

    found: dict[str, Any] = {}
    try:
        if machine:
            found["machine"] = _machine(flags["device"])
            if not as_json:
                _write_limits(found["machine"].limits)
        if ref is not None:
            _model(ref, flags, found)
    finally:
        if as_json:
            emit({name: value.model_dump() if name == "machine" else value.to_dict() for name, value in found.items()})
        elif "model" in found:
            _write(found["model"])


def _refuse_of_models() -> None:
    """RequestError for an option about a model, where none is measured."""
    context = click.get_current_context()
    for option in context.command.params:
        name = option.name or ""
        given = context.get_parameter_source(name) == ParameterSource.COMMANDLINE
        if given and name not in ("machine", "device", "as_json"):
            raise RequestError("the option is about a model", where=option.opts[0], found="no REF", expected="a REF")


def _machine(device: str) -> Any:
    from zoo.bench.machine import profile
    from zoo.cli.console import note
    from zoo.costs.profile import place, store
    from zoo.device import choose

    chosen = choose(device, "auto", "bfloat16").device
    place(chosen.type)  # before the minute that measuring takes
    measured = profile(chosen, note)
    note(f"stored in {store(measured, chosen.type)}")
    return measured


def _model(ref: str, flags: dict[str, Any], found: dict[str, Any]) -> None:
    """Fills `found["model"]` as figures come."""
    from zoo.api import check_fits
    from zoo.bench.limits import machine_limits
    from zoo.bench.suite import Options, Report, fill
    from zoo.cli.asking import load_model
    from zoo.cli.console import note
    from zoo.device import choose, describe

    flags["prompt_tokens"] = _prompt_tokens(ref, flags)  # before the seconds that measuring takes
    check_fits(ref, **load_arguments(flags))
    device = choose(flags["device"], "auto", "bfloat16").device
    note("the machine's limits")
    here = machine_limits(device)
    names = ("prompt_tokens", "new_tokens", "repeats", "curves", "requests", "longest", "batches")
    options = Options(**{name: flags[name] for name in names})
    if flags["max_batch_size"] is None:
        flags["max_batch_size"] = max(64, *options.batches)
    # Prompts that were read before would take no time when they are read again.
    flags["no_prefix_cache"] = True
    with load_model(ref, flags) as model:
        known, why = _stored(device, found.get("machine"))
        found["model"] = Report(model.card.name, describe(device), model.placement.dtype_name, here, known, why)
        fill(found["model"], model, options, note)


def _prompt_tokens(ref: str, flags: dict[str, Any]) -> int:
    """How long prompts are. Raises ZooError for a model that is not known or cannot be run, and for prompts that are
    longer than it reads."""
    from zoo.api import inspect

    names = ("dtype", "cache_dtype", "quantize")
    found = inspect(ref, overrides=parse_overrides(flags["overrides"]), **{name: flags[name] for name in names})
    most, asked = found.plan.card.context_length, flags["prompt_tokens"]
    if flags["max_context"] is not None:
        most = min(most, flags["max_context"])
    if asked is None:
        return max(1, min(PROMPT_TOKENS, most // 2))
    if asked >= most:
        raise RequestError(
            "the prompts leave no room for an answer",
            where="--prompt-tokens",
            found=f"{asked} tokens",
            expected=f"less than the {most} tokens of the context",
        )
    return int(asked)


def _stored(device: Any, fresh: Any) -> tuple[Any, str | None]:
    """The machine's profile, just measured or stored; else why there is none."""
    from zoo.costs.profile import stored
    from zoo.device import describe
    from zoo.registry.errors import ZooError

    try:
        return fresh or stored(device.type, describe(device) if device.type == "cuda" else None), None
    except ZooError as error:
        return None, str(error)


def _write_limits(limits: "Limits") -> None:
    from zoo.cli.console import columns

    rows = [["read", f"{rate / 1e9:.1f} GB/s", way] for way, rate in limits.read.items()]
    rows += [["multiply", f"{rate / 1e9:.0f} G multiply-adds/s", dtype] for dtype, rate in limits.multiply.items()]
    rows += [["call", f"{limits.call_s * 1e6:.2f} us", "the smallest operation"]]
    click.echo(columns(rows, heading=False))


def _write(report: "Report") -> None:
    from zoo.cli.console import columns

    click.echo(f"{report.name} in {report.dtype} on {report.device}")
    _write_limits(report.limits)
    for title, rows in {"": report.results, **report.curves}.items():
        if rows:
            head = ["WHAT", "BATCH", "CONTEXT", "tok/s", "ms", "OF READ", "OF MULTIPLY", "PREDICTED"]
            click.echo("\n" + (f"against {title}\n" if title else "") + columns([head, *map(_row, rows)]))
    if report.why:
        click.echo(f"no predictions: {report.why}")
    if report.guessing:
        click.echo("\n" + _guessing(report.guessing))
    if report.traffic:
        click.echo("\n" + _traffic(report.traffic))
    for left in report.left_out:
        click.echo(f"left out: {left['what']}: {left['why']}")


def _row(m: "Measurement") -> list[str]:
    rates = [f"{m.tokens_per_second:.1f}", f"{m.seconds * 1e3:.1f}"]
    return [m.kind, str(m.batch), str(m.context), *rates, f"{m.of_read:.0%}", f"{m.of_multiply:.0%}", _predicted(m)]


def _predicted(m: "Measurement") -> str:
    """The tokens per second that were predicted, and how far that is off."""
    if m.predicted is None:
        return "-"
    return f"{m.predicted:.1f} ({m.predicted / m.tokens_per_second - 1:+.0%}{'' if m.holds else ', off'})"


def _guessing(g: "Guessing") -> str:
    return (
        f"guessing ahead: {g.tokens_per_second:.1f} tok/s against {g.without_drafts:.1f} without, for {g.new_tokens} "
        f"tokens after a prompt of {g.prompt_tokens} that says the same twice; {g.accepted_tokens} of "
        f"{g.drafted_tokens} drafts right"
    )


def _traffic(t: "Traffic") -> str:
    return (
        f"{t.requests} requests of {t.prompt_tokens / t.requests:.0f} + {t.new_tokens / t.requests:.0f} tokens, "
        f"{t.in_flight:.1f} at a time: {t.new_tokens_per_second:.1f} new tokens/s; first after {t.first_median:.2f} s "
        f"(95 of 100 within {t.first_95:.2f} s), then one every {t.between_median * 1e3:.0f} ms "
        f"({t.between_95 * 1e3:.0f} ms)"
    )
