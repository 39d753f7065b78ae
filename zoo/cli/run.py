"""zoo run: one prompt, one answer."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from zoo.cli.options import load_arguments, load_options, sample_arguments, sample_options
from zoo.registry.errors import RequestError

if TYPE_CHECKING:
    from zoo.engine.request import Chunk, Completion
    from zoo.model import Model


@click.command()
@click.argument("ref")
@click.option("--prompt", "-p", help="The prompt; `-` or nothing reads standard input.")
@click.option("--system", help="A system message before the prompt.")
@click.option("--raw", is_flag=True, help="Send the text as it is, not as a chat turn.")
@click.option("--image", "images", multiple=True, help="Picture to show the model; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
@load_options
@sample_options
def run(
    ref: str, prompt: str | None, system: str | None, raw: bool, images: tuple[str, ...], as_json: bool, **flags: Any
) -> None:
    """Answer one prompt with REF: a card's name, a card file or a checkpoint folder."""
    from zoo.cli.console import emit

    text = _prompt(prompt)
    if system is not None and raw:
        raise RequestError(
            "a system message needs the chat format", where="--system", found="--raw as well", expected="one of the two"
        )
    with load_model(ref, flags) as model:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": text}] if system else text
        options = {**sample_arguments(flags), "raw": raw, "images": images}
        if as_json:
            emit(model.generate(messages, **options)[0].to_dict())
        else:
            write_stream(model.stream(messages, **options))


def load_model(ref: str, flags: dict[str, Any]) -> "Model":
    """The model for a command, with a bar while it loads and a line on what was chosen."""
    from zoo.api import load
    from zoo.cli.console import loading_bar, note

    with loading_bar(f"loading {ref}") as progress:
        model = load(ref, progress=progress, **load_arguments(flags))
    note(f"{model.card.name}: {'; '.join(n for n in model.notes if n)}")
    return model


def write_stream(chunks: "Any") -> "Chunk | None":
    """Print the chunks' text as it comes, then one line of figures on stderr. Returns the last chunk."""
    last = None
    for chunk in chunks:
        click.echo(chunk.text, nl=False)
        sys.stdout.flush()
        last = chunk
    click.echo()
    if last is not None and last.completion is not None:
        write_figures(last.completion)
    return last


def write_figures(completion: "Completion") -> None:
    """Token counts and speed on stderr."""
    from zoo.cli.console import note

    usage, timings = completion.usage, completion.timings
    note(
        f"{usage.prompt_tokens} prompt + {usage.completion_tokens} new tokens, first after {timings.prefill_s:.2f} s, "
        f"{timings.tokens_per_second:.1f} tokens/s, stopped by {completion.finish_reason}"
    )


@contextmanager
def utf8_input() -> Iterator[None]:
    """Bytes on standard input that are no text are the user's fault."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise RequestError(
            "this is not text",
            where="standard input",
            found=f"the byte {error.object[error.start]:#04x} at {error.start}",
            expected=f"text in {error.encoding.upper()}",
        ) from None


def _prompt(prompt: str | None) -> str:
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise RequestError("there is no prompt", where="zoo run", expected='--prompt "..." or text on standard input')
    with utf8_input():
        text = sys.stdin.read()
    if not text:
        raise RequestError("there is no prompt", where="standard input", found="nothing", expected="the prompt's text")
    return text
