"""families.yaml: which key of a settings file means what, for each architecture."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

from zoo.registry.reader import read

Node = dict[str, Any]


@cache
def families() -> Node:
    """The file's content; its head says what it holds."""
    file = resources.files("zoo.loading.infer") / "families.yaml"
    return read(file.read_text(encoding="utf-8"), str(file)).plain()  # type: ignore[no-any-return]


def keys_of(row: Node, word: str) -> list[str]:
    """The keys by which an architecture's file says one of our words."""
    keys = row["names"].get(word, [])
    return [keys] if isinstance(keys, str) else keys
