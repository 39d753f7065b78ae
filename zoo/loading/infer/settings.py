"""A settings file (params.json, config.json): every key is read, or known to change nothing, or refused."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from zoo.registry.errors import CardError, nearest


class Settings:
    """The values of a settings file by key, keys inside of mappings dotted, and which of them have been read."""

    def __init__(self, values: Mapping[str, Any], where: str, defaults: Mapping[str, Any]) -> None:
        self.where = where
        self.values = dict(_flat(values))
        self.defaults = defaults
        self.read: set[str] = set()

    def has(self, prefix: str) -> bool:
        """Whether the file says anything under a key."""
        return any(_within(key, prefix) and value is not None for key, value in self.values.items())

    def get(self, key: str) -> Any:
        """The value of a key, null included; of a key that the file leaves out, its default or None."""
        self.read.add(key)
        return self.values[key] if key in self.values else self.defaults.get(key)

    def is_null(self, key: str) -> bool:
        """Whether a key is null, by the file or by default, rather than unknown."""
        return self.get(key) is None and (key in self.values or key in self.defaults)

    def one_of(self, keys: Sequence[str]) -> Any:
        """The value of several keys of one meaning, or None. Raises CardError when two of them disagree."""
        found = {key: value for key in keys if (value := self.get(key)) is not None}
        values = list(found.values())
        if any(value != values[0] for value in values):
            said = ", ".join(f"{key}: {json.dumps(value)}" for key, value in found.items())
            raise CardError("keys of one meaning disagree", where=self.where, found=said)
        return values[0] if values else None

    def need(self, key: str) -> Any:
        """The value of a key that must be there. Raises CardError."""
        value = self.get(key)
        if value is None:
            raise CardError(f"the key {key!r} is missing", where=self.where, hint=nearest(key, self.values))
        return value

    def count(self, key: str) -> int:
        """A positive whole number. Raises CardError."""
        value = self.need(key)
        if type(value) is not int or value <= 0:
            raise self.wrong(key, value, "a positive whole number")
        return value

    def number(self, key: str) -> float:
        value = self.need(key)
        if type(value) not in (int, float):
            raise self.wrong(key, value, "a number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.need(key)
        if type(value) is not bool:
            raise self.wrong(key, value, "true or false")
        return value

    def wrong(self, key: str, value: Any, expected: str) -> CardError:
        return CardError(
            f"{key} has a value that zoo does not read", where=self.where, found=json.dumps(value), expected=expected
        )

    def check_only(self, only: Mapping[str, list[Any]]) -> None:
        """Raises CardError for a key whose value is none of those that change nothing."""
        for key, allowed in only.items():
            value = self.get(key)
            if value is not None and value not in allowed:
                raise self.wrong(key, value, " or ".join(map(json.dumps, allowed)))

    def pass_over(self, prefixes: Iterable[str]) -> None:
        """Takes keys, and all inside of them, as read: known to change nothing here."""
        prefixes = list(prefixes)
        self.read |= {key for key in self.values if any(_within(key, prefix) for prefix in prefixes)}

    def check_later(self, later: Mapping[str, str], known: Sequence[str] = ()) -> None:
        """Raises CardError for keys of what is not supported yet, but for those above what is `known`."""
        for key, what in later.items():
            if self.has(key) and not any(_within(path, key) and self.has(path) for path in known):
                raise CardError(f"not supported yet: {what}", where=self.where, found=f"the key {key!r}")

    def check_all_read(self, inert: Iterable[str]) -> None:
        """Raises CardError for keys that nothing has read."""
        inert = list(inert)
        left = [
            key
            for key, value in self.values.items()
            if value is not None and key not in self.read and not any(_within(key, known) for known in inert)
        ]
        if left:
            raise CardError(
                f"{len(left)} key{'s' if len(left) > 1 else ''} that zoo does not know",
                where=self.where,
                found=", ".join(f"{key}: {json.dumps(self.values[key])[:60]}" for key in left[:5]),
                hint=nearest(left[0], self.read) or "remove what changes nothing in the model, or write a card",
            )


def _within(key: str, prefix: str) -> bool:
    return key == prefix or key.startswith(f"{prefix}.")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
