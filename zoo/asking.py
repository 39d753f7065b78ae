"""What is wanted of a model, checked before its weights are read. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.registry.card import Card
from zoo.registry.errors import RequestError, TextError, ZooError
from zoo.registry.plan import Plan

if TYPE_CHECKING:
    import torch

    from zoo.prompts import Prompts
    from zoo.text.tokenizer import Tokenizer

DEFAULT_BATCH = 64


def context_of(card: Card, context: int | None, name: str = "max_context") -> int:
    """Tokens of prompt and answer together. Raises RequestError for more than the card has.

    name: what the caller knows it by.
    """
    if context is None:
        return card.context_length
    if not whole(context) or not 1 <= context <= card.context_length:
        raise RequestError(
            f"{name} is out of range",
            where=card.name,
            found=repr(context),
            expected=f"1 to {card.context_length}, the card's context_length",
            hint="override the card's context_length if the model really reads more",
        )
    return context


def batch_of(max_batch_size: int | None) -> int:
    """Sequences that may run together. Raises RequestError for no number of them."""
    return DEFAULT_BATCH if max_batch_size is None else check_count("max_batch_size", max_batch_size)


def check_count(name: str, value: int) -> int:
    """Raises RequestError for what is no whole number above 0."""
    if not whole(value) or value < 1:
        raise RequestError("out of range", where=name, found=repr(value), expected="a whole number, at least 1")
    return value


def check_switches(**switches: bool) -> None:
    """Raises RequestError for a value that is neither on nor off: a text such as "no" would be on."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise RequestError("out of range", where=name, found=repr(value), expected="True or False")


def whole(value: object) -> bool:
    """Whether it is a whole number; True is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_variables(device: torch.device) -> None:
    """Raises ZooError for words in ZOO_ATTENTION, ZOO_CAPTURE and ZOO_FUSED that steps on the device would refuse."""
    from zoo.components.attention.kernels import chosen
    from zoo.components.fused import wanted
    from zoo.engine.capture import captures

    chosen(), wanted(), captures(device)


def asked(first: Callable[[Prompts], object], plan: Plan, tokenizer: Tokenizer | TextError, source: str | Path) -> None:
    """Calls `first`. Where it fails and the weights would too, theirs is the error that is told."""
    from zoo.loading.fill import check_files
    from zoo.prompts import Prompts

    try:
        first(Prompts(plan, tokenizer))
    except ZooError:
        check_files(plan, source)
        raise
