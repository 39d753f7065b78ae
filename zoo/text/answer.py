"""Generated ids to an assistant's message: its text, its thinking and its tool calls, as they come.

Mistral's control tokens count as ids, so that nothing written as text is taken for one, and so do those of channels.
`<think>` and `<tool_call>` are text with most other tokenizers; a chat format says whether to look for them.

Channels are gpt-oss's: `<|channel|>`header`<|message|>`text`<|end|>`, once or more often. The channel `analysis` is
thinking; a header with `to=functions.NAME` begins a call; all else is for the user. Source: OpenAI's guide to harmony.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from zoo.text.calls import ARGS, CALL_ID, CALLS, TAG, TAG_END, ToolCall, Written, read_calls
from zoo.text.detokenize import Detokenizer, HasVocabulary, StopStrings
from zoo.text.tools import short_id

THINK, THINK_END = "<think>", "</think>"
OPENS = {"[THINK]": "thinking", THINK: "thinking", CALLS: "call", TAG: "call"}
CLOSES = {"[/THINK]": "thinking", THINK_END: "thinking", TAG_END: "call"}
WITHIN = (CALL_ID, ARGS)
TAGS = (THINK, THINK_END, TAG, TAG_END)
CHANNEL, HEADER, BODY, BODY_ENDS = "<|channel|>", ("<|start|>", "<|constrain|>"), "<|message|>", ("<|end|>", "<|call|>")
CHANNELS = frozenset({CHANNEL, *HEADER, BODY, *BODY_ENDS})
MARKS = frozenset({*OPENS, *CLOSES, *WITHIN, *CHANNELS})
RECIPIENT = re.compile(r"to=(?:functions\.)?(\S+)")


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """What an answer may hold as plain text; control tokens are read in any case.

    thinking: `<think>`...`</think>` at the beginning. begun: the prompt ends with `<think>`.
    calls: `<tool_call>`{JSON}`</tool_call>`.
    """

    thinking: bool = False
    begun: bool = False
    calls: bool = False


PLAIN = AnswerForm()


@dataclass(slots=True)
class Answer:
    """An answer or what was added to one. call_error: why a call came back as text, or None."""

    text: str = ""
    thinking: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    call_error: str | None = None

    def __add__(self, other: Answer) -> Answer:
        return Answer(
            self.text + other.text,
            self.thinking + other.thinking,
            [*self.tool_calls, *other.tool_calls],
            self.call_error or other.call_error,
        )


class AnswerReader:
    """`push(a) + push(b) + finish()` is the answer of the ids `a + b`, however they are cut.

    A tool call is given when it is whole; one that is cut or faulty comes back as text, with `call_error`.
    salt: makes the ids of calls that the model gave none differ from those of other answers.
    """

    def __init__(self, tokenizer: HasVocabulary, form: AnswerForm, *, continues: bool = False, salt: str = "") -> None:
        self._vocabulary = tokenizer.vocabulary
        self._detokenizer = Detokenizer(tokenizer, continues=continues)
        self._form, self._salt = form, salt
        self._state = "thinking" if form.begun else "text"
        self._trim = self._begun = form.begun
        self._header: str | None = None
        self._parts: list[tuple[str, str]] = []
        self._ids: list[str] = []
        self._new = Answer()
        self._watch()

    def push(self, ids: Iterable[int]) -> Answer:
        """What `ids` make certain."""
        for token in ids:
            name = self._vocabulary.control(token)
            if name is not None and name in MARKS:
                self._close_text()
                self._mark(name)
                self._watch()
            else:
                self._read(self._detokenizer.push([token]))
        return self._taken()

    def finish(self) -> Answer:
        """The rest."""
        self._close_text()
        self._end_call()
        return self._taken()

    def _taken(self) -> Answer:
        new, self._new = self._new, Answer()
        return new

    def _close_text(self) -> None:
        self._read(self._detokenizer.finish())
        self._add(self._tags.finish())

    def _watch(self) -> None:
        """Look for the tags that may come next; a line end before one belongs to it."""
        tags: list[str] = []
        if self._state == "header":
            pass
        elif self._state == "call":
            tags = [TAG_END] if self._parts[0][0] == TAG else []
        elif self._state == "thinking":
            tags = [THINK_END, "\n" + THINK_END] if self._form.thinking else []
        else:
            tags += [THINK, "\n" + THINK] if self._form.thinking and not self._begun else []
            tags += [TAG, "\n" + TAG] if self._form.calls else []
        self._tags = StopStrings(tags)

    def _read(self, text: str) -> None:
        while text:
            self._add(self._tags.push(text))
            tag, text = self._tags.found, self._tags.rest
            if tag is None:
                return
            if tag.strip() == THINK and self._begun:
                self._add(tag)
            else:
                self._mark(tag.strip())
            self._watch()

    def _add(self, text: str) -> None:
        if self._trim:
            text = text.lstrip("\n")
            self._trim = not text
        if self._state == "header":
            self._header = f"{self._header or ''}{text}"
        elif self._state == "call":
            mark, before = self._parts[-1]
            self._parts[-1] = mark, before + text
        elif self._state == "thinking":
            self._new.thinking += text
        else:
            self._begun = self._begun or bool(text.strip())
            self._new.text += text

    def _mark(self, name: str) -> None:
        """Go on after a control token or a tag. One that closes what is not open is left out."""
        if name in CHANNELS:
            self._turn(name)
        elif name in WITHIN:
            if self._state == "call":
                self._parts.append((name, ""))
        elif CLOSES.get(name, self._state) == self._state:
            if name == TAG_END:
                self._parts.append((name, ""))
            whole = self._end_call()
            self._state, self._begun = OPENS.get(name, "text"), True
            self._trim = whole and name in TAGS
            if self._state == "call":
                self._parts = [(name, "")]

    def _turn(self, name: str) -> None:
        """Go on after a control token of channels. They mean nothing before the first `<|channel|>`."""
        if self._header is None and name != CHANNEL:
            return
        self._end_call()
        if name != BODY:
            self._state, self._header = "header", f"{self._header or ''} "
            return
        header, self._header = self._header or "", ""
        self._state, self._begun = "thinking" if "analysis" in header.split() else "text", True
        recipient = RECIPIENT.search(header)
        if recipient:
            self._state, self._parts = "call", [(CALLS, recipient[1]), (ARGS, "")]

    def _end_call(self) -> bool:
        """Give the calls of the parts. Returns False when there was one that could not be read."""
        if not self._parts:
            return True
        reading = read_calls([part for part in self._parts if part[0] != TAG_END])
        closed = TAG_END if reading.error and self._parts[-1][0] == TAG_END else ""
        self._parts, self._state, self._trim = [], "text", False
        self._new.tool_calls += map(self._named, reading.calls)
        self._add(reading.text + closed)
        self._new.call_error = self._new.call_error or reading.error
        return reading.error is None

    def _named(self, call: Written) -> ToolCall:
        made = ToolCall("", call.name, call.arguments)
        wanted = call.id or f"{self._salt} {len(self._ids)} {call.name} {made.arguments_text}"
        name = short_id(wanted)
        while name in self._ids:
            name = short_id(f"{name} {len(self._ids)}")
        self._ids.append(name)
        return ToolCall(name, call.name, call.arguments)
