"""Token ids to text, as they come: no character is cut, and the chunks joined are the whole text."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Protocol

from zoo.registry.errors import RequestError

REPLACEMENT = "\ufffd"


class Vocabulary(Protocol):
    """What each id adds to a text.

    control_ends_run: a control id closes an unfinished character, even when it is not shown itself.
    each_byte: every byte that is no text becomes one replacement character (as in SentencePiece), else every
        maximal broken sequence does (Unicode 15, section 3.9, "substitution of maximal subparts").
    """

    @property
    def size(self) -> int: ...
    @property
    def control_ends_run(self) -> bool: ...
    @property
    def each_byte(self) -> bool: ...

    def control(self, token: int) -> str | None:
        """The name of a control id, also of an id outside the vocabulary; None for an ordinary one."""

    def surface(self, token: int, first: bool) -> bytes:
        """The bytes of an ordinary id; `first` if it begins a text (SentencePiece's dummy space is dropped there)."""


class HasVocabulary(Protocol):
    @property
    def vocabulary(self) -> Vocabulary: ...


class Detokenizer:
    """Decodes a stream of ids. `push(a) + push(b) + finish()` is the text of `a + b` however it is cut.

    special: control ids are written by name instead of left out.
    continues: the ids go on from a text (a raw prompt, a started answer), so that their first space is kept.
    """

    def __init__(self, tokenizer: HasVocabulary, *, special: bool = False, continues: bool = False) -> None:
        self._vocabulary = tokenizer.vocabulary
        self._special = special
        self._first = not continues
        self._pending = b""

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete; bytes of an unfinished character (three at most) are held back."""
        return "".join([self._one(token) for token in ids])

    def finish(self) -> str:
        """The rest: replacement characters for an unfinished character, else nothing."""
        return self._decode(b"", final=True)

    def _one(self, token: int) -> str:
        name = self._vocabulary.control(token)
        if name is None:
            data = self._vocabulary.surface(token, self._first)
            self._first = False
            return self._decode(data, final=False)
        if self._special:
            self._first = False
            return self.finish() + name
        return self.finish() if self._vocabulary.control_ends_run else ""

    def _decode(self, data: bytes, final: bool) -> str:
        data, text = self._pending + data, ""
        while True:
            try:
                part, used = codecs.utf_8_decode(data, "strict", final)
            except UnicodeDecodeError as fault:
                broken = 1 if self._vocabulary.each_byte else fault.end - fault.start
                text += data[: fault.start].decode() + REPLACEMENT
                data = data[fault.start + broken :]
            else:
                self._pending = data[used:]
                return text + part


def decode(tokenizer: HasVocabulary, ids: Iterable[int], *, special: bool = False, continues: bool = False) -> str:
    """The text of `ids` in one piece."""
    stream = Detokenizer(tokenizer, special=special, continues=continues)
    return stream.push(ids) + stream.finish()


class StopStrings:
    """Cuts a stream of text at the first stop string, which is removed, wherever the chunks are cut.

    Of several the one that is complete first counts; of those complete at once, the longest.
    `found` is the stop string met, or None, and `rest` the text pushed after it.
    Raises RequestError for an empty stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str) or not all(isinstance(stop, str) for stop in stops):
            raise RequestError("stop strings must be a list of texts", found=repr(stops))
        if "" in stops:
            raise RequestError("a stop string may not be empty", found=repr([*stops]))
        self.found: str | None = None
        self.rest = ""
        self._stops = tuple(stops)
        self._beginnings = {stop[:end] for stop in stops for end in range(1, len(stop))}
        self._longest = max(map(len, self._beginnings), default=0)
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is certain to stand before any stop string; nothing once one was found."""
        if self.found is not None:
            return ""
        text = self._held + text
        met = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if met:
            _, at, self.found = min(met)
            self._held, self.rest = "", text[at + len(self.found) :]
            return text[:at]
        keep = self._keep(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The text held back, as no stop string can be completed any more."""
        text, self._held = self._held, ""
        return text

    def _keep(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(self._longest, len(text)), 0, -1):
            if text[-length:] in self._beginnings:
                return length
        return 0
