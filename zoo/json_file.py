"""JSON files beside a checkpoint. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zoo.registry.errors import ZooError


def read_object(file: Path, kind: type[ZooError], *, missing_ok: bool = False) -> dict[str, Any]:
    """The object in a file. Raises an error of that kind for anything but a JSON object, with the line at fault.

    missing_ok: a file that is not there holds an empty object.
    """
    if missing_ok and not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise kind("cannot read the file", where=str(file), found=error.strerror) from None
    except json.JSONDecodeError as fault:
        raise damaged(file, "valid JSON", fault.msg, kind, line=fault.lineno) from None
    except (ValueError, RecursionError) as fault:
        raise damaged(file, "a JSON file", fault, kind) from None
    if not isinstance(value, dict):
        raise kind("not a JSON object", where=str(file), found=f"a {type(value).__name__}")
    return value


def damaged(file: Path, expected: str, fault: object, kind: type[ZooError], *, line: int | None = None) -> ZooError:
    """The error for a file that is not what its name says, which `fault` tells; a Git-LFS pointer is told apart."""
    with file.open("rb") as stream:
        start = stream.read(64)
    if not start:
        return kind("the file is empty", where=str(file), hint="fetch it again")
    if start.startswith(b"version https://git-lfs"):
        hint = "fetch it with `git lfs pull` or `zoo pull`"
        return kind("a Git-LFS pointer instead of the file", where=str(file), hint=hint)
    where = str(file) if line is None else f"{file}:{line}"
    found = " ".join(str(fault).split())[:200] or type(fault).__name__
    return kind(f"not {expected}", where=where, found=found, hint="fetch the file again")
