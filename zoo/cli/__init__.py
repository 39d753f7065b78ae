"""The command line: a thin skin over the Python API. Answers go to stdout, everything else to stderr."""

import atexit
import errno
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from zoo import __version__
from zoo.registry.catalog import load_path
from zoo.registry.environment import strangers
from zoo.registry.errors import PluginError, ZooError, nearest
from zoo.registry.hooks import RegisterCommand, hookimpl

if TYPE_CHECKING:
    from zoo.registry.catalog import Command

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Of a disk, a share of it, or a file."""

BUILTIN = {
    "run": "zoo.cli.run:run",
    "chat": "zoo.cli.chat:chat",
    "fim": "zoo.cli.fim:fim",
    "transcribe": "zoo.cli.transcribe:transcribe",
    "list": "zoo.cli.cards:list_cards",
    "inspect": "zoo.cli.inspect:inspect",
    "diff": "zoo.cli.cards:diff",
    "verify": "zoo.cli.files:verify",
    "pull": "zoo.cli.files:pull",
    "save": "zoo.cli.save:save",
    "rm": "zoo.cli.files:rm",
    "schema": "zoo.cli.cards:schema",
    "card": "zoo.cli.cards:card",
    "plugins": "zoo.cli.system:plugins",
    "doctor": "zoo.cli.system:doctor",
    "bench": "zoo.cli.bench:bench",
}


LATER = {"serve": "this version has no server; from Python, zoo.load(...) answers calls from many threads"}
"""Commands that other versions have, and what stands for them in this one."""


class Commands(click.Group):
    """Imports a command's module when it is called or its help is shown, so that each starts at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*BUILTIN, *sorted(self._from_plugins())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in BUILTIN:
            return _imported(BUILTIN[cmd_name], "zoo.cli", cmd_name)
        command = self._from_plugins().get(cmd_name)
        if command is None:
            return None
        try:
            return _imported(command.path, command.owner, cmd_name)
        except PluginError as error:
            return _unavailable(cmd_name, error)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            hint = LATER.get(args[0]) or nearest(args[0], self.list_commands(ctx)) or "see `zoo --help`"
            raise click.UsageError(f"there is no command {args[0]!r}; {hint}", ctx)
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None:
            _refuse_repeated(command, click.Context(command, ctx, name), rest)
        return name, command, rest

    @staticmethod
    def _from_plugins() -> "dict[str, Command]":
        from zoo.registry.manager import manager

        return {name: command for name, command in manager().commands().items() if name not in BUILTIN}


def _refuse_repeated(command: click.Command, ctx: click.Context, args: Sequence[str]) -> None:
    """An option that takes one value and is given two would quietly use the last."""
    _, _, given = command.make_parser(ctx).parse_args([*args])
    options = [o for o in given if isinstance(o, click.Option) and not (o.is_flag or o.multiple or o.count)]
    for option in options:
        if options.count(option) > 1:
            raise click.UsageError(f"{' / '.join(option.opts)} is given twice.", ctx)


def _imported(path: str, owner: str, name: str) -> click.Command:
    command = load_path(path, owner, f"the command {name!r}")
    if not isinstance(command, click.Command):
        raise PluginError(f"plugin {owner}: {path} is not a click command", where=f"zoo {name}")
    return command


def _unavailable(name: str, error: PluginError) -> click.Command:
    """Stands for a plugin's command that cannot be imported: the help names it, calling it raises the error."""

    def fail(arguments: tuple[str, ...]) -> None:
        raise error

    arguments = click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)
    settings = {"ignore_unknown_options": True}
    return click.Command(
        name, settings, fail, [arguments], help=str(error), short_help="Unavailable: its plugin fails."
    )


@hookimpl
def register_commands(register: RegisterCommand) -> None:
    """zoo's own commands, so that a plugin which takes one of their names is told."""
    for name, path in BUILTIN.items():
        register(name, path)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="zoo")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option(
    "--strict-plugins",
    is_flag=True,
    expose_value=False,
    callback=lambda ctx, option, given: os.environ.update(ZOO_STRICT_PLUGINS="1") if given else None,
    help="Stop when a plugin cannot be loaded.",
)
def cli(debug: bool) -> None:
    """Run open-weight language models from declarative cards."""


def main(args: Sequence[str] | None = None) -> None:
    """The `zoo` command. Exit status: 0 done, 1 a fault of zoo, 2 a fault of the input, 130 interrupted.

    args: None for those of the process, which then ends at once, but for `--debug`.
    """
    arguments = [*(sys.argv[1:] if args is None else args)]
    ended: list[int] = []
    if args is None and "--debug" not in arguments:
        # What is registered first is called last, when threads have ended and all others have had their turn.
        atexit.register(_leave, ended)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
    ended.append(_run(arguments))
    sys.exit(ended[0])


def _leave(ended: list[int]) -> None:
    """Ends the process with the status of a command that has ended: to take torch apart, the interpreter would need a
    second in which nothing answers, and the system takes all back anyway."""
    if not ended:
        return
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
    except (OSError, ValueError):
        return  # which the interpreter tells in its own way
    os._exit(ended[0])


def _run(arguments: list[str]) -> int:
    debug = "--debug" in arguments[: arguments.index("--")] if "--" in arguments else "--debug" in arguments
    arguments = [a for i, a in enumerate(arguments) if a != "--debug" or "--" in arguments[:i]]
    for stranger in strangers():
        click.echo(f"zoo: {stranger}", err=True)
    try:
        with cli.make_context("zoo", arguments) as context:
            result = cli.invoke(context)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except ZooError as error:
        return _report(f"zoo: {error}", 2, debug)
    except (click.Abort, KeyboardInterrupt):
        return _report("\nzoo: interrupted", 130, debug)
    except BrokenPipeError:
        # The reader has gone (`zoo list | head -1`): nobody is left to tell, nor may the interpreter flush again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return _report(f"zoo: nothing more can be written: {error.strerror}", 2, debug)
        return _report(
            f"zoo: internal error: {type(error).__name__}: {error}\n"
            "This is a fault of zoo or of a plugin. Run again with --debug to see where, and please report it.",
            1,
            debug,
        )


def _report(message: str, status: int, debug: bool) -> int:
    if debug and status != 130:
        import traceback

        traceback.print_exc()
    click.echo(message, err=True)
    return status
