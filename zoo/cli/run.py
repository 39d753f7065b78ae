"""zoo run: one prompt, one answer."""

import gc
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zoo.cli.options import chat_options, effort_option, load_arguments, load_options, sample_arguments, sample_options
from zoo.registry.errors import RequestError

if TYPE_CHECKING:
    from zoo.engine.request import Chunk, Completion, Request
    from zoo.model import Model
    from zoo.prompts import Prompts


@click.command()
@click.argument("ref")
@click.option("--prompt", "-p", help="The prompt; `-` or nothing reads standard input.")
@click.option("--system", help="A system message before the prompt.")
@click.option("--raw", is_flag=True, help="Send the text as it is, not as a chat turn.")
@click.option("--image", "images", multiple=True, help="Picture to show the model; may be repeated.")
@click.option("--audio", "sounds", multiple=True, help="Sound to let the model hear; may be repeated.")
@click.option("--tools", metavar="FILE", help="Functions that the model may call: a JSON list in OpenAI's form.")
@effort_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
@load_options
@sample_options
def run(
    ref: str,
    prompt: str | None,
    system: str | None,
    raw: bool,
    images: tuple[str, ...],
    sounds: tuple[str, ...],
    tools: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Answer one prompt with REF: a card's name, a card file or a checkpoint folder."""
    from zoo.cli.console import emit

    if raw:
        others = {"--system": system, "--tools": tools, "--reasoning-effort": flags["reasoning_effort"]}
        _refuse_with_raw({**others, "--audio": sounds or None})
    text = "" if sounds and prompt is None else _prompt(prompt)
    heard = read_sounds(sounds)
    definitions = None if tools is None else read_tools(tools)
    form = chat_options(flags)
    options = sample_arguments(flags)
    check_encoders(ref, flags, images, sounds)

    def ask(prompts: "Prompts") -> "Request":
        from zoo.engine.request import SamplingParams
        from zoo.hearing import user_message

        params = SamplingParams.from_options(options)
        if system is None and definitions is None and not form:
            return prompts.request(text, params, raw=raw, images=images, audio=heard)
        turns = [{"role": "system", "content": system}] if system else []
        messages = [*turns, user_message(text, heard)]
        return prompts.chat(messages, params, images=images, tools=definitions, options=form)

    with answer(ref, flags, ask) as (model, chunks):
        if as_json:
            emit({**collect(chunks).to_dict(), "notes": [note for note in model.notes if note]})
        else:
            write_stream(chunks)


def _refuse_with_raw(given: dict[str, Any]) -> None:
    for flag, value in given.items():
        if value is not None:
            raise RequestError(
                f"{flag} needs the chat format", where=flag, found="--raw as well", expected="one of the two"
            )


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


def read_tools(name: str) -> list[Any]:
    """The function definitions of a file. RequestError for one that is no JSON list."""
    try:
        tools = json.loads(Path(name).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError("the tools cannot be read", where=name, found=str(error), expected="a JSON list") from None
    if not isinstance(tools, list):
        raise RequestError("these are no tools", where=name, found=type(tools).__name__, expected="a JSON list")
    return tools


def collect(chunks: "Iterator[Chunk]") -> "Completion":
    """The completion of a stream that was read to its end."""
    *_, last = chunks
    assert last.completion is not None
    return last.completion


@contextmanager
def answer(
    ref: str, flags: dict[str, Any], ask: "Callable[[Prompts], Request]"
) -> "Iterator[tuple[Model, Iterator[Chunk]]]":
    """A loaded model and its answer to what is asked, which is made of texts, and refused, before weights are read."""
    made: list[Request] = []

    def first(prompts: "Prompts") -> None:
        from zoo.engine.admission import check_length

        made.append(ask(prompts))
        check_length(made[0].prompt, flags["max_context"] or prompts.card.context_length)

    with load_model(ref, flags, first) as model:
        yield model, model.engine.stream(made[0])


def load_model(ref: str, flags: dict[str, Any], first: "Callable[[Prompts], object] | None" = None) -> "Model":
    """The model for a command, with a bar while it loads and a line on what was chosen; `first` as of `zoo.load`."""
    from zoo.api import layout, load
    from zoo.cli.console import loading_bar, note

    spread = layout(ref, **load_arguments(flags))
    if spread is not None:
        note(f"{ref}: {spread}")
    with loading_bar(f"loading {ref}") as progress, _no_collections():
        model = load(ref, progress=progress, first=first, **load_arguments(flags))
    note(f"{model.card.name}: {'; '.join(n for n in model.notes if n)}")
    return model


@contextmanager
def _no_collections() -> Iterator[None]:
    """Python looks for garbage neither while a model is loaded nor, ever, among what stands then: libraries, which are
    so many objects that it would take half as long as importing them."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def write_stream(chunks: "Any") -> "Chunk | None":
    """Print the chunks' text as it comes, then tool calls as a line of JSON, then one line of figures on stderr.

    Thinking goes to stderr. Returns the last chunk.
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
    return last


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
