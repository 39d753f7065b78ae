"""zoo list, diff, schema and card: what is known, without torch."""

from pathlib import Path
from typing import Any

import click

from zoo.registry.errors import ZooError
from zoo.units import human_count


@click.command("list")
@click.argument("words", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def list_cards(words: tuple[str, ...], as_json: bool) -> None:
    """Show every card, or those that contain all WORDS in name, family, licence, features or summary."""
    from zoo.api import list as known
    from zoo.cli.console import columns, emit, note

    cards = [card for card in known() if all(word.lower() in _haystack(card) for word in words)]
    if as_json:
        emit([{**_row(card), **_details(card)} for card in cards])
        return
    if not cards:
        note(f"no card has all of these words: {', '.join(words)}")
        return
    rows = [[str(value) for value in _row(card).values()] for card in cards]
    for card, row in zip(cards, rows, strict=True):
        row[-1] += f" Not supported: {card.unsupported}" if card.unsupported else ""
    click.echo(columns([["NAME", "FAMILY", "CONTEXT", "LICENSE", "SUMMARY"], *rows]))


def _row(card: Any) -> dict[str, Any]:
    return {
        "name": card.name,
        "family": card.family,
        "context_length": card.context_length,
        "license": card.license,
        "summary": card.summary,
    }


def _details(card: Any) -> dict[str, Any]:
    """What `zoo list --json` tells beside the table."""
    return {"features": [*card.text.features], "source": card.source.hub, "unsupported": card.unsupported}


def _haystack(card: Any) -> str:
    return " ".join([card.name, card.family, card.license, card.summary, *card.text.features]).lower()


@click.command()
@click.argument("first")
@click.argument("second")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def diff(first: str, second: str, as_json: bool) -> None:
    """Show where two models differ: every resolved setting, and what it costs."""
    from zoo.api import inspect
    from zoo.cli.console import columns, emit

    left, right = (_flat({**i.plan.describe(), **_figures(i)}) for i in (inspect(first), inspect(second)))
    changed = {
        name: (left.get(name), right.get(name))
        for name in [*left, *(n for n in right if n not in left)]
        if left.get(name) != right.get(name)
    }
    if as_json:
        emit({name: {first: a, second: b} for name, (a, b) in changed.items()})
    elif not changed:
        click.echo("no difference")
    else:
        rows = [[name, _shown(a), _shown(b)] for name, (a, b) in changed.items()]
        click.echo(columns([["FIELD", first, second], *rows]))


def _figures(inspection: Any) -> dict[str, Any]:
    figures = inspection.to_dict()
    names = ("parameters", "active_parameters", "weight_bytes", "cache_bytes_per_token", "flops_per_token")
    card = ("context_length", "license", "features", "source")
    return {name: figures[name] for name in (*card, *names)}


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested data as dotted names and plain values."""
    items: Any
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and any(isinstance(v, dict) for v in value):
        items = enumerate(value)
    else:
        return {path: value}
    return {n: v for k, item in items for n, v in _flat(item, f"{path}.{k}" if path else str(k)).items()}


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)


@click.command()
def schema() -> None:
    """Print the JSON Schema of cards, installed plugins' components included, for editors."""
    import json

    from zoo.registry.schema import schema as card_schema

    click.echo(json.dumps(card_schema(), indent=1))


@click.group()
def card() -> None:
    """Make and check cards."""


@card.command("new")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Write to a file instead of standard output.")
def card_new(folder: Path, output: Path | None) -> None:
    """Infer a card from a checkpoint FOLDER with params.json or config.json, and print it."""
    from zoo.locating import locate
    from zoo.registry.errors import CardError
    from zoo.registry.resolve import resolve

    inferred = locate(folder).card
    resolve(inferred)
    if output is None:
        click.echo(inferred.to_yaml(), nl=False)
    elif output.exists():
        raise CardError("the file exists already", where=str(output), hint="choose another name or remove it")
    else:
        try:
            output.write_text(inferred.to_yaml(), encoding="utf-8")
        except OSError as error:
            raise CardError("the card cannot be written", where=str(output), found=error.strerror) from None
        click.echo(f"written to {output}", err=True)


@card.command("check")
@click.argument("refs", nargs=-1, required=True)
def card_check(refs: tuple[str, ...]) -> int:
    """Check cards by name or file: every field known, every component found, every size consistent."""
    from zoo.api import inspect

    faults = 0
    for ref in refs:
        try:
            found = inspect(ref)
            if found.card.unsupported:
                click.echo(f"{ref}: ok, not supported: {found.card.unsupported}")
                continue
            click.echo(
                f"{ref}: ok, {human_count(found.parameters)} parameters, {len(found.plan.model.children())} parts"
            )
        except ZooError as error:
            faults += 1
            click.echo(f"zoo: {error}", err=True)
    return 2 if faults else 0
