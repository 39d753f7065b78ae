"""zoo transcribe: what is said in a sound."""

from typing import Any

import click

from zoo.cli.options import load_options, sample_arguments, sample_options
from zoo.cli.run import check_encoders, load_model, read_sounds, write_stream


@click.command()
@click.argument("ref")
@click.argument("sound")
@click.option("--language", help="The language that is spoken, in two letters, such as en. [default: found out]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
@load_options
@sample_options
def transcribe(ref: str, sound: str, language: str | None, as_json: bool, **flags: Any) -> None:
    """Write down what is said in SOUND, a file or an address, with REF, a model with the feature audio."""
    from zoo.cli.console import emit

    options = {"language": language, **sample_arguments(flags)}
    (heard,) = read_sounds((sound,))
    check_encoders(ref, flags, (), (sound,))
    with load_model(ref, flags) as model:
        if as_json:
            emit(model.transcribe(heard, **options).to_dict())
        else:
            write_stream(model.stream_transcribe(heard, **options))
