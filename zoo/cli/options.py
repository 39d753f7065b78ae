"""Flags that several commands share, and what they become."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from zoo.registry.errors import RequestError

Decorated = Callable[..., Any]

_LOAD = [
    click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:N, mps, or auto."),
    click.option("--dtype", default="auto", show_default=True, help="float32, bfloat16, float16, or auto."),
    click.option(
        "--cache-dtype", default="auto", show_default=True, help="int8, fp8, none, or auto: as the card says."
    ),
    click.option("--weights", default="auto", show_default=True, help="A folder or file, `random`, or auto."),
    click.option("--max-context", type=int, help="Tokens of prompt and answer together. [default: the card's]"),
    click.option("--max-batch-size", type=int, help="Sequences that may run together."),
    click.option("--devices", metavar="N", help="Devices to spread the model over, or a layout: tp=2,pp=2."),
    click.option("--quantize", help="int8 or int4: store large matrices so while loading."),
    click.option("--draft", metavar="lookup|REF", help="Guesses tokens ahead: the text so far, or a smaller model."),
    click.option("--adapter", "adapters", multiple=True, help="Adapter file or folder; may be repeated."),
    click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override a card's field."),
]

_SAMPLE = [
    click.option("--max-tokens", type=int, help="Stop after so many new tokens."),
    click.option("--temperature", type=float, help="0 takes the likeliest token; higher is more varied."),
    click.option("--top-p", type=float, help="Sample within this probability mass."),
    click.option("--top-k", type=int, help="Sample among the k likeliest tokens."),
    click.option("--min-p", type=float, help="Drop tokens below this share of the likeliest one."),
    click.option("--seed", type=int, help="Same seed, same answer."),
    click.option("--stop", multiple=True, help="Stop before this text; may be repeated."),
    click.option("--drafts", type=int, help="Check at most so many guessed tokens at once; 0 for none. Needs --draft."),
]

effort_option = click.option("--reasoning-effort", help="How much to think, as the chat format has it: none, high, ...")

SAMPLE_NAMES = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "drafts")
LOAD_NAMES = (
    "device",
    "dtype",
    "cache_dtype",
    "weights",
    "max_context",
    "max_batch_size",
    "devices",
    "quantize",
    "adapters",
    "draft",
)


def load_options(command: Decorated) -> Decorated:
    """Add the flags of `zoo.load`."""
    return _with(_LOAD, command)


def sample_options(command: Decorated) -> Decorated:
    """Add the flags of SamplingParams."""
    return _with(_SAMPLE, command)


def _with(options: Sequence[Callable[[Decorated], Decorated]], command: Decorated) -> Decorated:
    for option in reversed(options):
        command = option(command)
    return command


def load_arguments(flags: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `zoo.load` from the command's flags."""
    own = {"prefix_cache": False} if flags.get("no_prefix_cache") else {}
    return {**{name: flags[name] for name in LOAD_NAMES}, **own, "overrides": parse_overrides(flags["overrides"])}


def sample_arguments(flags: dict[str, Any]) -> dict[str, Any]:
    """Sampling options that were given, in range; those left out keep the engine's defaults. Drafts need a source."""
    from zoo.engine.request import SamplingParams, nothing_guesses

    given = {name: flags[name] for name in SAMPLE_NAMES if flags[name] not in (None, ())}
    params = SamplingParams.from_options(given)
    if params.drafts and flags["draft"] in (None, "none"):
        raise nothing_guesses(params.drafts)
    return given


def chat_options(flags: dict[str, Any]) -> dict[str, Any]:
    """Settings of the chat format that were given."""
    effort = flags["reasoning_effort"]
    return {} if effort is None else {"reasoning_effort": effort}


def positive(ctx: click.Context, option: click.Parameter, value: float) -> float:
    """A number above 0: a click callback, since click's ranges let nan through."""
    if not 0 < value < float("inf"):
        raise click.BadParameter(f"{value} is not a number above 0.", ctx, option)
    return value


def refuse_beside(other: str, message: str, given: Mapping[str, Any]) -> None:
    """RequestError, with a message about FLAG, for the first option that is given though `other` stands there."""
    for flag, value in given.items():
        if value is not None and value is not False and value != ():
            found = f"{other} as well"
            raise RequestError(message.replace("FLAG", flag), where=flag, found=found, expected="one of the two")


def parse_overrides(
    pairs: tuple[str, ...], where: str = "--set", form: str = "FIELD=VALUE, such as model.layers.0.mixer.window=1024"
) -> dict[str, Any] | None:
    """`--set a.b=3` pairs as dotted fields and values; a value is JSON where it parses, else text."""
    overrides: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise RequestError(
                "an override needs a name and a value",
                where=where,
                found=repr(pair),
                expected=form,
            )
        if name in overrides:
            raise RequestError("the field is set twice", where=f"--set {name}", found=f"{overrides[name]!r} and {text}")
        try:
            overrides[name] = json.loads(text)
        except json.JSONDecodeError:
            overrides[name] = text
    return overrides or None
