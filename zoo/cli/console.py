"""What the commands write: answers to stdout; notes, progress and figures to stderr."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

Report = Callable[[int, int], None]


def note(text: str) -> None:
    """One line on stderr."""
    click.secho(text, err=True, dim=True)


def emit(data: Any) -> None:
    """One JSON value on stdout."""
    click.echo(json.dumps(data, ensure_ascii=False, default=str))


@contextmanager
def loading_bar(label: str) -> Iterator[Report | None]:
    """A progress callback (done, total) that draws on a terminal; None elsewhere, so that log files stay short."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def columns(rows: list[list[str]], *, heading: bool = True) -> str:
    """Rows as aligned columns; the last column is not padded."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=True))]).rstrip() for row in rows]
    if heading and sys.stdout.isatty():
        lines[0] = click.style(lines[0], bold=True)
    return "\n".join(lines)
