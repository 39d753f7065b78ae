"""Generated ids -> an answer that may be shown, up to a stop text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from zoo.text.answer import Answer, AnswerReader
from zoo.text.detokenize import Detokenizer, StopStrings

if TYPE_CHECKING:
    from zoo.engine.request import Request
    from zoo.text.calls import ToolCall


class Reader(Protocol):
    """As zoo.text.answer.AnswerReader."""

    def push(self, ids: Iterable[int]) -> Answer: ...
    def finish(self) -> Answer: ...


class Output:
    """One answer, read as its request says. Without a tokenizer it stays empty.

    Stop texts are looked for in the text, not in thinking and not in tool calls.
    """

    def __init__(self, request: Request) -> None:
        self._reader = _reader(request)
        self._stops = StopStrings(request.params.stop)
        self._texts: list[str] = []
        self._thinking: list[str] = []
        self.tool_calls: list[ToolCall] = []
        self.call_error: str | None = None

    @property
    def text(self) -> str:
        return "".join(self._texts)

    @property
    def thinking(self) -> str:
        return "".join(self._thinking)

    @property
    def stopped(self) -> bool:
        """Whether a stop text ended the answer."""
        return self._stops.found is not None

    def push(self, token: int) -> Answer:
        """What the token makes certain."""
        new = self._reader.push([token])
        new.text = self._stops.push(new.text)
        return self._keep(new)

    def finish(self) -> Answer:
        """What was held back; after a stop text, nothing."""
        new = self._reader.finish()
        if self.stopped:
            return Answer()
        new.text = self._stops.push(new.text) + self._stops.finish()
        return self._keep(new)

    def _keep(self, new: Answer) -> Answer:
        self._texts.append(new.text)
        self._thinking.append(new.thinking)
        self.tool_calls += new.tool_calls
        self.call_error = self.call_error or new.call_error
        return new


class _Plain:
    """All of the answer is text."""

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer

    def push(self, ids: Iterable[int]) -> Answer:
        return Answer(self._detokenizer.push(ids))

    def finish(self) -> Answer:
        return Answer(self._detokenizer.finish())


class _Nothing:
    """Ids without a tokenizer have no text."""

    def push(self, ids: Iterable[int]) -> Answer:
        return Answer()

    def finish(self) -> Answer:
        return Answer()


def _reader(request: Request) -> Reader:
    if request.tokenizer is None:
        return _Nothing()
    if request.form is None:
        return _Plain(Detokenizer(request.tokenizer, continues=request.continues))
    # A conversation only grows, so the prompt's length tells its turns apart.
    salt = str(len(request.prompt))
    return AnswerReader(request.tokenizer, request.form, continues=request.continues, salt=salt)
