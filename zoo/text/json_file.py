"""JSON files beside a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zoo.registry.errors import TextError


def read_object(file: Path) -> dict[str, Any]:
    """The object in `file`, empty if there is no such file. Raises TextError for anything but a JSON object."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as fault:
        raise damaged(file, "a JSON object", fault) from fault
    if not isinstance(value, dict):
        raise TextError("not a JSON object", where=str(file), found=type(value).__name__)
    return value


def damaged(file: Path, expected: str, fault: Exception) -> TextError:
    """The error for a file that cannot be read as what its name says; a Git-LFS pointer is told apart."""
    with file.open("rb") as stream:
        start = stream.read(64)
    if not start:
        return TextError("the file is empty", where=str(file), hint="fetch it again")
    if start.startswith(b"version https://git-lfs"):
        return TextError(
            "a Git-LFS pointer instead of the file", where=str(file), hint="fetch it with `git lfs pull` or `zoo pull`"
        )
    text = " ".join(str(fault).split())[:200]
    return TextError(
        f"not {expected}", where=str(file), found=text or type(fault).__name__, hint="fetch the file again"
    )
