"""A picture from a path, an address, bytes or an object, upright and in red, green and blue."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from zoo.attached import bytes_of
from zoo.registry.errors import RequestError

if TYPE_CHECKING:
    from PIL.Image import Image

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
    hint = "`PIL.Image.fromarray` makes a picture of an array" if hasattr(source, "__array__") else None
    return _decoded(bytes_of(source, "image", where, hint=hint), where)


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
