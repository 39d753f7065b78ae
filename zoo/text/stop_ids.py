"""Ids that end a generation, as a checkpoint's configuration files name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo.json_file import read_object
from zoo.registry.errors import TextError


def configured_stop_ids(folder: Path) -> frozenset[int]:
    """`eos_token_id` of `generation_config.json` and of `config.json` (also of its `text_config`), joined.

    Raises TextError for a file that is not JSON and for a value that is no id.
    """
    own = folder / "generation_config.json"
    found = _ids(read_object(own, TextError, missing_ok=True), own)
    config = read_object(folder / "config.json", TextError, missing_ok=True)
    found |= _ids(config, folder / "config.json")
    inner = config.get("text_config")
    return found | (_ids(inner, folder / "config.json") if isinstance(inner, dict) else frozenset())


def _ids(config: dict[str, Any], file: Path) -> frozenset[int]:
    value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(one) is int and one >= 0 for one in ids):
        raise TextError("eos_token_id is no token id", where=str(file), found=repr(value), expected="an id or a list")
    return frozenset(ids)
