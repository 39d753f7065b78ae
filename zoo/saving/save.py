"""A folder that holds a loaded model: weights, settings, card, tokenizer. It is there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

from zoo.asking import check_count, check_switches
from zoo.loading.files import WeightSet, given_path, locate, named_like_weights
from zoo.loading.hub.choice import TEXT_FILES
from zoo.loading.infer import CARD, CONFIG, PARAMS
from zoo.loading.layouts import layout_named
from zoo.loading.mapping import plan_mapping
from zoo.loading.reader import Progress
from zoo.registry.card import Card
from zoo.registry.errors import CapacityError, RequestError, WeightsError
from zoo.registry.plan import Plan
from zoo.saving.names import FileTensor, file_tensors
from zoo.saving.settings import Settings, settings_of
from zoo.saving.values import Weights
from zoo.saving.write import weight_bytes, write_weights
from zoo.units import human_bytes

FILE_BYTES = 50_000_000_000
"""The largest weight file that the hub takes."""


@dataclass(frozen=True)
class Source:
    """What is saved. files: where the weights came from; None for random ones. text: the folder of tokenizer files."""

    plan: Plan
    weights: Weights
    dtype: str
    files: WeightSet | None
    text: Path | None


@dataclass(frozen=True)
class Saved:
    """What was written. settings: the file from which other programs know the model; None where none can say it."""

    folder: Path
    layout: str
    files: tuple[str, ...]
    bytes: int
    settings: str | None
    note: str


def save(
    source: Source,
    folder: str | Path,
    *,
    layout: str = "auto",
    file_bytes: int = FILE_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Saved:
    """Writes the model into a folder, as `Model.save` says."""
    target = check_free(folder, overwrite)
    check_count("file_bytes", file_bytes)
    name, settings = _layout(source, layout)
    kept = source.files and source.files.layout == name and (settings is None or settings.own)
    present = source.files.headers if source.files and kept else ()
    preferred = settings.row.get("prefer", ()) if settings else ()
    tensors = file_tensors(source.plan.model, layout_named(name), present, preferred)
    try:
        with _finished(target) as made:
            _check_space(made, weight_bytes(source.weights, tensors))
            files = _fill(made, source, name, settings, tensors, file_bytes, progress)
    except OSError as error:
        raise WeightsError("the folder cannot be written", where=str(target), found=error.strerror) from None
    total = sum((target / file).stat().st_size for file in files)
    note = f"saved {human_bytes(total)} in layout {name} to {target}"
    if settings is None and not name.startswith("zoo"):
        note += f"; neither {CONFIG} nor {PARAMS} can say this model, so that only zoo reads the folder"
    return Saved(target, name, files, total, settings.file if settings else None, note)


def _layout(source: Source, wanted: str) -> tuple[str, Settings | None]:
    """The table of names to write by, and the settings file that goes with it."""
    own = source.files.layout if source.files else "huggingface"
    name = own if wanted == "auto" else layout_named(wanted).name
    text = source.text
    settings = settings_of(source.plan, name, source.dtype, text)
    if settings and name in ("huggingface", "mistral"):
        name = settings.row.get("layout", name)
    elif own.startswith(name):
        name = own
    return name, settings


def _fill(
    made: Path,
    source: Source,
    layout: str,
    settings: Settings | None,
    tensors: list[FileTensor],
    file_bytes: int,
    progress: Progress | None,
) -> tuple[str, ...]:
    """Writes everything into an empty folder and reads the headers back; returns the weight files' names."""
    if settings:
        text = json.dumps(settings.values, indent=2)
        (made / settings.file).write_text(text + "\n", encoding="utf-8")
    place = {"path": ".", "layout": layout, "dtype": source.dtype}
    card = Card.from_dict({**source.plan.card.to_dict(), "source": place})
    (made / CARD).write_text(card.to_yaml(), encoding="utf-8")
    for file in sorted(source.text.iterdir()) if source.text else ():
        if TEXT_FILES.fullmatch(file.name) and file.is_file():
            shutil.copyfile(file, made / file.name)
    stem = "consolidated" if layout.startswith("mistral") else "model"
    files = write_weights(made, stem, source.weights, tensors, file_bytes, progress)
    found = locate(made, layout)
    plan_mapping(source.plan.model, layout_named(layout), found.headers, str(made))
    return tuple(file.name for file in files)


def check_free(folder: str | Path, overwrite: bool) -> Path:
    """The folder as a path. Raises RequestError for one that holds a model already, for what is no folder, and where
    none can be made."""
    check_switches(overwrite=overwrite)
    target = given_path(folder)
    above = next(place for place in (target.absolute(), *target.absolute().parents) if place.exists())
    if not target.exists() and not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        found = "a file" if above.is_file() else "no right to write"
        raise RequestError("no folder can be made here", where=str(above), found=found)
    if target.exists() and not target.is_dir():
        raise RequestError("not a folder", where=str(target), found="a file", expected="a folder to save into")
    there = sorted(_replaced(target))
    if there and not overwrite:
        raise RequestError(
            "there is a model in this folder already",
            where=str(target),
            found=", ".join(file.name for file in there[:5]),
            hint="choose another folder, or say overwrite=True (`--overwrite`)",
        )
    return target


def _replaced(folder: Path) -> Iterator[Path]:
    """Files that would be taken for part of the new model."""
    for file in folder.iterdir() if folder.is_dir() else ():
        weights = named_like_weights(file.name) or file.name.endswith(".index.json")
        if weights or file.name in (CARD, CONFIG, PARAMS) or TEXT_FILES.fullmatch(file.name):
            yield file


def _check_space(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise CapacityError(
            "the disk is too full for the weights",
            where=str(folder.parent),
            found=f"{human_bytes(free)} free",
            expected=human_bytes(wanted),
        )


@contextmanager
def _finished(target: Path) -> Iterator[Path]:
    """A new folder beside the target, which takes its place at the end and is gone after an error.

    Into a folder that is there already, the files are moved one by one, weights last: what is cut off between is a
    folder without weights, or without some that its index names.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(mkdtemp(prefix=f".{target.name}-", suffix=".part", dir=target.parent))
    try:
        yield made
        if target.is_dir():
            for file in _replaced(target):
                file.unlink()
            for file in sorted(made.iterdir(), key=lambda file: (named_like_weights(file.name), file.name)):
                file.replace(target / file.name)
        else:
            made.chmod(0o755)
            made.rename(target)
    finally:
        shutil.rmtree(made, ignore_errors=True)
