"""Where the hub is, where its cache is and whether it may be asked: read from the environment at every call."""

from __future__ import annotations

import os
from pathlib import Path

from zoo.registry.environment import switch

_TRUE = {"1", "on", "yes", "true"}
_OWN = "ZOO_OFFLINE"
_OTHERS = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def offline() -> str | None:
    """The environment variable that forbids the network ("HF_HUB_OFFLINE=1"), or None.

    The client reads its variable once, at import: a program that sets it later would go on calling the hub. Raises
    RequestError for a ZOO_OFFLINE that is neither on nor off.
    """
    if switch(_OWN):
        return f"{_OWN}={os.environ[_OWN]}"
    for name in _OTHERS:
        value = os.environ.get(name, "")
        if value.lower() in _TRUE:
            return f"{name}={value}"
    return None


def endpoint() -> str:
    """The hub's address, without a slash at its end."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def cache_dir() -> Path:
    """The folder where the hub's client keeps the repositories of every program of this user."""
    home = os.environ.get("HF_HOME") or str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    folder = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or str(Path(home) / "hub")
    return Path(os.path.expandvars(folder)).expanduser()
