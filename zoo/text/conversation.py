"""Conversations as callers write them, checked before any chat format sees them: one message names the fault.

The order is strict: an optional system message, then user and assistant in turn; an assistant message with tool
calls is followed by one tool message per call. What a format itself cannot express is for the format to refuse.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from zoo.images.picture import Picture
from zoo.registry.errors import TextError, nearest
from zoo.text.tools import check_calls
from zoo.text.unicode import check_text

KEYS = {
    "system": ("role", "content"),
    "user": ("role", "content"),
    "assistant": ("role", "content", "reasoning_content", "tool_calls"),
    "tool": ("role", "content", "tool_call_id", "name"),
}
PARTS = {"text": "text", "thinking": "thinking"}
MEDIA = {"image": "an image", "image_url": "an image"} | dict.fromkeys(("audio", "input_audio", "audio_url"), "a sound")
FOLLOWERS = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "tool": ("tool", "assistant", "user"),
}


def check_messages(
    messages: Sequence[Mapping[str, Any]],
    *,
    continue_final: bool = False,
    merge: bool = False,
    takes: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Copies of `messages` without null fields, tool arguments as objects.

    merge: consecutive messages of one role are allowed. takes: types of parts beside text that the chat format reads
    itself. Raises TextError naming the message at fault.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise TextError("a conversation is a list of messages", found=type(messages).__name__)
    if not messages:
        raise TextError("the conversation is empty", expected="at least one user message")
    checked = [_message(number, message, takes) for number, message in enumerate(messages, 1)]
    _check_order(checked, merge)
    _check_results(checked)
    _check_end(checked, continue_final)
    return checked


def fault(number: int, message: Mapping[str, Any], text: str, **details: Any) -> TextError:
    """The error for message `number` (from 1)."""
    role = message.get("role")
    return TextError(text, where=f"message {number} ({role})" if role else f"message {number}", **details)


def joined(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Consecutive messages of one role as one, texts an empty line apart; tool messages stay."""
    result: list[dict[str, Any]] = []
    for message in messages:
        if result and message["role"] == result[-1]["role"] != "tool":
            result[-1] = _join(result[-1], message)
        else:
            result.append(message)
    return result


def _join(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    both = {**first, **second}
    one, two = first.get("content"), second.get("content")
    if isinstance(one, str) and isinstance(two, str):
        both["content"] = f"{one}\n\n{two}"
    elif one and two:
        both["content"] = _parts(one) + _parts(two)
    elif one or two:
        both["content"] = one or two
    if calls := [*first.get("tool_calls", ()), *second.get("tool_calls", ())]:
        both["tool_calls"] = calls
    return both


def _parts(content: str | list[Any]) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _message(number: int, message: Any, takes: Collection[str]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TextError(
            "not a message",
            where=f"message {number}",
            found=type(message).__name__,
            expected='a dict such as {"role": "user", "content": "..."}',
        )
    role = message.get("role")
    if role not in KEYS:
        hint = nearest(role, KEYS) if isinstance(role, str) else None
        raise fault(number, {}, "unknown role", found=repr(role), expected=f"one of {', '.join(KEYS)}", hint=hint)
    checked = {key: value for key, value in message.items() if value is not None}
    for key in checked:
        if key not in KEYS[role]:
            raise fault(
                number,
                message,
                f"unknown field {key!r}",
                expected=f"only {', '.join(KEYS[role])}",
                hint=nearest(str(key), KEYS[role]),
            )
    _check_content(number, checked, takes)
    if "tool_calls" in checked:
        checked["tool_calls"] = check_calls(checked["tool_calls"], f"message {number} (assistant)")
        if not checked["tool_calls"]:
            del checked["tool_calls"]
    return checked


def _check_content(number: int, message: dict[str, Any], takes: Collection[str]) -> None:
    role, content = message["role"], message.get("content")
    if role == "assistant" and not content and (message.get("tool_calls") or message.get("reasoning_content")):
        message.pop("content", None)
        return
    if content is None:
        hint = 'an assistant message needs "content" or "tool_calls"' if role == "assistant" else None
        raise fault(number, message, "the content is missing or null", expected="a text", hint=hint)
    if isinstance(content, list):
        for place, part in enumerate(content, 1):
            _check_part(number, message, place, part, takes)
    elif isinstance(content, str):
        check_text(content, f"message {number} ({role})")
    else:
        raise fault(
            number, message, "the content is not a text", found=type(content).__name__, expected="a text or parts"
        )
    if not content and role != "tool":
        raise fault(number, message, "the content is empty", hint="leave the message out")


def _check_part(number: int, message: dict[str, Any], place: int, part: Any, takes: Collection[str]) -> None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "picture" and isinstance(part.get("picture"), Picture):
        if message["role"] not in ("user", "tool"):
            raise fault(number, message, f"part {place} is an image, which only user and tool messages may hold")
        return
    if kind in takes and message["role"] == "user" and kind in part:
        return
    if kind in MEDIA:
        raise fault(number, message, f"part {place} is {MEDIA[kind]}, {_why_not(kind, message, takes)}")
    if kind not in PARTS:
        found = f"type {kind!r}" if isinstance(part, Mapping) else type(part).__name__
        expected = 'a dict such as {"type": "text", "text": "..."}'
        raise fault(number, message, f"part {place} is of no known type", found=found, expected=expected)
    if not isinstance(part.get(PARTS[kind]), str):
        raise fault(number, message, f"part {place} has no text in {PARTS[kind]!r}", found=repr(part.get(PARTS[kind])))
    check_text(part[PARTS[kind]], f"message {number} ({message['role']}), part {place}")


def _why_not(kind: str, message: dict[str, Any], takes: Collection[str]) -> str:
    if kind not in takes:
        return f"which this tokenizer cannot take{'' if takes else ': it reads text only'}"
    return f"but has no {kind!r}" if message["role"] == "user" else "which only a user's message may hold"


def _check_order(messages: list[dict[str, Any]], merge: bool) -> None:
    before: dict[str, Any] | None = None
    for number, message in enumerate(messages, 1):
        role, last = message["role"], before["role"] if before else None
        allowed = ("tool",) if before and before.get("tool_calls") else FOLLOWERS[last]
        if role not in allowed and not (merge and role == last):
            raise _order_fault(number, message, before, allowed)
        before = message


def _order_fault(
    number: int, message: dict[str, Any], before: dict[str, Any] | None, allowed: tuple[str, ...]
) -> TextError:
    role, expected = message["role"], " or ".join(allowed)
    if before is None:
        return fault(number, message, f"a conversation cannot start with a message of role {role}", expected=expected)
    if role == "tool":
        return fault(number, message, "a tool message answers a tool call, but there is none before", expected=expected)
    if role == "system":
        return fault(number, message, "a system message stands only at the beginning", expected=expected)
    made = "a tool call" if before.get("tool_calls") else f"a message of role {before['role']}"
    same = role == before["role"] and not before.get("tool_calls")
    hint = "pass merge=True to join consecutive messages of one role" if same else None
    return fault(number, message, f"role {role} cannot follow {made}", expected=expected, hint=hint)


def _check_results(messages: list[dict[str, Any]]) -> None:
    """Every tool call has exactly one result before the next message of another role."""
    open_calls: list[str | None] = []
    for number, message in enumerate(messages, 1):
        if message["role"] == "tool":
            _answer(number, message, open_calls)
        elif open_calls:
            raise fault(number, message, "a tool call before this message has no result", found=f"call {open_calls[0]}")
        else:
            open_calls = [call.get("id") for call in message.get("tool_calls", ())]
    if open_calls and messages[-1]["role"] == "tool":
        raise fault(len(messages), messages[-1], "a tool call has no result", found=f"call {open_calls[0]}")


def _answer(number: int, message: dict[str, Any], open_calls: list[str | None]) -> None:
    answered = message.get("tool_call_id")
    if not open_calls:
        raise fault(number, message, "more tool results than tool calls", found=f"tool_call_id {answered!r}")
    if answered is None or open_calls == [None] * len(open_calls):
        open_calls.pop(0)
    elif answered in open_calls:
        open_calls.remove(answered)
    else:
        waiting = ", ".join(map(repr, open_calls))
        raise fault(number, message, "tool_call_id names no open call", found=repr(answered), expected=waiting)


def _check_end(messages: list[dict[str, Any]], continue_final: bool) -> None:
    number, last = len(messages), messages[-1]
    if continue_final:
        if last["role"] != "assistant":
            raise fault(number, last, "continue_final continues an assistant message, but the last is none")
        if "content" not in last or "tool_calls" in last:
            raise fault(number, last, "continue_final needs a last message of text, without tool calls")
    elif last["role"] == "assistant" and "tool_calls" in last:
        raise fault(number, last, "the conversation ends with a tool call", hint="add the tool's result")
    elif last["role"] == "assistant":
        raise fault(
            number,
            last,
            "the conversation ends with an assistant message",
            expected="user or tool as the last role",
            hint="pass continue_final=True to have it continued",
        )
    elif last["role"] == "system":
        raise fault(number, last, "there is only a system message", expected="a user message after it")
