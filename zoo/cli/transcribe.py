"""zoo transcribe: what is said in a sound."""

from typing import Any

import click

from zoo.cli.options import load_options, sample_arguments, sample_options
from zoo.cli.run import answer, check_encoders, collect, read_sounds, write_stream


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
    from zoo.engine.request import SamplingParams

    params = SamplingParams.from_options(sample_arguments(flags))
    (heard,) = read_sounds((sound,))
    check_encoders(ref, flags, (), (sound,))
    with answer(ref, flags, lambda prompts: prompts.transcription(heard, language, params)) as (_, chunks):
        if as_json:
            emit(collect(chunks).to_dict())
        else:
            write_stream(chunks)
