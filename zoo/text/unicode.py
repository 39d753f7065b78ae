"""Texts that are no text: what a terminal or a file gives for bytes that are not UTF-8."""

from __future__ import annotations

import re
from typing import Any

from zoo.registry.errors import TextError

_HALF = re.compile("[\ud800-\udfff]")


def check_text(text: str, where: str | None = None) -> None:
    """Raises TextError for what is no text, and for half a character, which tokenizers replace without a word or fail
    on."""
    if not isinstance(text, str):
        raise TextError("not a text", where=where, found=repr(text)[:80])
    half = _HALF.search(text)
    if half is not None:
        details: dict[str, Any] = {"found": f"{half[0]!r} at character {half.start()}", "expected": "Unicode"}
        raise TextError("the text holds half a character", where=where, **details, hint="read it as UTF-8")
