"""zoo fim: the text between two others."""

from typing import Any

import click

from zoo.cli.asking import ask
from zoo.cli.options import load_options, parse_overrides, sample_arguments, sample_options
from zoo.registry.errors import RequestError
from zoo.registry.training import check_trained


@click.command()
@click.argument("ref")
@click.option("--prefix", help="The text before the gap. [default: nothing]")
@click.option("--suffix", help="The text after the gap. [default: nothing]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
@load_options
@sample_options
def fim(ref: str, prefix: str | None, suffix: str | None, as_json: bool, **flags: Any) -> None:
    """Fill in the text between a prefix and a suffix with REF, a code model with the feature fim."""
    from zoo.engine.request import SamplingParams
    from zoo.locating import locate

    if prefix is None and suffix is None:
        raise RequestError("there is nothing around the gap", where="zoo fim", expected="--prefix, --suffix or both")
    between, options = (prefix or "", suffix or ""), sample_arguments(flags)
    check_trained(locate(ref, parse_overrides(flags["overrides"])).card, "fim")
    params = SamplingParams.from_options(options)
    ask(ref, flags, lambda prompts: prompts.fill(*between, params), as_json=as_json)
