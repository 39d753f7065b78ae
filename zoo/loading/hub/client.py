"""The hub's client, imported when it is first needed: it takes a third of a second."""

from __future__ import annotations

from typing import Any


def client() -> Any:
    """The package `huggingface_hub`."""
    import huggingface_hub

    return huggingface_hub


def client_utils() -> Any:
    """`huggingface_hub.utils`: the session, the request headers, the locks."""
    import huggingface_hub.utils

    return huggingface_hub.utils
