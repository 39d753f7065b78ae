"""A card from a checkpoint's own settings, params.json or config.json. Imports no torch.

Which key means what, for which model_type, is data: families.yaml.
"""

from __future__ import annotations

import re
from pathlib import Path

from zoo.json_file import read_object
from zoo.loading.files import WeightSet, existing, holds_weights, locate
from zoo.loading.infer.architecture import Architecture
from zoo.loading.infer.encoders import encoders, opened
from zoo.loading.infer.families import Node, families, keys_of
from zoo.loading.infer.hybrid import Hybrid
from zoo.loading.infer.latent import Latent
from zoo.loading.infer.quantised import check_quantised
from zoo.loading.infer.recurrent import Recurrent
from zoo.loading.infer.settings import Settings
from zoo.loading.layouts import layout_named
from zoo.registry.errors import CardError, nearest

PARAMS, CONFIG, CARD = "params.json", "config.json", "card.yaml"
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}


def infer_card(ref: str | Path) -> Node:
    """The card of a checkpoint's folder, or of the folder of a weight file, as plain values for `Card.from_dict`.

    Raises CardError for settings that are missing, broken, of an unknown architecture, or hold a key that zoo neither
    reads nor knows to change nothing; WeightsError for weights that are not whole.
    """
    path = existing(ref)
    folder = path if path.is_dir() else path.parent
    settings, row = _settings(folder)
    files = locate(path) if not path.is_dir() or holds_weights(path) else None
    model, context = _reader(settings, row).model() | encoders(settings, row), _context(settings, row, folder)
    model["tied_embeddings"] = model["tied_embeddings"] and not _has_head(files)
    dtype = _dtype(settings, row, files)
    settings.check_all_read([*families()["inert"], *row.get("inert", ())])
    name = Path(settings.where).name
    assumed = "" if context else f"; context_length is not stated there and {families()['assumed_context']} is assumed"
    return {
        "name": _name(folder),
        "family": row["family"],
        "summary": f"Inferred from {name}{assumed}.",
        "context_length": context or families()["assumed_context"],
        "source": {"layout": "auto", "dtype": dtype},
        "text": _text(folder, [name for name in ("vision", "audio") if name in model]),
        "model": model,
    }


def _reader(settings: Settings, row: Node) -> Architecture | Recurrent:
    """What reads an architecture's settings: by its row, and by the sizes that the file has."""
    if "recurrent" in row:
        return Recurrent(settings, row)
    if settings.one_of(keys_of(row, "kv_lora_rank")) is not None:
        return Latent(settings, row)
    return Hybrid(settings, row) if "layer_kinds" in row else Architecture(settings, row)


def _settings(folder: Path) -> tuple[Settings, Node]:
    """The folder's settings, Mistral's own before Hugging Face's, and the row of families.yaml that reads them."""
    file = next((folder / name for name in (PARAMS, CONFIG) if (folder / name).is_file()), None)
    if file is None:
        raise _no_settings(folder)
    values, rows = read_object(file, CardError), families()[file.name]
    architecture = values.pop("model_type", None)
    if architecture is None and file.name == CONFIG:
        raise CardError("the key 'model_type' is missing", where=str(file), expected=f"one of {', '.join(rows)}")
    if file.name == PARAMS and "hidden_size" in values:
        # The first Mixtral release spells its params.json like a config.json, without an architecture.
        rows, architecture = families()[CONFIG], "mixtral"
    architecture = architecture or next(iter(rows))
    if architecture not in rows:
        raise CardError(
            f"architecture {architecture!r} is not supported yet",
            where=str(file),
            expected=f"model_type {', '.join(rows)}",
            hint=nearest(str(architecture), rows),
        )
    values, row = opened(values, rows[architecture], rows, str(file))
    parts = row.get("encoders", {}).values()
    settings = Settings(
        values, str(file), row["defaults"] | {k: v for part in parts for k, v in part["defaults"].items()}
    )
    settings.check_later(families()["later"], [*(part["when"] for part in parts), *row.get("left_out", ())])
    settings.check_only(row["only"])
    check_quantised(settings)
    return settings, row


def _no_settings(folder: Path) -> CardError:
    names = sorted(child.name for child in folder.iterdir())
    deeper = sorted(file.parent for form in ("*", "snapshots/*") for file in folder.glob(f"{form}/{CONFIG}"))
    deeper += sorted(file.parent for form in ("*", "snapshots/*") for file in folder.glob(f"{form}/{PARAMS}"))
    hint = "or name a card, and give this folder as its weights"
    if any(name.endswith(".gguf") for name in names):
        hint = "GGUF files are not read yet: take the model's safetensors"
    return CardError(
        "no settings to infer a card from",
        where=str(folder),
        found=", ".join(names[:5]) or "an empty folder",
        expected=f"{PARAMS} or {CONFIG}",
        hint=f"do you mean {deeper[0]}?" if deeper else hint,
    )


def _name(folder: Path) -> str:
    """The folder's name as a card's; of a snapshot in the hub's cache, the repository's."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots":
        folder = Path(folder.parent.parent.name.rpartition("--")[2])
    return re.sub(r"[^a-z0-9._-]+", "-", folder.name.lower()).strip("-._") or "model"


def _has_head(files: WeightSet | None) -> bool:
    """Whether the files hold a head of their own: then a stated tie is an artefact, or makes no difference."""
    if files is None:
        return False
    layout = layout_named(files.layout)
    return any((row := layout.find(name)) is not None and "head.weight" in row[0].targets for name in files.headers)


def _dtype(settings: Settings, row: Node, files: WeightSet | None) -> str:
    stated = settings.one_of(keys_of(row, "dtype"))
    if stated is not None:
        name = str(stated).removeprefix("torch.")
        if name not in DTYPES.values():
            raise settings.wrong(keys_of(row, "dtype")[0], stated, "float32, bfloat16 or float16")
        return name
    sizes: dict[str, int] = {}
    for info in files.headers.values() if files else ():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return DTYPES.get(max(sizes, key=sizes.__getitem__, default="BF16"), "bfloat16")


def _context(settings: Settings, row: Node, folder: Path) -> int | None:
    """The longest sequence: the least that the settings say, else what config.json says beside them."""
    stated = [settings.count(key) for key in keys_of(row, "context_length") if settings.get(key) is not None]
    if stated:
        return min(stated)
    if row["rope"] == "params" and settings.has("yarn"):
        return int(settings.number("yarn.factor") * settings.count("yarn.original_max_position_embeddings"))
    beside = folder / CONFIG
    if Path(settings.where).name == PARAMS and beside.is_file():
        other = Settings(read_object(beside, CardError), str(beside), {})
        if other.get("max_position_embeddings") is not None:
            return other.count("max_position_embeddings")
    return None


def _text(folder: Path, media: list[str]) -> Node:
    """Tokenizer and chat format by the files that are there; chat where a template, or no word against it, is there.

    media: the features of encoders, for models that chat.
    """
    names = {child.name for child in folder.iterdir()}
    own = any(name == "tekken.json" or name.startswith("tokenizer.model.v") for name in names)
    if not own and not (PARAMS in names and "tokenizer.model" in names):
        if "tokenizer.json" not in names:
            return {"features": []}
        chat = _has_template(folder, names)
        return {
            "tokenizer": {"kind": "huggingface"},
            "chat": "template" if chat else "none",
            "features": ["chat", *media] if chat else [],
        }
    chat = "tokenizer_config.json" not in names or _has_template(folder, names)
    return {
        "tokenizer": {"kind": "mistral"},
        "chat": "mistral" if chat else "none",
        "features": ["chat", *media] if chat else [],
    }


def _has_template(folder: Path, names: set[str]) -> bool:
    if names & {"chat_template.jinja", "chat_template.json"}:
        return True
    return bool(read_object(folder / "tokenizer_config.json", CardError, missing_ok=True).get("chat_template"))
