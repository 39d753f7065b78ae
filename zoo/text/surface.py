"""The decoders of `tokenizer.json`, as far as they can stream: what one piece adds to a text, in bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from zoo.registry.errors import TextError


class Surface(Protocol):
    """`each_byte` as in `zoo.text.detokenize.Vocabulary`."""

    each_byte: bool

    def of(self, piece: str, first: bool) -> bytes:
        """The bytes of a piece of the model's vocabulary; `first` if it begins a text."""

    def of_added(self, piece: str, first: bool) -> bytes:
        """The bytes of a token that was added beside the model's vocabulary."""


class ByteLevelSurface:
    """Every byte has a printable letter of its own (GPT-2's table)."""

    each_byte = False

    def __init__(self) -> None:
        letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
        rest = [byte for byte in range(256) if byte not in letters]
        self._bytes = {chr(byte): byte for byte in letters} | {chr(256 + i): byte for i, byte in enumerate(rest)}

    def of(self, piece: str, first: bool) -> bytes:
        try:
            return bytes([self._bytes[letter] for letter in piece])
        except KeyError:
            return piece.encode()

    def of_added(self, piece: str, first: bool) -> bytes:
        return piece.encode()


class TextSurface:
    """Pieces are text with a sign for the space; lone bytes may be written `<0xE4>`.

    replacements: texts to put for others. dropped: sign that is left out at the beginning of a text, and how often.
    lone_bytes: whether `<0xE4>` is a byte. joiner: text between pieces.
    """

    each_byte = True

    def __init__(
        self, replacements: Mapping[str, str], dropped: tuple[str, int] | None, lone_bytes: bool, joiner: str = ""
    ) -> None:
        self._replacements, self._dropped = replacements, dropped
        self._lone_bytes, self._joiner = lone_bytes, joiner

    def of(self, piece: str, first: bool) -> bytes:
        if self._lone_bytes and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        for old, new in self._replacements.items():
            piece = piece.replace(old, new)
        if not first:
            return (self._joiner + piece).encode()
        sign, count = self._dropped or ("", 0)
        while count > 0 and piece.startswith(sign):
            piece, count = piece.removeprefix(sign), count - 1
        return piece.encode()

    def of_added(self, piece: str, first: bool) -> bytes:
        return self.of(piece, first)


def surface_of(decoder: Mapping[str, Any] | None, where: str) -> Surface:
    """The surface for the `decoder` entry of `tokenizer.json`. Raises TextError for decoders that cannot stream."""
    if decoder is None:
        return TextSurface({}, None, lone_bytes=False, joiner=" ")
    steps = [step for step in _flat(decoder) if step["type"] != "Fuse"]
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return ByteLevelSurface()
    replacements: dict[str, str] = {}
    dropped: tuple[str, int] | None = None
    for step in steps:
        if step["type"] == "Replace" and "String" in step["pattern"]:
            replacements[step["pattern"]["String"]] = step["content"]
        elif step["type"] == "Metaspace":
            replacements[step["replacement"]] = " "
            # the library leaves out every sign of the first piece, so a count is only a bound
            dropped = None if step["prepend_scheme"] == "never" else (" ", 1 << 30)
        elif step["type"] == "Strip" and not step["stop"]:
            dropped = (step["content"], step["start"])
        elif step["type"] != "ByteFallback":
            raise _unknown(step, where)
    return TextSurface(replacements, dropped, any(step["type"] == "ByteFallback" for step in steps))


def _flat(decoder: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _flat(step)
    else:
        yield decoder


def _unknown(step: Mapping[str, Any], where: str) -> TextError:
    return TextError(
        "text cannot be streamed with this decoder of the tokenizer",
        where=where,
        found=step["type"],
        expected="ByteLevel, Metaspace, or Replace, ByteFallback, Fuse and Strip at the beginning",
    )
