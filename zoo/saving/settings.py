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

from zoo.json_file import read_object
from zoo.loading.infer import CONFIG, PARAMS, infer_card
from zoo.loading.infer.families import Node, families, keys_of
from zoo.registry.card import Card
from zoo.registry.errors import CardError
from zoo.registry.plan import Plan
from zoo.registry.resolve import resolve
from zoo.saving.words import rope_keys, state_space_words, words

FILES = {"mistral": PARAMS, "huggingface": CONFIG}
"""The settings file beside weights in a layout."""

CARRIED = ("architectures", "bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of a config.json that say nothing of the computation, and that other programs read."""


OTHERWISE = ("local_theta", "no_rope_every", "full_every")
"""Words for what rope_parameters and lists of layers say."""


@dataclass(frozen=True)
class Settings:
    """A settings file: its name and content, and the row of families.yaml that it is written by.

    own: it is the source's, so that the source's names of tensors go with it.
    """

    file: str
    values: Node
    row: Node
    own: bool = False


def settings_of(plan: Plan, layout: str, dtype: str, source: Path | None) -> Settings | None:
    """What a folder in this layout says of itself; None where no architecture's file can say the card.

    source: the folder that the weights came from, whose own file is taken where it says the card.
    """
    file = next((name for stem, name in FILES.items() if layout.startswith(stem)), None)
    if file is None:
        return None
    rows, before = families()[file], _source(source, file)
    own = _plain(before, file, dtype)
    if before and _says(own, file, plan, whole=True):
        return Settings(file, own, rows.get(own.get("model_type", next(iter(rows))), {}), own=True)
    first = (before.get("model_type"), plan.card.family)
    # Architectures of several kinds of layers come last: some can say what a plainer one is for.
    for name in sorted(
        rows, key=lambda name: (name != first[0], rows[name]["family"] != first[1], "layer_kinds" in rows[name])
    ):
        values = _values(plan.card, rows[name], file, dtype)
        if values is None:
            continue
        if file == CONFIG:
            carried = before if before.get("model_type") == name else {}
            kept = {key: carried[key] for key in CARRIED if key in carried}
            named = {"architectures": [families()["classes"][name]]} if name in families()["classes"] else {}
            values = {**named, "model_type": name, "pad_token_id": None, **kept, **values}
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
            said = infer_card(folder)
            unsaid = {} if whole else {"context_length": plan.card.context_length}
            return resolve(Card.from_dict(said | unsaid)).model == plan.model
        except CardError:
            return False


def _values(card: Card, row: Node, file: str, dtype: str) -> Node | None:
    """The keys of an architecture's file; None where it has none for the card's layers or ropes, or for encoders."""
    if "inside" in row or row.get("own_names"):
        return None
    native = file == PARAMS
    said, ropes = words(card, row, listed=native), rope_keys(card, row)
    if said is None or ropes is None:
        return None
    flat = {} if native else {key: allowed[0] for key, allowed in row["only"].items()}
    flat |= row.get("written", {})
    flat |= dict(_named(said | {"dtype": dtype}, row, leave_out=native))
    if "state_space" in row:
        flat |= dict(_named(state_space_words(card), row["state_space"] | {"defaults": {}}, leave_out=False))
    return _nested(flat) | ropes


def _named(said: Node, row: Node, *, leave_out: bool) -> Iterator[tuple[str, object]]:
    """Every word's first key and value. With `leave_out`, what follows without it is left out: short files are read
    by programs that know no more keys."""
    for word in row["names"]:
        if word in OTHERWISE or not keys_of(row, word):
            continue
        key, value = keys_of(row, word)[0], said.get(word)
        default = row["defaults"].get(key)
        if word not in said and (leave_out or default is None):
            continue
        follows = value == default or value == 0 or (word == "expert_hidden_dim" and value == said.get("hidden_dim"))
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


def _source(folder: Path | None, name: str) -> Node:
    """The settings file that came with the weights."""
    file = None if folder is None else folder / name
    return {} if file is None else read_object(file, CardError, missing_ok=True)


def _plain(values: Node, file: str, dtype: str) -> Node:
    """A settings file for the same weights in another format: not quantised, and of this type."""
    kept = {key: value for key, value in values.items() if key not in families()["quantised"]["keys"]}
    types = [key for key in ("dtype", "torch_dtype") if key in kept] or (["dtype"] if file == CONFIG else [])
    return kept | dict.fromkeys(types, dtype)
