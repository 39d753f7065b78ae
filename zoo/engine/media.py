"""Images and sounds of prompts: which tokens they stand for, and their rows, made when a step first touches them."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.components.encoder import EncoderSpec
from zoo.components.step import Rows
from zoo.engine.request import Media
from zoo.registry.errors import RequestError


@dataclass(slots=True)
class Placed:
    """A piece of a prompt's media. positions: of its tokens in the prompt, ascending.

    values_ND: what its encoder made of it, kept from the first step that needs it to the last.
    """

    encoder: str
    data: Tensor
    positions: list[int]
    values_ND: Tensor | None = None


Part = tuple[Sequence[Placed], int, int]
"""A sequence's media, and the first and the end position of its rows in a step."""


def place(encoders: Mapping[str, EncoderSpec], prompt: Sequence[int], media: Sequence[Media]) -> list[Placed]:
    """The media at the tokens that stand for them, in order.

    Raises RequestError for media that the model has no encoder of, and unless each encoder's pieces fill exactly the
    prompt's tokens for it.
    """
    for piece in media:
        if piece.encoder not in encoders:
            known = ", ".join(encoder.medium for encoder in encoders.values())
            raise RequestError(
                f"this model has no encoder for {piece.encoder}",
                where="media",
                found=f"{len(media)} of them",
                expected=f"text and {known}" if known else "text or token ids",
            )
    placed = []
    for name, encoder in encoders.items():
        placed += _placed(name, encoder, prompt, [piece.data for piece in media if piece.encoder == name])
    return placed


def _placed(name: str, encoder: EncoderSpec, prompt: Sequence[int], pieces: Sequence[Tensor]) -> list[Placed]:
    counts = [encoder.rows_of(tuple(piece.shape)) for piece in pieces]
    places = [position for position, token in enumerate(prompt) if token == encoder.token]
    if sum(counts) != len(places):
        several = f"{len(pieces)} {encoder.medium}{'' if len(pieces) == 1 else 's'}"
        fill = f", which fill {' + '.join(map(str, counts))} places" if counts else ""
        raise RequestError(
            f"the prompt's {encoder.medium} tokens are not those of its {encoder.medium}s",
            where="prompt",
            found=f"{len(places)} tokens of id {encoder.token} for {several}{fill}",
            expected=f"{sum(counts)} of them, each piece's where it is to be read",
        )
    placed, start = [], 0
    for piece, count in zip(pieces, counts, strict=True):
        placed.append(Placed(name, piece, places[start : start + count]))
        start += count
    return placed


def identity(prompt: Sequence[int], media: Sequence[Placed]) -> tuple[int, ...]:
    """The prompt's ids, negative numbers from the contents of images and sounds in place of the tokens for them."""
    if not media:
        return tuple(prompt)
    ids = [*prompt]
    for piece in media:
        data = piece.data.detach().cpu().contiguous()
        words = f"{piece.encoder} {data.dtype} {tuple(data.shape)} ".encode()
        digest = hashlib.blake2b(words, digest_size=16)
        digest.update(data.view(torch.uint8).numpy().data)
        for position in piece.positions:
            ids[position] = -1 - int.from_bytes(digest.digest())
    return tuple(ids)


def rows_of_media(decoder: nn.Module, parts: Iterable[Part], device: torch.device) -> Rows | None:
    """What stands in a step's rows in place of tokens' embeddings; None where no row is one of an image or a sound.

    Pieces whose last row is in the step let go of their values. They are encoded again where it is run again.
    """
    rows: list[int] = []
    values: list[Tensor] = []
    offset = 0
    for media, start, stop in parts:
        touched = [piece for piece in media if piece.positions[0] < stop and piece.positions[-1] >= start]
        _encode(decoder, touched, device)
        for piece in touched:
            first, end = bisect_left(piece.positions, start), bisect_left(piece.positions, stop)
            assert piece.values_ND is not None
            rows += [offset + position - start for position in piece.positions[first:end]]
            values.append(piece.values_ND[first:end])
            if end == len(piece.positions):
                piece.values_ND = None
        offset += stop - start
    return Rows(torch.tensor(rows).to(device, non_blocking=True), torch.cat(values)) if rows else None


def _encode(decoder: nn.Module, touched: Sequence[Placed], device: torch.device) -> None:
    """Gives a sequence's pieces their values, those of one encoder together."""
    for name in dict.fromkeys(piece.encoder for piece in touched):
        pieces = [piece for piece in touched if piece.encoder == name and piece.values_ND is None]
        if pieces:
            made = decoder.get_submodule(name)([piece.data.to(device) for piece in pieces])
            for piece, values_ND in zip(pieces, made, strict=True):
                piece.values_ND = values_ND
