"""The bytes of an image or a sound that comes with a prompt, wherever its caller has it. Imports no torch."""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError, URLError
from urllib.parse import unquote_to_bytes
from urllib.request import Request, urlopen

from zoo.loading.files import local_path
from zoo.loading.hub.settings import offline
from zoo.registry.errors import FetchError, RequestError

Kind = Literal["image", "sound"]

EXPECTED: dict[Kind, str] = {
    "image": "a path, an http, https or data: address, bytes, a PIL image, or a float tensor (3, height, width)",
    "sound": "a path, an http, https or data: address, a file's bytes, or a pair (samples, samples per second)",
}
MOST_BYTES: dict[Kind, int] = {"image": 64 << 20, "sound": 1 << 30}
"""Of what is fetched."""

TIMEOUT_S = 20.0
"""Without a byte from the server."""

_ADDRESS = re.compile("(https?|data):", re.IGNORECASE)


def bytes_of(source: Any, kind: Kind, where: str, *, hint: str | None = None) -> bytes:
    """The encoded bytes of a source: bytes, a path (`~` and `file:` are understood), an http(s) or data: address.

    where: what it is called in messages. hint: what to do about a source of another type. Raises RequestError for a
    source that cannot be read, FetchError for an address that gives nothing and for one that would be asked offline.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if not isinstance(source, str | Path):
        raise RequestError(
            f"this is no {kind}", where=where, found=type(source).__name__, expected=EXPECTED[kind], hint=hint
        )
    address = _ADDRESS.match(source) if isinstance(source, str) else None
    if address is None:
        return _file(local_path(source), kind, where)
    return (_data if address[1].lower() == "data" else _fetched)(str(source), kind, where)


def from_base64(text: str | bytes, kind: Kind, where: str) -> bytes:
    """The bytes that a base64 text stands for. Raises RequestError for one that is none."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(
            f"the {kind} is not in base64", where=where, found=repr(text[:20]), expected=EXPECTED[kind]
        ) from None


def _file(path: Path, kind: Kind, where: str) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        found = f"{path} ({getattr(error, 'strerror', None) or error})"
        raise RequestError(f"the {kind} cannot be read", where=where, found=found, expected=EXPECTED[kind]) from None


def _data(address: str, kind: Kind, where: str) -> bytes:
    """The bytes inside of a data: address (RFC 2397)."""
    head, comma, body = address.partition(",")
    if not comma:
        raise RequestError("a data: address that holds no data", where=where, found=address[:40], expected="a comma")
    data = unquote_to_bytes(body)
    return from_base64(data, kind, where) if head.lower().endswith(";base64") else data


def _fetched(address: str, kind: Kind, where: str) -> bytes:
    found = address[:200]
    if setting := offline():
        raise FetchError(f"a {kind}'s address cannot be asked offline", where=where, found=f"{setting}, {found}")
    most = MOST_BYTES[kind]
    try:
        with urlopen(Request(address, headers={"User-Agent": "zoo"}), timeout=TIMEOUT_S) as answer:
            data: bytes = answer.read(most + 1)
    except (URLError, OSError, ValueError) as error:
        raise FetchError(
            f"the {kind}'s address gives no {kind}",
            where=where,
            found=f"{found}: {_reason(error)}",
            hint="open the address in a browser, or give the file itself",
        ) from None
    if len(data) > most:
        raise FetchError(f"the {kind} is too large", where=where, found=found, expected=f"at most {most} bytes")
    return data


def _reason(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return f"status {error.code} ({error.reason})"
    reason = getattr(error, "reason", None) or error
    return f"no answer within {TIMEOUT_S:.0f} s" if isinstance(reason, TimeoutError) else str(reason)
