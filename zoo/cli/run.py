"""zoo run: one prompt, one answer."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zoo.cli.asking import ask, check_encoders, read_sounds, utf8_input
from zoo.cli.options import chat_options, effort_option, load_options, refuse_beside, sample_arguments, sample_options
from zoo.registry.errors import RequestError

if TYPE_CHECKING:
    from zoo.engine.request import Request
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
    if raw:
        others = {"--system": system, "--tools": tools, "--reasoning-effort": flags["reasoning_effort"]}
        refuse_beside("--raw", "FLAG needs the chat format", {**others, "--audio": sounds})
    text = "" if sounds and prompt is None else _prompt(prompt)
    heard = read_sounds(sounds)
    definitions = None if tools is None else read_tools(tools)
    form = chat_options(flags)
    options = sample_arguments(flags)
    check_encoders(ref, flags, images, sounds)

    def request(prompts: "Prompts") -> "Request":
        from zoo.engine.request import SamplingParams
        from zoo.hearing import user_message

        params = SamplingParams.from_options(options)
        if system is None and definitions is None and not form:
            return prompts.request(text, params, raw=raw, images=images, audio=heard)
        turns = [] if system is None else [{"role": "system", "content": system}]
        messages = [*turns, user_message(text, heard)]
        return prompts.chat(messages, params, images=images, tools=definitions, options=form)

    ask(ref, flags, request, as_json=as_json)


def read_tools(name: str) -> list[Any]:
    """The function definitions of a file. RequestError for one that is no JSON list."""
    try:
        tools = json.loads(Path(name).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError("the tools cannot be read", where=name, found=str(error), expected="a JSON list") from None
    if not isinstance(tools, list):
        raise RequestError("these are no tools", where=name, found=type(tools).__name__, expected="a JSON list")
    return tools


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
