"""A picture from a path, an address, bytes or an object, upright and in red, green and blue."""

from __future__ import annotations

import base64
import binascii
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import Request, url2pathname, urlopen

from zoo.registry.errors import FetchError, RequestError

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_BYTES = 64 << 20
"""Of a picture that is fetched."""

TIMEOUT_S = 20.0
"""Without a byte from the server."""

EXPECTED = "a path, an http, https or data: address, bytes, a PIL image, or a float tensor (3, height, width)"
DEEP = ("I;16", "I;16L", "I;16B", "I;16N")
WIDE = ("I", "F")


def open_image(source: Any, where: str) -> Image:
    """The picture as RGB. Metadata turns it upright; what is transparent becomes white, as mistral-common has it.

    where: what it is called in messages. Raises RequestError for what is no picture, FetchError for an address that
    gives none.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        return _upright_rgb(source, where)
    return _decoded(_bytes_of(source, where), where)


def _bytes_of(source: Any, where: str) -> bytes:
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if isinstance(source, Path):
        return _file(source, where)
    if not isinstance(source, str):
        hint = "`PIL.Image.fromarray` makes a picture of an array" if hasattr(source, "__array__") else None
        raise RequestError("this is no image", where=where, found=type(source).__name__, expected=EXPECTED, hint=hint)
    scheme = urlsplit(source).scheme.lower() if ":" in source[:8] else ""
    if scheme == "data":
        return _data(source, where)
    if scheme in ("http", "https"):
        return _fetched(source, where)
    return _file(Path(url2pathname(urlsplit(source).path)) if scheme == "file" else Path(source), where)


def _file(path: Path, where: str) -> bytes:
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        found = f"{path} ({error.strerror})"
        raise RequestError("the image cannot be read", where=where, found=found, expected=EXPECTED) from None
    except ValueError as error:
        raise RequestError("the image cannot be read", where=where, found=str(error), expected=EXPECTED) from None


def _data(address: str, where: str) -> bytes:
    """The bytes inside of a data: address (RFC 2397)."""
    head, comma, body = address.partition(",")
    try:
        if not comma:
            raise ValueError("no comma before the data")
        if not head.lower().endswith(";base64"):
            return unquote_to_bytes(body)
        return base64.b64decode(unquote_to_bytes(body), validate=True)
    except (ValueError, binascii.Error) as error:
        raise RequestError(
            "a data: address that holds no data", where=where, found=f"{address[:40]}... ({error})"
        ) from None


def _fetched(address: str, where: str) -> bytes:
    from zoo.loading.hub.settings import offline

    if setting := offline():
        raise FetchError("an image's address cannot be asked offline", where=where, found=f"{setting}, {address[:200]}")
    try:
        with urlopen(Request(address, headers={"User-Agent": "zoo"}), timeout=TIMEOUT_S) as answer:
            data: bytes = answer.read(MOST_BYTES + 1)
    except HTTPError as error:
        found = f"status {error.code} ({error.reason})"
        raise _no_answer(address, where, found) from None
    except (URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        found = f"no answer within {TIMEOUT_S:.0f} s" if isinstance(reason, TimeoutError) else str(reason)
        raise _no_answer(address, where, found) from None
    if len(data) > MOST_BYTES:
        raise FetchError(
            "the image is too large", where=where, found=address[:200], expected=f"at most {MOST_BYTES} bytes"
        )
    return data


def _no_answer(address: str, where: str, found: str) -> FetchError:
    return FetchError(
        "the image's address gives no image",
        where=where,
        found=f"{address[:200]}: {found}",
        hint="open the address in a browser, or give the file itself",
    )


def _decoded(data: bytes, where: str) -> Image:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return _upright_rgb(image, where)
    except RequestError:
        raise
    except Image.DecompressionBombError as error:
        raise RequestError("the image has too many pixels", where=where, found=str(error)) from None
    except Exception as error:  # the decoders of damaged files raise whatever they stumble over
        raise RequestError(
            "no picture that can be read",
            where=where,
            found=f"{len(data)} bytes that begin with {data[:12]!r} ({type(error).__name__})",
            expected="a PNG, JPEG, WebP, GIF, BMP or TIFF file, whole",
        ) from None


def _upright_rgb(image: Image, where: str) -> Image:
    from PIL import ImageOps

    turned: Image = ImageOps.exif_transpose(image)
    if turned.mode in DEEP:
        return _eight_bits(turned).convert("RGB")
    if turned.mode in WIDE:
        raise RequestError(
            "a picture of 32 bits, whose white is not known",
            where=where,
            found=f"mode {turned.mode}",
            expected="8 or 16 bits for each colour",
            hint="scale it to 8 bits yourself",
        )
    return _on_white(turned)


def _eight_bits(image: Image) -> Image:
    """Sixteen bits scaled down; Pillow's own conversion cuts them off at 255."""
    import numpy as np
    from PIL import Image as images

    return images.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))


def _on_white(image: Image) -> Image:
    from PIL import Image as images

    if image.mode == "RGB":
        return image
    clear = image if image.mode == "RGBA" else image.convert("RGBA")
    white = images.new("RGBA", clear.size, "WHITE")
    white.paste(clear, (0, 0), clear)
    return white.convert("RGB")
