"""Errors for users: one message that says where, what was found, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self, TypeVar

T = TypeVar("T")


class ZooError(Exception):
    """A fault that the user can mend. The command line prints the message and exits with status 2.

    `message` says what is wrong; `where` is a file and line, a field, a tensor or a flag;
    `found` and `expected` are values or phrases; `hint` is the next step to take.
    """

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        found: object = None,
        expected: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.message, self.where, self.found, self.expected, self.hint = message, where, found, expected, hint
        text = f"{where}: {message}" if where else message
        if found is not None:
            text += f"; found {found}"
        if expected:
            text += f"; expected {expected}"
        if hint:
            text += f". {hint[0].upper()}{hint[1:]}"
        super().__init__(text if text.endswith((".", "?", "!")) else text + ".")

    def within(self, place: str) -> Self:
        """The same error where `place` stands before where it is."""
        where = f"{place}, {self.where}" if self.where else place
        return type(self)(self.message, where=where, found=self.found, expected=self.expected, hint=self.hint)


def each(name: str, items: Sequence[T]) -> Iterator[tuple[str | None, T]]:
    """The items, each with its place for `within`, such as prompts[1]; an only one needs no place."""
    for number, item in enumerate(items):
        yield f"{name}[{number}]" if len(items) > 1 else None, item


@contextmanager
def within(place: str | None) -> Iterator[None]:
    """Errors from inside say that they are of `place`; unchanged where that is None."""
    try:
        yield
    except ZooError as error:
        if place is None:
            raise
        raise error.within(place) from error.__cause__


class CardError(ZooError):
    """A card, a field of a card, or a name of a card."""


class PluginError(ZooError):
    """A plugin, or a name that two plugins claim."""


class WeightsError(ZooError):
    """A checkpoint's files or tensors."""


class FetchError(ZooError):
    """The hub, the network, the cache or the disk."""


class TextError(ZooError):
    """A tokenizer, a chat format or a conversation."""


class RequestError(ZooError):
    """A prompt or an option of a generation request."""


class CapacityError(ZooError):
    """Something does not fit: memory, context, batch."""


class RankError(ZooError):
    """A process of a model that runs on several devices has ended, or does not answer."""


def fields_of(error: ZooError) -> dict[str, str | None]:
    """An error as plain data, for another process."""
    details = {name: getattr(error, name) for name in ("message", "where", "found", "expected", "hint")}
    return {"kind": type(error).__name__, **{name: None if d is None else str(d) for name, d in details.items()}}


def error_of(origin: str, fields: Mapping[str, Any]) -> ZooError:
    """Another process's error, of its own kind. origin: what that process is called."""
    kinds = {kind.__name__: kind for kind in ZooError.__subclasses__()}
    details = {name: fields.get(name) for name in ("where", "found", "expected", "hint")}
    return kinds.get(str(fields.get("kind")), ZooError)(str(fields.get("message")), **details).within(origin)


def nearest(name: str, names: Iterable[str], *, count: int = 3) -> str | None:
    """The sentence "did you mean ...?" for the known `names` closest to `name`, however capitals are set, or None."""
    wanted, known = name.casefold(), {other.casefold(): other for other in names}
    close = difflib.get_close_matches(wanted, known, n=count, cutoff=0.6)
    ratios = [difflib.SequenceMatcher(None, wanted, other).ratio() for other in close]
    close = [other for other, ratio in zip(close, ratios, strict=True) if ratio > max(ratios) - 0.1]
    return f"did you mean {' or '.join(repr(known[n]) for n in close)}?" if close else None
