"""zoo fim: the text between two others."""

from typing import Any

import click

from zoo.cli.options import load_arguments, load_options, sample_arguments, sample_options
from zoo.cli.run import load_model, write_stream
from zoo.registry.errors import RequestError


@click.command()
@click.argument("ref")
@click.option("--prefix", help="The text before the gap. [default: nothing]")
@click.option("--suffix", help="The text after the gap. [default: nothing]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
@load_options
@sample_options
def fim(ref: str, prefix: str | None, suffix: str | None, as_json: bool, **flags: Any) -> None:
    """Fill in the text between a prefix and a suffix with REF, a code model with the feature fim."""
    from zoo.api import inspect
    from zoo.cli.console import emit
    from zoo.prompts import check_fills

    if prefix is None and suffix is None:
        raise RequestError("there is nothing around the gap", where="zoo fim", expected="--prefix, --suffix or both")
    between, options = (prefix or "", suffix or ""), sample_arguments(flags)
    check_fills(inspect(ref, overrides=load_arguments(flags)["overrides"]).card)
    with load_model(ref, flags) as model:
        if as_json:
            emit(model.fill(*between, **options).to_dict())
        else:
            write_stream(model.stream_fill(*between, **options))
