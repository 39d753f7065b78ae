"""What commands that ask a model have in common: its loading, the request, and how the answer is written."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from zoo.cli.options import load_arguments
from zoo.registry.errors import RequestError

if TYPE_CHECKING:
    from zoo.engine.request import Chunk, Completion, Request
    from zoo.model import Model
    from zoo.prompts import Prompts


def ask(ref: str, flags: dict[str, Any], request: "Callable[[Prompts], Request]", *, as_json: bool) -> None:
    """Loads a model and writes its answer, as text while it comes or as one JSON object.

    request: makes what is asked of the model's texts, and is refused, before weights are read.
    """
    from zoo.cli.console import emit

    made: list[Request] = []

    def first(prompts: "Prompts") -> None:
        from zoo.engine.admission import check_length

        made.append(request(prompts))
        check_length(made[0].prompt, flags["max_context"] or prompts.card.context_length)

    with load_model(ref, flags, first) as model:
        chunks = model.engine.stream(made[0])
        if not as_json:
            write_stream(chunks)
            return
        *_, last = chunks
        assert last.completion is not None
        emit({**last.completion.to_dict(), "notes": [note for note in model.notes if note]})


def load_model(ref: str, flags: dict[str, Any], first: "Callable[[Prompts], object] | None" = None) -> "Model":
    """The model for a command, with a bar while it loads and a line on what was chosen; `first` as of `zoo.load`."""
    from zoo.api import layout, load
    from zoo.cli.console import loading_bar, note
    from zoo.garbage import without_collections

    spread = layout(ref, **load_arguments(flags))
    if spread is not None:
        note(f"{ref}: {spread}")
    with loading_bar(f"loading {ref}") as progress, without_collections(freeze=True):
        model = load(ref, progress=progress, first=first, **load_arguments(flags))
    note(f"{model.card.name}: {'; '.join(n for n in model.notes if n)}")
    return model


def read_sounds(sounds: tuple[str, ...]) -> list[bytes]:
    """The sounds' samples, read before the model is, so that a wrong path is told at once."""
    from zoo.text.sound import wav_of

    return [wav_of(sound, sound) for sound in sounds]


def check_encoders(ref: str, flags: dict[str, Any], images: Sequence[str], sounds: Sequence[str]) -> None:
    """RequestError, before the model is loaded, for images or sounds that it has no encoder of."""
    if not (images or sounds):
        return
    from zoo.api import inspect
    from zoo.hearing import encoder_of
    from zoo.prompts import vision_of

    plan = inspect(ref, overrides=load_arguments(flags)["overrides"]).plan
    if images:
        vision_of(plan, len(images))
    if sounds:
        encoder_of(plan)


def write_stream(chunks: "Iterable[Chunk]") -> None:
    """Print the chunks' text as it comes, then tool calls as a line of JSON, then one line of figures on stderr.

    Thinking goes to stderr.
    """
    from zoo.cli.console import emit

    last, begun, texts, calls = None, False, False, []
    for chunk in chunks:
        if chunk.thinking:
            click.secho(chunk.thinking, err=True, dim=True, nl=False)
            begun = True
        if chunk.text:
            click.echo(err=True, nl=begun)
            click.echo(chunk.text, nl=False)
            sys.stdout.flush()
            begun, texts = False, True
        calls += chunk.tool_calls
        last = chunk
    click.echo(err=True, nl=begun)
    if texts or not calls:
        click.echo()
    if calls:
        emit([call.to_dict() for call in calls])
    if last is not None and last.completion is not None:
        write_figures(last.completion)


def write_figures(completion: "Completion") -> None:
    """Token counts and speed on stderr."""
    from zoo.cli.console import note

    if completion.call_error:
        note(completion.call_error)
    usage, timings = completion.usage, completion.timings
    cached = f" ({usage.cached_tokens} cached)" if usage.cached_tokens else ""
    guessed = f", {usage.accepted_tokens} of {usage.drafted_tokens} drafts right" if usage.drafted_tokens else ""
    note(
        f"{usage.prompt_tokens} prompt{cached} + {usage.completion_tokens} new tokens, "
        f"first after {timings.prefill_s:.2f} s, {timings.tokens_per_second:.1f} tokens/s, "
        f"stopped by {completion.finish_reason}{guessed}"
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
