"""The public functions, and the only place where loading is put together."""

import builtins
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zoo.components.kinds import KINDS, kind_named
from zoo.costs.memory import PROCESS_BYTES, MemoryPlan
from zoo.costs.work import Work
from zoo.inspection import BYTES, Inspection
from zoo.locating import Located, Ref, locate
from zoo.machine import resident_memory
from zoo.registry.card import Card, list_cards
from zoo.registry.errors import CardError, RequestError, TextError, nearest
from zoo.registry.manager import manager
from zoo.registry.resolve import Plan, resolve

if TYPE_CHECKING:
    from zoo.components.decoder.model import Decoder
    from zoo.device import Placement
    from zoo.loading.files import WeightSet
    from zoo.loading.reader import Progress
    from zoo.loading.targets import Storing
    from zoo.model import Model
    from zoo.text.tokenizer import Tokenizer

DEFAULT_BATCH = 64

SHORT = 512
"""Tokens of a sequence that must fit for a model to be loaded; longer ones are refused when they are asked for."""


def list() -> "builtins.list[Card]":
    """Every known card, built-in and from plugins, by name."""
    return list_cards()


def inspect(
    ref: Ref,
    *,
    dtype: str = "auto",
    cache_dtype: str = "auto",
    quantize: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Inspection:
    """What the model costs and who provides it. Nothing is downloaded and torch is not imported.

    dtype: the format for the byte figures; "auto" is the card's own. cache_dtype, quantize: as of `load`. Raises
    CardError for a card that does not resolve.
    """
    if dtype not in ("auto", *BYTES):
        raise RequestError(
            "unknown dtype", where="dtype", found=repr(dtype), expected=f"auto or one of {', '.join(BYTES)}"
        )
    found = locate(ref, _with_cache(cache_dtype, overrides))
    plan = None if found.card.unsupported else resolve(found.card)
    return Inspection(
        card=found.card,
        resolved=plan,
        dtype=found.card.source.dtype if dtype == "auto" else dtype,
        folder=found.folder,
        owners=_owners(found.card, plan),
        quantize=_kind_name(quantize),
    )


def load(
    ref: Ref,
    *,
    device: str = "auto",
    dtype: str = "auto",
    cache_dtype: str = "auto",
    weights: str | Path = "auto",
    quantize: str | None = None,
    adapters: Iterable[str | Path] = (),
    devices: int | Sequence[str] | None = None,
    max_batch_size: int | None = None,
    max_context: int | None = None,
    prefix_cache: bool = True,
    overrides: Mapping[str, Any] | None = None,
    draft: Ref | None = None,
    progress: "Progress | None" = None,
) -> "Model":
    """Build a model, fill its weights and return it ready to generate.

    ref: a card's name, a path (card file, or a folder with params.json or config.json), a Card or a dict.
    quantize: "int8" or "int4": large matrices are stored so as they are read; `model.notes` tell the error.
    cache_dtype: "int8" or "fp8" caches keys and values in codes of eight bits; "none" as they are computed; "auto" as
        the card says. The model's notes say what that changes.
    weights: "auto" (the ref's own folder, else fetched from the card's hub repository), "random" (real shapes,
        seeded values, no files) or a folder or file.
    max_batch_size: sequences that may run together (default 64). max_context: tokens of prompt and answer together
        (default: the card's context length). overrides: dotted card fields and their values.
    prefix_cache: whether a prompt that begins as an earlier one goes on from what is cached of that.
    adapters: LoRA adapters, PEFT folders or Mistral's lora.safetensors; requests use the one that is given, or choose
        among several by their `adapter`. progress: called with (bytes done, bytes in all) while weights are read.
    draft: what guesses tokens ahead, which are checked several at once and change no answer: "lookup", earlier tokens
        of prompt and answer; or a smaller model of the same vocabulary, as `ref`, on the same device, in the same dtype
        and quantised alike.

    Raises CardError, FetchError, WeightsError or CapacityError, each before memory is taken for the weights
    where it can be known by then.
    """
    _refuse_later_work(devices)
    quantize = _kind_name(quantize)
    # Asks torch for huge pages, which it decides on at its first allocation: weights are read faster by half.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    found = locate(ref, _with_cache(cache_dtype, overrides))
    plan = resolve(found.card)
    from zoo.device import choose

    placement = choose(device, dtype, found.card.source.dtype)
    context = _context(found.card, max_context)
    guessing = _guessing(draft, plan, placement, weights, quantize)
    storing = _storing(plan, placement, quantize)
    memory = _memory_plan(plan, placement, context, quantize)
    paths = _checked_adapters(adapters, plan, placement)
    module, folder, files, notes = _filled(plan, found, placement, weights, storing, progress)
    batch = DEFAULT_BATCH if max_batch_size is None else max_batch_size
    notes.append(memory.note)
    model = _model(plan, module, placement, folder, files, notes, batch, context, guessing, prefix_cache)
    names = [model.load_adapter(path) for path in paths]
    with model.engine.between_steps() as (loaded, _):
        loaded.defaults = names
    return model


def tokenizer_of(inspection: Inspection) -> "Tokenizer":
    """The inspected model's tokenizer, from its folder, else from the hub: only tokenizer files are fetched."""
    plan, folder = inspection.plan, inspection.folder
    if folder is None and inspection.card.source.hub:
        from zoo.loading.hub import fetch

        folder = fetch(inspection.card.source, weights=False)
    tokenizer = _tokenizer(plan, folder)
    if isinstance(tokenizer, TextError):
        raise tokenizer
    return tokenizer


def _with_cache(cache_dtype: str, overrides: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The overrides with the cache's codes among them."""
    known = {"none": None, "int8": "int8", "fp8": "fp8"}
    if cache_dtype == "auto":
        return overrides
    if cache_dtype not in known:
        raise RequestError(
            "unknown cache_dtype",
            where="cache_dtype",
            found=repr(cache_dtype),
            expected=f"auto or one of {', '.join(known)}",
            hint=nearest(str(cache_dtype), known),
        )
    return {**(overrides or {}), "model.cache_dtype": known[cache_dtype]}


def _tokenizer(plan: Plan, folder: Path | None) -> "Tokenizer | TextError":
    """The tokenizer beside the weights, or why there is none: only text needs one."""
    from zoo.components.decoder.spec import DecoderSpec
    from zoo.text.tokenizer import open_tokenizer

    if plan.tokenizer is None or folder is None:
        return TextError(
            "there is no tokenizer, so only token ids can be used",
            where=str(folder or plan.card.name),
            found="no text.tokenizer in the card" if plan.tokenizer is None else "no folder",
            expected="tekken.json, tokenizer.model.v* or tokenizer.json beside the weights",
            hint="pass lists of token ids, or add the model's tokenizer file to the folder",
        )
    assert isinstance(plan.model, DecoderSpec)
    beside = folder if folder.is_dir() else folder.parent
    try:
        return open_tokenizer(plan.tokenizer, plan.chat, beside, vocab_size=plan.model.vocab_size)
    except TextError as error:
        return error


def _owners(card: Card, plan: Plan | None) -> dict[str, str]:
    """Who brought the card and each component in use."""
    resource = manager().catalog.cards.get(card.name)
    card_owner = resource.owner if resource and str(resource.file) == card.file else card.file
    entries = plan.entries if plan else ()
    return {"card": card_owner, **{f"{entry.slot} {entry.kind}": entry.owner for entry in entries}}


def _context(card: Card, max_context: int | None) -> int:
    if max_context is None:
        return card.context_length
    if not isinstance(max_context, int) or not 1 <= max_context <= card.context_length:
        raise RequestError(
            "max_context is out of range",
            where=card.name,
            found=repr(max_context),
            expected=f"1 to {card.context_length}, the card's context_length",
            hint="override the card's context_length if the model really reads more",
        )
    return max_context


def _kind_name(quantize: str | None) -> str | None:
    """The name of a kind of quantised weights. Raises RequestError for one that is not known."""
    return None if quantize in (None, "none") else kind_named(quantize).name


def _storing(plan: Plan, placement: "Placement", quantize: str | None) -> "Storing":
    """How matrices are stored."""
    from zoo.loading.quantising import storing_of

    return storing_of(plan, KINDS[quantize] if quantize else None, placement.device)


def _memory_plan(plan: Plan, placement: "Placement", context: int, quantize: str | None) -> MemoryPlan:
    """What one sequence of `context` tokens needs beside what the device has free.

    Raises CapacityError, before anything is read, for weights and a short sequence that do not fit.
    """
    from zoo.device import memory_free

    here, work = placement.device, Work(plan, placement.dtype_name, quantize)
    running = max(0, PROCESS_BYTES - resident_memory()) if here.type == "cpu" else 0
    found = MemoryPlan(work, context, memory_free(here), 1, here.type, running)
    if not replace(found, context=min(context, SHORT)).fits:
        raise found.refusal(str(here), min(context, SHORT))
    return found


def _checked_adapters(
    adapters: Iterable[str | Path], plan: Plan, placement: "Placement"
) -> "builtins.list[str | Path]":
    """Refuse adapters that do not fit the model before its weights are read."""
    paths: builtins.list[str | Path] = [adapters] if isinstance(adapters, str | Path) else [*adapters]
    if paths:
        from zoo.assemble import assemble
        from zoo.loading.adapters.plan import plan_adapter

        module = assemble(plan, placement.dtype)
        for path in paths:
            plan_adapter(path, plan, module)
    return paths


def _filled(
    plan: Plan,
    found: Located,
    placement: "Placement",
    weights: str | Path,
    storing: "Storing",
    progress: "Progress | None",
) -> "tuple[Decoder, Path | None, WeightSet | None, builtins.list[str]]":
    """The assembled module with its weights, their folder and files, and what was chosen on the way."""
    from zoo.assemble import assemble
    from zoo.loading.load import load_weights, random_weights

    notes = [placement.note]
    if weights == "random":
        module = assemble(plan, placement.dtype)
        random_weights(module, plan, device=placement.device, storing=storing)
        notes += ["random weights: the answers mean nothing", *_quantised(module)]
        return module, found.folder, None, notes
    from zoo.loading.files import locate as locate_files

    folder = _weights_folder(found, weights, progress, notes.append)
    files = locate_files(folder, plan.card.source.layout)
    module = assemble(plan, placement.dtype)
    load_weights(module, plan, files, device=placement.device, storing=storing, progress=progress)
    notes += [files.note, *(_quantised(module) or _decoding(files, plan, placement))]
    return module, folder if folder.is_dir() else folder.parent, files, notes


def _decoding(files: "WeightSet", plan: Plan, placement: "Placement") -> "builtins.list[str]":
    """What quantised weights have become, in a sentence."""
    if not files.schemes:
        return []
    from zoo.loading.hub.types import human_bytes

    taken = human_bytes(Inspection(plan.card, plan, placement.dtype_name, None, {}).weight_bytes)
    return [f"quantised weights ({', '.join(files.schemes)}) take {taken} in {placement.dtype_name}"]


def _quantised(module: "Decoder") -> "builtins.list[str]":
    """What was quantised and its error, in a sentence."""
    from zoo.loading.quantising import described

    found = described(module)
    return [found] if found else []


def _weights_folder(
    found: Located, weights: str | Path, progress: "Progress | None", note: Callable[[str], None]
) -> Path:
    if weights != "auto":
        return Path(weights).expanduser()
    if found.folder is not None:
        return found.folder
    source = found.card.source
    if source.hub is None:
        raise CardError(
            "the card names no place to fetch weights from",
            where=found.card.name,
            expected="source.hub in the card, or weights on this machine",
            hint="pass weights=FOLDER (`--weights FOLDER`), or weights='random' to try the shape",
        )
    from zoo.loading.hub import fetch

    return fetch(source, progress=progress, note=note)


def _model(
    plan: Plan,
    module: "Decoder",
    placement: "Placement",
    folder: Path | None,
    files: "WeightSet | None",
    notes: "builtins.list[str]",
    batch: int,
    context: int,
    guessing: "Literal['lookup'] | Model | None",
    prefix_cache: bool,
) -> "Model":
    from zoo.engine.engine import Engine
    from zoo.engine.fidelity import coding_notes
    from zoo.model import Model

    tokenizer = _tokenizer(plan, folder)
    notes = [*notes, *coding_notes(module, placement.dtype, placement.device)]
    notes = [*notes, *(["no tokenizer: token ids only"] if isinstance(tokenizer, TextError) else tokenizer.notes)]
    if isinstance(guessing, Model):
        from zoo.drafts import check_tokenizers

        known = None if isinstance(tokenizer, TextError) else tokenizer
        notes += [f"{guessing.card.name} guesses", check_tokenizers(plan, known, guessing.plan, guessing.tokenizer)]
    engine = Engine(
        module,
        plan,
        device=placement.device,
        dtype=placement.dtype,
        memory_bytes=_cache_budget(placement),
        max_batch_size=batch,
        max_context=context,
        draft=(guessing.module, guessing.plan) if isinstance(guessing, Model) else guessing,
        prefix_cache=prefix_cache,
    )
    return Model(plan, module, engine, tokenizer, placement, folder, notes, files)


def _cache_budget(placement: "Placement") -> int:
    """Bytes that the cache may take: 80 % of what is free now. The engine takes no more than its batch can use."""
    from zoo.device import memory_free

    return int(0.8 * memory_free(placement.device))


def _guessing(
    draft: Ref | None, plan: Plan, placement: "Placement", weights: str | Path, quantize: str | None
) -> "Literal['lookup'] | Model | None":
    """What guesses tokens for the model: a name, or another model, loaded, with its own requests closed."""
    if draft is None or draft == "none":
        return None
    if draft == "lookup":
        return "lookup"
    from zoo.drafts import check_sizes

    check_sizes(plan, resolve(locate(draft).card))
    where: dict[str, Any] = {"device": str(placement.device), "dtype": placement.dtype_name, "quantize": quantize}
    model = load(draft, weights="random" if weights == "random" else "auto", max_batch_size=1, max_context=1, **where)
    model.engine.close()
    return model


def _refuse_later_work(devices: object) -> None:
    if devices not in (None, 1):
        raise RequestError(
            "devices is not supported by this version of zoo",
            where="zoo.load(devices=...)",
            found=repr(devices),
            expected="no value",
            hint="leave it out; the changelog says when it comes",
        )
