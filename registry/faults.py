"""pydantic's errors -> one CardError with file, line, field, found, expected and the nearest valid name."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from zoo.registry.errors import CardError, nearest
from zoo.registry.node import Node, Path, dotted, shown, unknown_key
from zoo.registry.spec import Spec

_EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "none_required": "nothing (null)",
}


def card_error(
    error: ValidationError, model: type[BaseModel], root: Node, path: Path, origins: Mapping[str, Path] | None = None
) -> CardError:
    """The fault to show first, placed in the card `root`.

    path: where the node stands that `model` was made from. origins: fields whose values came from another place.
    """
    faults = error.errors(include_url=False)
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    loc = tuple(fault["loc"])
    handed = origins and loc and origins.get(str(loc[0]))
    place = (*handed, *loc[1:]) if handed else (*path, *loc)
    owner = _model_at(model, loc[:-1])
    if fault["type"] == "extra_forbidden" and owner is not None:
        return unknown_key(root.deepest(place[:-1]), place[:-1], str(loc[-1]), list(owner.model_fields))
    if fault["type"] == "missing":
        return missing(owner, root, place)
    return CardError(_message(fault), where=spot(root, place), **_details(fault))


def missing(model: type[BaseModel] | None, root: Node, path: Path) -> CardError:
    """The error for the required key at `path`, a field of `model`."""
    info = model.model_fields.get(str(path[-1])) if model else None
    return CardError(
        f"the key {str(path[-1])!r} is missing",
        where=spot(root, path[:-1]),
        hint=f"it gives: {info.description}" if info and info.description else None,
    )


def spot(root: Node, path: Path) -> str:
    """`file:line: dotted.field`, as far as `path` exists in the card."""
    known: Path = ()
    node = root
    for key in path:
        child = node.child(key)
        if child is None:
            break
        node, known = child, (*known, key)
    return f"{node.where}: {dotted(known)}" if known else node.where


def locating(
    call: Callable[[], Any], model: type[BaseModel], root: Node, path: Path, origins: Mapping[str, Path]
) -> Any:
    """The result of `call`, with pydantic's errors, and CardErrors without a place, placed in the card."""
    try:
        return call()
    except ValidationError as error:
        raise card_error(error, model, root, path, origins) from None
    except CardError as error:
        if error.where:
            raise
        where = spot(root, path)
        raise CardError(
            error.message, where=where, found=error.found, expected=error.expected, hint=error.hint
        ) from None


def _message(fault: Any) -> str:
    if fault["type"] == "value_error":
        return str(fault["msg"]).removeprefix("Value error, ")
    return "wrong value"


def _details(fault: Any) -> dict[str, Any]:
    if fault["type"] == "value_error":
        return {}
    value = fault["input"]
    if isinstance(value, Spec):
        return {"found": f"kind {value.kind!r}", "expected": f"a kind of {fault['ctx']['class_name']}"}
    expected = _EXPECTED.get(fault["type"]) or str(fault["msg"]).removeprefix("Input should be ")
    expected = f"a value {expected}" if expected.startswith(("greater", "less")) else expected
    if fault["type"] != "literal_error" or not isinstance(value, str):
        return {"found": shown(value), "expected": expected}
    choices = [choice.strip("'") for choice in expected.replace(" or ", ", ").split(", ")]
    return {"found": repr(value), "expected": expected, "hint": nearest(value, choices)}


def _model_at(model: type[BaseModel], loc: Path) -> type[BaseModel] | None:
    """The nested model that the fields along `loc` lead to."""
    found: type[BaseModel] | None = model
    for key in loc:
        if found is None or isinstance(key, int):
            continue
        info = found.model_fields.get(key)
        found = _nested(info.annotation) if info else None
    return found


def _nested(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for arg in typing.get_args(annotation) if (model := _nested(arg))), None)
