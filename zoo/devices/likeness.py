"""Whether ranks that were started apart run the same model: the same zoo, card, settings, kernels and weights.

Each says what it has in a few words, which are compared before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch

import zoo
from zoo.components import native
from zoo.loading.files import locate
from zoo.registry.errors import RequestError, WeightsError
from zoo.registry.plan import Plan

PLACES, PLACE = 32, 256
"""At how many places of a file bytes are compared, and how many: to read all of it would take as long as to load it."""


def traits(plan: Plan, dtype: str, quantize: str | None, weights: str | Path) -> dict[str, str]:
    """What must be the same on all ranks. weights: this machine's folder or file, or "random"."""
    card = plan.card.to_dict()
    return {
        "zoo": zoo.__version__,
        "torch": torch.__version__,
        "kernels": "C" if native.missing() is None else "PyTorch",
        "card": f"{plan.card.name} ({_short(json.dumps(card, sort_keys=True, default=str).encode())})",
        "dtype": dtype,
        "quantize": str(quantize),
        "weights": "random" if weights == "random" else _of_files(Path(weights), plan),
    }


def compare(own: Mapping[str, str], first: Mapping[str, str]) -> None:
    """Raises RequestError naming the first thing in which this rank differs from the first one."""
    for name, expected in first.items():
        if own.get(name) != expected:
            raise RequestError(
                f"ranks must have the same {name}",
                where=name,
                found=own.get(name, "nothing"),
                expected=f"{expected}, as the first rank has it",
                hint="give all machines the same files, versions and options",
            )


def _of_files(place: Path, plan: Plan) -> str:
    """How large the weights' files are, and a digest of their tensors' names and shapes and of bytes here and there."""
    files, found = locate(place, plan.card.source.layout), hashlib.blake2b(digest_size=8)
    for name, info in sorted(files.headers.items()):
        found.update(f"{name} {info.dtype} {[*info.shape]}\n".encode())
    for file in files.files:
        found.update(_sample(file))
    size = sum(file.stat().st_size for file in files.files)
    return f"{size} bytes in {len(files.files)} files ({found.hexdigest()})"


def _sample(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, 2)
            parts = []
            for number in range(PLACES):
                opened.seek(size * number // PLACES)
                parts.append(opened.read(PLACE))
            return b"".join(parts)
    except OSError as error:
        raise WeightsError("cannot read the weights", where=str(file), found=error.strerror) from None


def _short(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=6).hexdigest()
