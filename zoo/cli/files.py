"""zoo pull, rm and verify: checkpoints on disk and on the hub."""

import click

from zoo.registry.card import Card
from zoo.registry.errors import FetchError
from zoo.units import human_bytes


@click.command()
@click.argument("ref")
@click.option("--dry-run", is_flag=True, help="Only say what would be fetched.")
def pull(ref: str, dry_run: bool) -> None:
    """Fetch REF's weights and tokenizer from the hub: one weight set, resumed where it stopped."""
    from zoo.cli.console import loading_bar, note
    from zoo.loading.hub import fetch, plan_fetch
    from zoo.locating import locate

    card = locate(ref).card
    name = repository(card)
    if dry_run:
        plan = plan_fetch(card.source)
        for file in plan.chosen.files:
            click.echo(f"{file.path}  {human_bytes(file.size)}")
        for line in plan.notes:
            note(line)
        return
    with loading_bar(f"fetching {name}") as progress:
        folder = fetch(card.source, progress=progress, note=note)
    click.echo(folder)


@click.command()
@click.argument("ref")
@click.option("--yes", is_flag=True, help="Do not ask.")
def rm(ref: str, yes: bool) -> None:
    """Remove REF's fetched files from this machine's cache."""
    from zoo.cli.console import note
    from zoo.loading.hub import cached, remove
    from zoo.locating import locate

    card = locate(ref).card
    repository(card)
    held = cached(card.source)
    if not held:
        raise FetchError("nothing of this model is in the cache", where=card.name)
    total = sum(revision.size for revision in held)
    if not yes:
        click.confirm(f"remove {human_bytes(total)} of {card.source.hub}?", abort=True, err=True)
    note(f"{human_bytes(remove(card.source))} removed")


@click.command()
@click.argument("ref")
@click.option("--weights", metavar="PATH", help="Check this folder or file against REF's card.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def verify(ref: str, weights: str | None, as_json: bool) -> int:
    """Check a checkpoint's headers against the card: on disk, or on the hub by reading headers only."""
    from zoo.cli.console import emit
    from zoo.loading.verify import verify_files, verify_hub
    from zoo.locating import locate
    from zoo.registry.resolve import resolve

    found = locate(ref)
    plan = resolve(found.card)
    folder = found.folder if weights is None else weights
    report = verify_hub(plan) if folder is None else verify_files(plan, folder)
    if as_json:
        emit(report.to_dict())
    elif report.ok:
        parts = [f"{report.tensors} tensors", human_bytes(report.bytes), *report.schemes, f"layout {report.layout}"]
        click.echo(f"{found.card.name}: ok, {', '.join(parts)}")
    else:
        click.echo(f"zoo: {report.summary}", err=True)
    return 0 if report.ok else 2


def repository(card: Card) -> str:
    """The hub repository of the card's weights; FetchError when there is none."""
    if card.source.hub is None:
        raise FetchError("the card names no repository on the hub", where=card.name, expected="source.hub in the card")
    return card.source.hub
