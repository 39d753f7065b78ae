"""params.json and config.json from a card: the words of families.yaml read the other way.

An architecture fits if the file that says the card in its keys is inferred to the same model again, so that a file
either says all or is not written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from zoo.loading.infer import CONFIG, PARAMS, infer_card
from zoo.loading.infer.families import Node, families, keys_of
from zoo.loading.infer.settings import read_object
from zoo.registry.card import Card
from zoo.registry.errors import CardError
from zoo.registry.plan import Plan
from zoo.registry.resolve import resolve
from zoo.saving.words import rope_keys, words

FILES = {"mistral": PARAMS, "huggingface": CONFIG}
"""The settings file beside weights in a layout."""

CARRIED = ("architectures", "bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of a config.json that say nothing of the computation, and that other programs read."""


@dataclass(frozen=True)
class Settings:
    """A settings file: its name and content, and the row of families.yaml that it is written by."""

    file: str
    values: Node
    row: Node


def settings_of(plan: Plan, layout: str, dtype: str, source: Path | None) -> Settings | None:
    """What a folder in this layout says of itself; None where no architecture's file can say the card.

    source: the folder that the weights came from, whose config.json may have more to carry over.
    """
    file = next((name for stem, name in FILES.items() if layout.startswith(stem)), None)
    said = None if file is None else words(plan.card, listed=file == PARAMS)
    if file is None or said is None:
        return None
    rows, before = families()[file], _source(source)
    first = (before.get("model_type"), plan.card.family)
    for name in sorted(rows, key=lambda name: (name != first[0], rows[name]["family"] != first[1])):
        values = _values(plan.card, said | {"dtype": dtype}, rows[name], file)
        if values is None:
            continue
        if file == CONFIG:
            carried = before if before.get("model_type") == name else {}
            kept = {key: carried[key] for key in CARRIED if key in carried}
            values = {"model_type": name, "pad_token_id": None, **kept, **values}
        elif name != next(iter(rows)):
            values = {"model_type": name, **values}
        if _says(values, file, plan, "context_length" in rows[name]["names"]):
            return Settings(file, values, rows[name])
    return None


def _says(values: Node, file: str, plan: Plan, whole: bool) -> bool:
    """Whether the file means the card's model, and its context length where files of its kind say one."""
    with TemporaryDirectory() as folder:
        (Path(folder) / file).write_text(json.dumps(values), encoding="utf-8")
        try:
            card = Card.from_dict(infer_card(folder))
            same = not whole or card.context_length == plan.card.context_length
            return same and resolve(card).model == plan.model
        except CardError:
            return False


def _values(card: Card, said: Node, row: Node, file: str) -> Node | None:
    """The keys of an architecture's file; None where it has none for the card's ropes."""
    ropes = rope_keys(card, row)
    if ropes is None:
        return None
    native = file == PARAMS
    flat = {} if native else {key: allowed[0] for key, allowed in row["only"].items()}
    flat |= row.get("written", {})
    flat |= dict(_named(said, row, leave_out=native))
    return _nested(flat) | ropes


def _named(said: Node, row: Node, *, leave_out: bool) -> Iterator[tuple[str, object]]:
    """Every word's first key and value. With `leave_out`, what follows without it is left out: short files are read
    by programs that know no more keys."""
    for word in row["names"]:
        if word == "local_theta" or not keys_of(row, word):
            continue
        key, value = keys_of(row, word)[0], said.get(word)
        default = row["defaults"].get(key)
        if word not in said and default is None:
            continue
        follows = value == default or (word == "expert_hidden_dim" and value == said.get("hidden_dim"))
        if not (leave_out and (follows or word == "dtype")):
            yield key, value


def _nested(flat: Node) -> Node:
    """Dotted keys as mappings."""
    found: Node = {}
    for key, value in flat.items():
        *groups, leaf = key.split(".")
        place = found
        for group in groups:
            place = place.setdefault(group, {})
        place[leaf] = value
    return found


def _source(folder: Path | None) -> Node:
    """The config.json that came with the weights."""
    file = None if folder is None else folder / CONFIG
    return {} if file is None or not file.is_file() else read_object(file)
