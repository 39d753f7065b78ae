"""Tool definitions and tool calls in OpenAI's form, checked."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from zoo.registry.errors import TextError

SHORT_ID = re.compile(r"[a-zA-Z0-9]{9}")
ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def check_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """`tool_calls` with their arguments as objects. Raises TextError naming the call at fault."""
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise TextError("tool_calls is not a list", where=where, found=type(calls).__name__)
    checked = [_call(call, f"{where}, call {place}") for place, call in enumerate(calls, 1)]
    ids = [call["id"] for call in checked if "id" in call]
    for name in ids:
        if ids.count(name) > 1:
            raise TextError("two calls have the same id", where=where, found=repr(name))
    return checked


def check_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Tool definitions, or None if there are none. Raises TextError naming the tool at fault."""
    if tools is None:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise TextError("tools are a list of definitions", found=type(tools).__name__)
    return [_tool(tool, f"tool {place}") for place, tool in enumerate(tools, 1)] or None


def short_id(name: str) -> str:
    """`name` if it is nine letters and digits, as Mistral's tokenizers v3 to v11 demand, else nine made from it."""
    if SHORT_ID.fullmatch(name):
        return name
    number = int.from_bytes(hashlib.sha256(name.encode()).digest())
    return "".join(ALPHABET[number // 62**place % 62] for place in range(9))


def _call(call: Any, where: str) -> dict[str, Any]:
    function = _function(call, where)
    checked: dict[str, Any] = {}
    if (name := call.get("id")) is not None:
        if not isinstance(name, str) or not name:
            raise TextError("the id of a tool call is a text", where=where, found=repr(name))
        checked["id"] = name
    arguments = _arguments(function.get("arguments"), where)
    return checked | {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tool(tool: Any, where: str) -> dict[str, Any]:
    function = _function(tool, where)
    parameters = function.get("parameters") or {}
    if not isinstance(parameters, Mapping):
        raise TextError("parameters are a JSON Schema", where=where, found=type(parameters).__name__)
    return {"type": "function", "function": {**function, "parameters": dict(parameters)}}


def _function(holder: Any, where: str) -> Mapping[str, Any]:
    """The `function` of a call or a definition, which must have a name."""
    function = holder.get("function") if isinstance(holder, Mapping) else None
    if not isinstance(function, Mapping) or holder.get("type", "function") != "function":
        expected = '{"type": "function", "function": {"name": ..., ...}}'
        raise TextError("not in OpenAI's form", where=where, found=repr(holder)[:80], expected=expected)
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise TextError("the function has no name", where=where, found=repr(function.get("name")))
    return function


def _arguments(arguments: Any, where: str) -> dict[str, Any]:
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = json.loads(arguments)
        except ValueError as fault:
            raise TextError("the arguments are not JSON", where=where, found=arguments[:80]) from fault
    if arguments is None or arguments == "" or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    if not isinstance(arguments, Mapping):
        raise TextError("the arguments are no JSON object", where=where, found=repr(arguments)[:80])
    return dict(arguments)
