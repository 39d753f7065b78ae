"""zoo chat: a conversation on the terminal."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zoo.cli.asking import load_model, utf8_input, write_stream
from zoo.cli.options import (
    chat_options,
    effort_option,
    load_options,
    parse_overrides,
    sample_arguments,
    sample_options,
)
from zoo.registry.errors import RequestError, TextError, ZooError, nearest
from zoo.registry.training import check_trained
from zoo.units import human_bytes

if TYPE_CHECKING:
    from zoo.model import Model


@click.command()
@click.argument("ref")
@click.option("--system", help="A system message before the conversation.")
@click.option("--no-prefix-cache", is_flag=True, help="Compute every turn from the conversation's first token.")
@effort_option
@load_options
@sample_options
def chat(ref: str, system: str | None, **flags: Any) -> None:
    """Talk with REF. Type /help for the commands, Ctrl-D to leave."""
    from zoo.locating import locate

    options, form = sample_arguments(flags), chat_options(flags)
    check_trained(locate(ref, parse_overrides(flags["overrides"])).card, "chat")
    with load_model(ref, flags, lambda prompts: prompts.text()) as model:
        Conversation(model, options, system, form=form).loop()


@dataclass
class Conversation:
    """The messages so far, the settings for the next answer, and the images that go with the next message."""

    model: "Model"
    options: dict[str, Any]
    system: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    form: dict[str, Any] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)

    def loop(self) -> None:
        """Read lines until the end of input. A faulty turn is reported and leaves the conversation as it was."""
        while (line := _read()) is not None:
            try:
                if line.startswith("/"):
                    if not self.command(line):
                        return
                elif line.strip():
                    self.turn(line)
            except ZooError as error:
                click.echo(f"zoo: {error}", err=True)
            except KeyboardInterrupt:
                click.echo("\n(stopped)", err=True)

    def turn(self, text: str) -> None:
        """Send one message and stream the answer. A stopped answer is kept as far as it came, thinking is not kept."""
        sent = [*self.messages, {"role": "user", "content": self._content(text)}]
        answer: list[str] = []

        def listen() -> Any:
            for chunk in self.model.stream_chat(self._with_system(sent), chat_options=self.form, **self.options):
                answer.append(chunk.text)
                yield chunk

        try:
            write_stream(listen())
        finally:
            if said := "".join(answer):
                self.messages, self.images = [*sent, {"role": "assistant", "content": said}], []

    def _content(self, text: str) -> Any:
        """The message's text, after the images that were given for it."""
        images = [{"type": "image", "image": image} for image in self.images]
        return [*images, {"type": "text", "text": text}] if images else text

    def command(self, line: str) -> bool:
        """Run one /command. Returns False when the conversation is to end."""
        name, _, argument = line[1:].strip().partition(" ")
        if name in ("quit", "exit", "bye"):
            return False
        known: dict[str, Callable[[str], None]] = {
            "help": self._help,
            "reset": self._reset,
            "system": self._set_system,
            "undo": self._undo,
            "retry": self._retry,
            "set": self._set,
            "image": self._image,
            "save": self._save,
            "load": self._load,
            "info": self._info,
        }
        if name not in known:
            raise RequestError(
                f"there is no command /{name}", where="zoo chat", hint=nearest(name, [*known, "quit"]) or "type /help"
            )
        known[name](argument.strip())
        return True

    def _with_system(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.system}, *messages] if self.system else messages

    def _help(self, _: str) -> None:
        click.echo(
            "/system TEXT   set the system message (nothing: remove it)\n"
            "/set NAME=VALUE   an option of the next answers, such as temperature=0.7 or max_tokens=200\n"
            "/image FILE   show a picture with the next message (nothing: none after all)\n"
            "/undo   take back the last question and answer\n"
            "/retry   ask the last question again\n"
            "/reset   forget the conversation\n"
            "/save FILE, /load FILE   the conversation as JSON\n"
            "/info   the model, its memory and the settings\n"
            "/quit   leave (also Ctrl-D); Ctrl-C stops an answer",
            err=True,
        )

    def _reset(self, _: str) -> None:
        self.messages = []

    def _set_system(self, text: str) -> None:
        self.system = text or None

    def _undo(self, _: str) -> None:
        if not self.messages:
            raise RequestError("there is no question to take back", where="/undo")
        self.messages = self.messages[:-2]

    def _retry(self, _: str) -> None:
        if not self.messages:
            raise RequestError("there is no question to ask again", where="/retry")
        question = self.messages[-2]["content"]
        parts = question if isinstance(question, list) else [{"type": "text", "text": question}]
        self.images = [part["image"] for part in parts if part["type"] == "image"]
        self.messages = self.messages[:-2]
        self.turn(parts[-1]["text"])

    def _image(self, name: str) -> None:
        if name:
            self.model.check_image(name)
        self.images = [*self.images, name] if name else []
        click.echo(f"{len(self.images)} image(s) for the next message", err=True)

    def _set(self, pair: str) -> None:
        from zoo.engine.request import SamplingParams

        changed = {**self.options, **(parse_overrides((pair,), "/set", "NAME=VALUE, such as temperature=0.7") or {})}
        SamplingParams.from_options(changed)
        self.options = changed

    def _save(self, name: str) -> None:
        data = {"model": self.model.card.name, "system": self.system, "messages": self.messages}
        try:
            Path(name).expanduser().write_text(json.dumps(data, ensure_ascii=False, indent=1), encoding="utf-8")
        except OSError as error:
            raise TextError("the conversation cannot be saved", where=name or "/save", found=error.strerror) from None

    def _load(self, name: str) -> None:
        try:
            data = json.loads(Path(name).expanduser().read_text(encoding="utf-8"))
            system, messages = data["system"], data["messages"]
            if [message["role"] for message in messages] != ["user", "assistant"] * (len(messages) // 2):
                raise ValueError("other than questions and answers in turn")
            self.system, self.messages = system, messages
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TextError(
                "this is no saved conversation", where=name or "/load", found=str(error), expected="a file from /save"
            ) from None

    def _info(self, _: str) -> None:

        memory = self.model.memory
        click.echo(
            f"{self.model!r}\nweights {human_bytes(memory.weights)}, "
            f"cache {human_bytes(memory.cache_used + memory.cache_kept)} of {human_bytes(memory.cache_budget)}\n"
            f"{len(self.messages)} messages, system {self.system!r}, options {self.options}",
            err=True,
        )


def _read() -> str | None:
    """The next line, or None at the end of input. A prompt sign is shown on terminals only."""
    if not sys.stdin.isatty():
        with utf8_input():
            line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    try:
        import readline  # noqa: F401  (line editing and history for input())

        return input("> ")
    except EOFError:
        click.echo(err=True)
        return None
    except KeyboardInterrupt:
        click.echo("\n(/quit or Ctrl-D leaves)", err=True)
        return ""
