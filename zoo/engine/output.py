"""Generated ids -> text that may be shown, up to a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from zoo.text.detokenize import Detokenizer, StopStrings

if TYPE_CHECKING:
    from zoo.text.tokenizer import Tokenizer


class Output:
    """The text of one answer. Without a tokenizer it stays empty.

    continues: the answer goes on from the prompt's last word, so that its first space is kept.
    """

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str], *, continues: bool) -> None:
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer, continues=continues)
        self._stops = StopStrings(stops)
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._texts)

    @property
    def stopped(self) -> bool:
        """Whether a stop text ended the answer."""
        return self._stops.found is not None

    def push(self, token: int) -> str:
        """The text that the token makes certain."""
        return "" if self._detokenizer is None else self._emit(self._stops.push(self._detokenizer.push([token])))

    def finish(self) -> str:
        """The text that was held back."""
        if self._detokenizer is None:
            return ""
        return self._emit(self._stops.push(self._detokenizer.finish()) + self._stops.finish())

    def _emit(self, text: str) -> str:
        self._texts.append(text)
        return text
