"""Control tokens written in a message stay text: a template's own are told from those in what it was given.

A template makes one text of everything. So each control token inside a message is replaced by a private-use
character before the template runs; afterwards the control tokens in the text are the template's own. They are
encoded under other names by a copy of the tokenizer that takes its own names for ordinary text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from zoo.registry.errors import TextError

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

MARKS, ALIASES, ROOM = 0x108000, 0x10C000, 0x3FFE
MARK = re.compile(f"[{chr(MARKS)}-{chr(MARKS + ROOM - 1)}]")
ESCAPED = re.compile(r"\\udbe[0-9a-f]\\ud[c-f][0-9a-f]{2}")  # a mark as JSON writes it in ASCII
RESERVED = re.compile(f"[{chr(MARKS)}-{chr(ALIASES + ROOM - 1)}]")


class Quoting:
    """For one tokenizer; `special` are its special tokens by id."""

    def __init__(self, library: Tokenizer, special: Mapping[int, AddedToken], unknown: str | None) -> None:
        if len(special) > ROOM:
            raise TextError("the tokenizer has too many special tokens", found=len(special), expected=f"at most {ROOM}")
        self._library, self._special = library, special
        self._names = [token.content for token in special.values()]
        self._place = {name: place for place, name in enumerate(self._names)}
        longest_first = sorted(self._names, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._never = {number for number, token in special.items() if token.content != unknown}

    def mark(self, value: Any) -> Any:
        """`value`, a JSON value, with the control tokens in its texts marked (object keys are left as they are).

        Raises TextError for anything but JSON values, and for a text that holds a character used as a mark.
        """
        if isinstance(value, str):
            if (used := RESERVED.search(value)) is not None:
                raise TextError("a message holds a reserved private-use character", found=f"U+{ord(used[0]):X}")
            return self._pattern.sub(lambda found: chr(MARKS + self._place[found[0]]), value)
        if isinstance(value, Mapping):
            return {str(key): self.mark(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item) for item in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        raise TextError("not a value that a template may see", found=type(value).__name__, expected="JSON values")

    def unmark(self, text: str) -> str:
        """A rendered text with the marked control tokens as they were written."""
        text = MARK.sub(lambda mark: self._names[ord(mark[0]) - MARKS], text)
        return ESCAPED.sub(self._unescaped, text)

    def encode(self, text: str) -> list[int]:
        """Ids of a rendered text whose marked control tokens become ordinary ids."""
        if self.unmark(text) == text:
            ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
            return ids
        aliased = self._pattern.sub(lambda found: chr(ALIASES + self._place[found[0]]), text)
        copy, ids_of = self._copy
        found = copy.encode(self.unmark(aliased), add_special_tokens=False).ids
        if not self._never.isdisjoint(found):
            raise TextError("the tokenizer cannot write a control token's name as text", found=repr(self.unmark(text)))
        return [ids_of.get(i, i) for i in found]

    def _unescaped(self, escaped: re.Match[str]) -> str:
        place = ord(json.loads(f'"{escaped[0]}"')) - MARKS
        return json.dumps(self._names[place])[1:-1] if place < len(self._names) else escaped[0]

    @cached_property
    def _copy(self) -> tuple[Tokenizer, dict[int, int]]:
        """A tokenizer that reads special tokens as text and aliases as special tokens, and the aliases' true ids."""
        from tokenizers import AddedToken, Tokenizer

        copy = Tokenizer.from_str(self._library.to_str())
        copy.encode_special_tokens = True
        ids = {}
        for number, token in self._special.items():
            alias = chr(ALIASES + self._place[token.content])
            flags = {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word}
            copy.add_tokens([AddedToken(alias, special=False, normalized=token.normalized, **flags)])
            ids[alias] = number
        return copy, {
            number: ids[token.content]
            for number, token in copy.get_added_tokens_decoder().items()
            if token.content in ids
        }
