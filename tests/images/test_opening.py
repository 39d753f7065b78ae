"""Pictures from wherever they come, upright and in RGB; what is none is named."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from PIL import Image

import zoo.attached as attached
from zoo.images.opening import open_image
from zoo.registry.errors import FetchError, RequestError


def picture(mode: str = "RGB", size: tuple[int, int] = (5, 3)) -> Image.Image:
    columns, rows = size
    colours = np.arange(columns * rows * 3, dtype=np.uint8).reshape(rows, columns, 3) * 3
    return Image.fromarray(colours).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **more: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        found = self.path == "/picture.png"
        self.send_response(200 if found else 404)
        self.end_headers()
        if found:
            self.wfile.write(encoded(picture()))

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    serving = HTTPServer(("127.0.0.1", 0), Answers)
    Thread(target=serving.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{serving.server_port}"
    serving.shutdown()
    serving.server_close()


def test_every_way_to_a_picture_gives_the_same(tmp_path: Path, server: str) -> None:
    data, file = encoded(picture()), tmp_path / "a picture.png"
    file.write_bytes(data)
    sources = [picture(), data, bytearray(data), file, str(file), file.as_uri(), f"{server}/picture.png"]
    sources.append("data:image/png;base64," + base64.b64encode(data).decode())
    for source in sources:
        assert open_image(source, "image 1") == picture()


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_modes_become_rgb(mode: str) -> None:
    image = picture(mode)
    assert open_image(image, "image 1") == image.convert("RGBA").convert("RGB")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_what_is_transparent_becomes_white(mode: str) -> None:
    image = picture("RGBA")
    image.putalpha(0)
    found = open_image(image.convert(mode), "image 1")
    assert found.mode == "RGB"
    assert found.getcolors() == [(15, (255, 255, 255))]


def test_modes_are_as_mistral_common_has_them() -> None:
    from mistral_common.tokens.tokenizers.image import _convert_to_rgb

    half = picture("RGBA")
    half.putalpha(100)
    palette = picture("P")
    palette.info["transparency"] = 3
    for image in (half, palette, picture("L"), picture("CMYK"), picture("1")):
        assert open_image(image, "image 1") == _convert_to_rgb(image)


def test_sixteen_bits_are_scaled_not_cut_off() -> None:
    grey = np.array([[0, 257, 65535, 32768]], dtype=np.uint16)
    found = open_image(encoded(Image.fromarray(grey)), "image 1")
    assert np.asarray(found)[0, :, 0].tolist() == [0, 1, 255, 128]
    with pytest.raises(RequestError, match="32 bits, whose white is not known; found mode F"):
        open_image(Image.new("F", (2, 2)), "image 1")


def test_metadata_turns_a_picture_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(picture(size=(8, 16)), "JPEG", exif=exif, quality=95)
    assert open_image(turned, "image 1").size == (16, 8)


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    cut = encoded(picture(size=(64, 64)))[:150]
    for source, found in (
        (b"", "0 bytes that begin with b''"),
        (b"hello world, no picture", "23 bytes that begin with b'hello world,'"),
        (cut, "150 bytes that begin with .*PNG"),
    ):
        with pytest.raises(RequestError, match=f"image 2: no picture that can be read; found {found}"):
            open_image(source, "image 2")
    for missing in (str(tmp_path / "none.png"), tmp_path / "none.png", tmp_path, "nul\0l"):
        with pytest.raises(RequestError, match=r"image 1: the image cannot be read; found .*expected a path, an http"):
            open_image(missing, "image 1")
    for no_image, hint in ((3, ""), (None, ""), (np.zeros((2, 2, 3)), "PIL.Image.fromarray")):
        with pytest.raises(RequestError, match=f"this is no image.*{hint}"):
            open_image(no_image, "image 1")
    with pytest.raises(RequestError, match="a data: address that holds no data"):
        open_image("data:image/png", "image 1")
    with pytest.raises(RequestError, match="the image is not in base64; found b'%%%'"):
        open_image("data:image/png;base64,%%%", "image 1")


def test_addresses_that_give_no_picture(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FetchError, match=r"image 1: the image's address gives no image; found .*/gone.png: status 404"):
        open_image(f"{server}/gone.png", "image 1")
    with pytest.raises(FetchError, match=r"gives no image.*refused"):
        open_image("http://127.0.0.1:9/picture.png", "image 1")
    monkeypatch.setitem(attached.MOST_BYTES, "image", 10)
    with pytest.raises(FetchError, match=r"the image is too large; found .*; expected at most 10 bytes"):
        open_image(f"{server}/picture.png", "image 1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FetchError, match="cannot be asked offline; found HF_HUB_OFFLINE=1"):
        open_image(f"{server}/picture.png", "image 1")


def test_a_bomb_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    with pytest.raises(RequestError, match="image 1: the image has too many pixels"):
        open_image(encoded(picture()), "image 1")
