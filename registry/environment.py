"""The environment variables that zoo reads as its own: their names, and switches that are on or off."""

from __future__ import annotations

import os

from zoo.registry.errors import RequestError, nearest

PREFIX = "ZOO_"

NAMES = frozenset(
    {
        "ZOO_ATTENTION",
        "ZOO_CAPTURE",
        "ZOO_DEADLINE",
        "ZOO_DISABLE_PLUGINS",
        "ZOO_FUSED",
        "ZOO_NATIVE",
        "ZOO_OFFLINE",
        "ZOO_STRICT_PLUGINS",
        "ZOO_UNPACKED",
    }
)

DEADLINE = 30.0
"""Seconds after which a rank that stands still is given up, unless ZOO_DEADLINE says otherwise."""

_ON, _OFF = ("1", "on", "yes", "true"), ("", "0", "off", "no", "false")


def switch(name: str) -> bool:
    """Whether the variable is on. Raises RequestError for what is neither on nor off."""
    value = os.environ.get(name, "").strip().lower()
    if value not in (*_ON, *_OFF):
        raise RequestError("neither on nor off", where=name, found=repr(os.environ[name]), expected="1 or 0")
    return value in _ON


def whole(name: str, default: int) -> int:
    """A whole number above 0, such as launchers of processes set. Raises RequestError for anything else."""
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit() and int(text)):
        raise RequestError("not a number of processes", where=name, found=repr(text), expected="a number above 0")
    return int(text)


def deadline() -> float:
    """Seconds after which a rank that stands still is given up, by ZOO_DEADLINE. Raises RequestError for no number."""
    text = os.environ.get("ZOO_DEADLINE", str(DEADLINE))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise RequestError(
            "not a number of seconds", where="ZOO_DEADLINE", found=repr(text), expected="a number above 0"
        )
    return seconds


def strangers() -> list[str]:
    """A sentence for each variable that is named as zoo's are and that nothing of zoo reads."""
    names = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in NAMES)
    hints = {name: nearest(name, NAMES, count=1) for name in names}
    return [f"nothing reads the variable {name}{f'; {hint}' if hint else ''}" for name, hint in hints.items()]
