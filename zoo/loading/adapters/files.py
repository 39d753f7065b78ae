"""An adapter's files: pairs of low-rank factors with their scale, and whole tensors, each by the base's own name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from zoo.json_file import read_object
from zoo.loading.adapters.peft import PeftConfig
from zoo.loading.files import existing
from zoo.loading.reader import TensorInfo, read_headers, shape_text
from zoo.registry.errors import WeightsError

CONFIG = "adapter_config.json"
PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PEFT_PREFIX = "base_model.model."
NATIVE_FILE = "lora.safetensors"
NATIVE_SCALE = 2.0
"""mistral-inference's default, `load_lora(scaling=2.0)`: its files do not say."""

SHOWN = 5

_FACTOR = re.compile(r"(.+)\.lora_(A|B)\.weight")
_OTHERS = {
    "lora_magnitude_vector": "DoRA's magnitudes",
    "lora_embedding_": "a low-rank change of an embedding",
    "lora_A.bias": "a bias of a low-rank factor",
    "lora_B.bias": "a bias of a low-rank factor",
}


@dataclass(frozen=True, slots=True)
class Pair:
    """scale * B A is added to the base's weight `name`.weight; a: (rank, in), b: (out, rank)."""

    name: str
    a: TensorInfo
    b: TensorInfo
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class AdapterFiles:
    """What the files say. whole: tensors that replace the base's, by the base's name. scales: where they come from.

    base: the model that it was trained on, as its config names it. targets: module names that must all be there.
    """

    name: str
    form: str
    where: str
    pairs: tuple[Pair, ...]
    whole: Mapping[str, TensorInfo]
    scales: str = ""
    base: str | None = None
    targets: tuple[str, ...] = ()


def open_adapter(ref: str | Path) -> AdapterFiles:
    """The adapter in a PEFT folder, in a folder with lora.safetensors, or in a file; no weights are read.

    Raises WeightsError for what is no adapter, what lacks its config, and kinds of adapters that are not read.
    """
    path = existing(ref)
    if path.is_dir():
        return _of_folder(path)
    if path.name in (CONFIG, *PEFT_FILES) and (path.parent / CONFIG).is_file():
        return _peft(path.parent)
    headers = read_headers(path)
    if any(name.startswith(PEFT_PREFIX) for name in headers):
        raise _no_config(path)
    return _native(path, headers)


def _of_folder(folder: Path) -> AdapterFiles:
    if (folder / CONFIG).is_file():
        return _peft(folder)
    if (folder / NATIVE_FILE).is_file():
        return _native(folder / NATIVE_FILE, read_headers(folder / NATIVE_FILE))
    for name in PEFT_FILES:
        if (folder / name).is_file():
            raise _no_config(folder / name)
    names = sorted(file.name for file in folder.iterdir())
    raise WeightsError(
        "there is no adapter in this folder",
        where=str(folder),
        found=", ".join(names[:SHOWN]) or "nothing",
        expected=f"{CONFIG} with {PEFT_FILES[0]}, or {NATIVE_FILE}",
    )


def _no_config(path: Path) -> WeightsError:
    return WeightsError(
        "the adapter's config is missing, and without it its scale cannot be known",
        where=str(path),
        expected=f"{CONFIG} beside it, with r and lora_alpha",
    )


def _peft(folder: Path) -> AdapterFiles:
    config = PeftConfig.read(read_object(folder / CONFIG, WeightsError), str(folder / CONFIG))
    path = next((folder / name for name in PEFT_FILES if (folder / name).is_file()), None)
    if path is None:
        raise WeightsError("the adapter's weights are missing", where=str(folder), expected=" or ".join(PEFT_FILES))
    headers = {name.removeprefix(PEFT_PREFIX): info for name, info in read_headers(path).items()}
    pairs, whole = _sorted_out(headers, path, config.scale)
    for pair in pairs:
        if pair.rank != config.rank(pair.name):
            raise WeightsError(
                "the adapter's rank is not the one of its config",
                where=f"{path}: {pair.a.name}",
                found=str(pair.rank),
                expected=f"{config.rank(pair.name)}, by r and rank_pattern",
            )
    return AdapterFiles(folder.name, "PEFT", str(path), pairs, whole, "", config.base, config.targets)


def _native(path: Path, headers: Mapping[str, TensorInfo]) -> AdapterFiles:
    params = path.parent / "params.json"
    given = read_object(params, WeightsError).get("lora") if params.is_file() else None
    scale, scales = NATIVE_SCALE, "Mistral's default"
    if given is not None:
        if not isinstance(given, dict) or not _is_number(given.get("scaling", NATIVE_SCALE)):
            raise WeightsError(
                "`lora` is not understood", where=str(params), found=repr(given)[:80], expected="scaling"
            )
        scale, scales = float(given.get("scaling", NATIVE_SCALE)), "params.json"
    pairs, whole = _sorted_out(headers, path, lambda name: scale)
    if whole:
        raise WeightsError(
            "not an adapter: it holds tensors that are no low-rank factors" if pairs else "this is not an adapter",
            where=str(path),
            found=", ".join(sorted(whole)[:SHOWN]),
            expected="names that end with .lora_A.weight and .lora_B.weight",
        )
    return AdapterFiles(path.stem, "native", str(path), pairs, whole, scales)


def _sorted_out(
    headers: Mapping[str, TensorInfo], path: Path, scale: Callable[[str], float]
) -> tuple[tuple[Pair, ...], dict[str, TensorInfo]]:
    """The pairs of factors, and every other tensor."""
    factors: dict[str, dict[str, TensorInfo]] = {}
    whole: dict[str, TensorInfo] = {}
    for name, info in headers.items():
        match = _FACTOR.fullmatch(name)
        kind = next((what for part, what in _OTHERS.items() if part in name), None)
        if kind:
            raise WeightsError(f"{kind} is not supported", where=f"{path}: {info.name}", expected="lora_A and lora_B")
        if match:
            factors.setdefault(match[1], {})[match[2]] = info
        else:
            whole[name] = info
    if not headers:
        raise WeightsError("the adapter holds no tensors", where=str(path))
    return tuple(_pair(name, found, path, scale(name)) for name, found in factors.items()), whole


def _pair(name: str, found: Mapping[str, TensorInfo], path: Path, scale: float) -> Pair:
    if len(found) < 2:
        lost = "B" if "A" in found else "A"
        raise WeightsError(f"half of an adapter: {name}.lora_{lost}.weight is missing", where=str(path))
    a, b = found["A"], found["B"]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise WeightsError(
            f"the factors of {name!r} do not fit together",
            where=str(path),
            found=f"A {shape_text(a.shape)} and B {shape_text(b.shape)}",
            expected="A [rank, in] and B [out, rank]",
        )
    if a.shape[0] == 0:
        raise WeightsError(f"the adapter of {name!r} has rank 0", where=str(path), expected="at least 1")
    return Pair(name, a, b, scale)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
