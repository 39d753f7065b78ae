"""Tool calls as models write them: checked and read, or told why not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

CALLS, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
TAG, TAG_END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the model wants to be called.

    id: nine letters and digits, as Mistral's tokenizers v3 to v11 demand; unlike those of the same answer.
    arguments: the JSON object that the model wrote.
    """

    id: str
    name: str
    arguments: dict[str, Any]

    @property
    def arguments_text(self) -> str:
        """The arguments as JSON text."""
        return json.dumps(self.arguments, ensure_ascii=False)

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's form, which messages take in `tool_calls`."""
        function = {"name": self.name, "arguments": self.arguments_text}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Written:
    """A call as written. id: None where the format has none."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """calls: those that could be read. text: what is none of them. error: why `text` holds a call, else None."""

    calls: list[Written]
    text: str = ""
    error: str | None = None


def read_calls(parts: Sequence[tuple[str, str]]) -> Reading:
    """The calls of `parts`: a control token's name or a tag, with the text up to the next one.

    `[TOOL_CALLS]` with a JSON list (Mistral v2 to v7), with a name, `[ARGS]` and JSON (v11 on, `[CALL_ID]` and an id
    between them in v11), or `<tool_call>` with a JSON object. What cannot be read comes back as it was written.
    """
    marks = [mark for mark, _ in parts]
    texts = [text for _, text in parts]
    if marks == [CALLS]:
        return _listed(texts[0])
    try:
        if marks[0] == TAG:
            return Reading([_call(_json(texts[0]))])
        if marks not in ([CALLS, ARGS], [CALLS, CALL_ID, ARGS]):
            raise ValueError("its control tokens are in no known order")
        name = texts[1].strip() if len(texts) == 3 else None
        return Reading([_written(texts[0].strip(), _json(texts[-1]), name)])
    except (ValueError, RecursionError) as fault:
        return Reading([], "".join(mark + text for mark, text in parts), _reason(fault))


def _listed(text: str) -> Reading:
    """The calls of a JSON list up to the first that cannot be read, so that a cut list keeps its whole ones."""
    calls: list[Written] = []
    start = 0
    try:
        at, before = _skip(text, 0), "["
        if text[at : at + 1] != before:
            raise ValueError("it is no JSON list")
        while text[at : at + 1] == before:
            value, at = DECODER.raw_decode(text, _skip(text, at + 1))
            calls.append(_call(value))
            at = start = _skip(text, at)
            before = ","
        if text[at : at + 1] not in ("]", ""):
            raise ValueError(f"{text[at]!r} stands between two calls")
        return Reading(calls, text[at + 1 :].strip())
    except (ValueError, RecursionError) as fault:
        rest = text[start:].lstrip(", ") if calls else text
        return Reading(calls, CALLS + rest, _reason(fault)) if rest or not calls else Reading(calls)


def _call(value: Any) -> Written:
    if not isinstance(value, dict) or "arguments" not in value:
        raise ValueError("it is no JSON object with name and arguments")
    arguments, name = value["arguments"], value.get("id")
    if isinstance(arguments, str):
        arguments = _json(arguments)
    return _written(value.get("name"), arguments, name if isinstance(name, str) else None)


def _written(name: Any, arguments: Any, id_: str | None) -> Written:
    if not isinstance(name, str) or not name:
        raise ValueError("the function has no name")
    if not isinstance(arguments, dict):
        raise ValueError("the arguments are no JSON object")
    json.dumps([name, arguments, id_], ensure_ascii=False).encode()  # half characters cannot be written
    return Written(name, arguments, id_ or None)


def _json(text: str) -> Any:
    return DECODER.decode(text)


def _skip(text: str, at: int) -> int:
    """The place of the first character from `at` on that is no white space."""
    return len(text) - len(text[at:].lstrip())


def _reason(fault: Exception) -> str:
    if isinstance(fault, RecursionError):
        return "a tool call could not be read: its JSON is nested too deeply"
    if isinstance(fault, json.JSONDecodeError):
        return f"a tool call could not be read: its JSON is cut or faulty ({fault.msg} at character {fault.pos})"
    return f"a tool call could not be read: {fault}"


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


# Line ends inside texts are common in code that models write, and can mean nothing else.
DECODER = json.JSONDecoder(parse_constant=_refuse, strict=False)
