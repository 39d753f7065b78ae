"""safetensors files written tensor by tensor, so that no more than one piece of a tensor is in memory twice.

The library's own writer takes all tensors of a file at once. Format: see zoo/loading/reader.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

import torch

from zoo.loading.pickled import NAMES
from zoo.loading.reader import BITS, Progress
from zoo.saving.names import FileTensor
from zoo.saving.values import Weights, dtype_of, pieces


def write_weights(
    folder: Path,
    stem: str,
    weights: Weights,
    tensors: Sequence[FileTensor],
    limit: int,
    progress: Progress | None = None,
) -> list[Path]:
    """Writes STEM.safetensors or, beyond `limit` bytes, shards and their index; returns the weight files."""
    sizes = {tensor.name: _nbytes(weights, tensor) for tensor in tensors}
    total, done = sum(sizes.values()), 0
    shards = [*_shards(tensors, sizes, limit)]
    names = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    else:
        weight_map = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    for name, shard in zip(names, shards, strict=True):
        for count in _write(folder / name, weights, shard):
            done += count
            if progress:
                progress(done, total)
    return [folder / name for name in names]


def weight_bytes(weights: Weights, tensors: Sequence[FileTensor]) -> int:
    """Bytes of all tensors in files, headers left out."""
    return sum(_nbytes(weights, tensor) for tensor in tensors)


def _nbytes(weights: Weights, tensor: FileTensor) -> int:
    return prod(tensor.shape) * BITS[NAMES[dtype_of(weights, tensor)]] // 8


def _shards(tensors: Sequence[FileTensor], sizes: dict[str, int], limit: int) -> Iterator[list[FileTensor]]:
    """Neighbours that together stay within the limit; a tensor beyond it has a shard of its own."""
    shard: list[FileTensor] = []
    filled = 0
    for tensor in tensors:
        if shard and filled + sizes[tensor.name] > limit:
            yield shard
            shard, filled = [], 0
        shard.append(tensor)
        filled += sizes[tensor.name]
    yield shard


def _write(file: Path, weights: Weights, tensors: Sequence[FileTensor]) -> Iterator[int]:
    """Writes one file, and says how many bytes each tensor took."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        stop = start + _nbytes(weights, tensor)
        dtype = NAMES[dtype_of(weights, tensor)]
        header[tensor.name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            before = out.tell()
            for piece in pieces(weights, tensor):
                out.write(piece.flatten().view(torch.uint8).numpy().data)
            yield out.tell() - before
        out.flush()
        os.fsync(out.fileno())
