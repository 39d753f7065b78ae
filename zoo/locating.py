"""What a reference to a model means: a card's name, a path, a Card or a mapping."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.registry.card import Card, list_cards, load_card
from zoo.registry.errors import CardError, nearest
from zoo.registry.manager import manager

Ref = str | Path | Card | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Located:
    """A card and, where the reference was a path, the folder or file that holds its weights."""

    card: Card
    folder: Path | None


def locate(ref: Ref, overrides: Mapping[str, Any] | None = None) -> Located:
    """The card that `ref` means: a Card, a dict, a name, a card file, or a checkpoint folder to infer it from."""
    found = _locate(ref)
    return Located(found.card.with_overrides(overrides), found.folder) if overrides else found


def _locate(ref: Ref) -> Located:
    if isinstance(ref, Card):
        return Located(ref, ref.local_path())
    if isinstance(ref, Mapping):
        card = Card.from_dict(ref)
        return Located(card, card.local_path())
    if isinstance(ref, str) and ref in manager().cards():
        card = load_card(ref)
        return Located(card, card.local_path())
    if not isinstance(ref, str | Path) or not str(ref):
        raise CardError("not a model", found=repr(ref), expected="a card's name, a path, a Card or a mapping")
    return _at_path(ref)


def _at_path(ref: str | Path) -> Located:
    from zoo.loading.files import SUFFIXES, local_path

    path, local = local_path(ref), (*SUFFIXES, ".gguf", ".index.json")
    if path.name in ("params.json", "config.json"):
        path = path.parent
    if _there(path) and (path.is_dir() or path.name.endswith(local)):
        from zoo.loading.infer import CARD, infer_card

        beside = path / CARD if path.is_dir() else path.with_name(CARD)
        if beside.is_file():
            card = load_card(beside)
            return Located(card, (card.local_path() if path.is_dir() else None) or path)
        return Located(Card.from_dict(infer_card(path), origin=str(path)), path)
    if (isinstance(ref, Path) or "/" in ref or path.name.endswith(local)) and not _there(path):
        raise _no_model(path)
    card = load_card(path if "/" in str(ref) else ref)
    return Located(card, card.local_path())


def _there(path: Path) -> bool:
    try:
        return path.exists() or path.is_symlink()
    except OSError as error:
        raise CardError("not a path", where=str(path)[:200], found=error.strerror) from None


def _no_model(path: Path) -> CardError:
    """The error for a path to nothing; a repository of the hub, written with its owner, looks like one."""
    beside = [child.name for child in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = nearest(path.name, beside) or nearest(path.name, manager().cards())
    # An address of the hub, from which a path leaves one slash out of two, names a repository too.
    address, repository = re.subn(r"^https?:/+[^/]+/", "", str(path))[::-1]
    if address:
        hint = "addresses are not read: fetch the repository to a folder and name that, or name a card"
    for card in list_cards():
        if card.source.hub == repository:
            hint = f"the card of that repository is {card.name!r}"
            break
    return CardError("there is no such card, folder or file", where=str(path), hint=hint)
