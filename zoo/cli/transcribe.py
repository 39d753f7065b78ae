"""zoo transcribe: what is said in a sound."""

from typing import Any

import click

from zoo.cli.asking import ask, check_encoders, read_sounds
from zoo.cli.options import load_options, sample_arguments, sample_options


@click.command()
@click.argument("ref")
@click.argument("sound")
@click.option("--language", help="The language that is spoken, in two letters, such as en. [default: found out]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
@load_options
@sample_options
def transcribe(ref: str, sound: str, language: str | None, as_json: bool, **flags: Any) -> None:
    """Write down what is said in SOUND, a file or an address, with REF, a model with the feature audio."""
    from zoo.engine.request import SamplingParams

    params = SamplingParams.from_options(sample_arguments(flags))
    (heard,) = read_sounds((sound,))
    check_encoders(ref, flags, (), (sound,))
    ask(ref, flags, lambda prompts: prompts.transcription(heard, language, params), as_json=as_json)
