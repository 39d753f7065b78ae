"""The public functions, and the only place where loading is put together."""

import builtins
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zoo.asking import asked, batch_of, check_switches, check_variables, context_of
from zoo.components.kinds import kind_named
from zoo.costs.memory import CACHE_SHARE
from zoo.devices import reported
from zoo.garbage import without_collections
from zoo.inspection import BYTES, Inspection
from zoo.locating import Located, Ref, locate
from zoo.registry.card import Card, list_cards
from zoo.registry.environment import deadline
from zoo.registry.errors import CardError, RequestError, TextError, nearest
from zoo.registry.manager import manager
from zoo.registry.resolve import Plan, resolve

if TYPE_CHECKING:
    from zoo.components.decoder.model import Decoder
    from zoo.device import Placement
    from zoo.devices.mesh import Wanted
    from zoo.devices.run import Run, Spread
    from zoo.loading.files import WeightSet
    from zoo.loading.reader import Progress
    from zoo.model import Model
    from zoo.prompts import Prompts
    from zoo.text.tokenizer import Tokenizer


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
        usual=dtype == "auto",
    )


@reported
def load(
    ref: Ref,
    *,
    device: str = "auto",
    dtype: str = "auto",
    cache_dtype: str = "auto",
    weights: str | Path = "auto",
    quantize: str | None = None,
    adapters: Iterable[str | Path] = (),
    devices: "Wanted" = None,
    max_batch_size: int | None = None,
    max_context: int | None = None,
    prefix_cache: bool = True,
    overrides: Mapping[str, Any] | None = None,
    draft: Ref | None = None,
    progress: "Progress | None" = None,
    first: "Callable[[Prompts], object] | None" = None,
) -> "Model":
    """Build a model, fill its weights and return it ready to generate.

    ref: a card's name, a path (card file, or a folder with params.json or config.json), a Card or a dict.
    quantize: "int8" or "int4" stores large matrices so while they are read; `model.notes` tell the error.
    cache_dtype: "int8" or "fp8" quantises cached keys and values, "none" does not, "auto" does as the card says; the
        model's notes tell the error.
    weights: "auto" (the ref's own folder, else fetched from the card's hub repository), "random" (real shapes,
        seeded values, no files) or a folder or file.
    max_batch_size: sequences that run together (default 64). max_context: tokens of prompt and answer together, for
        which there must be memory (default: the card's context length, or as much of it as fits).
    overrides: dotted card fields and their values.
    prefix_cache: whether a prompt that begins as an earlier one did goes on from what is cached of that.
    devices: how many to spread the model over, a list of them, or a layout such as "tp=2,pp=2"; see docs/devices.md.
    adapters: LoRA adapters, PEFT folders or Mistral's lora.safetensors. Requests use the one that is given, or choose
        among several by their option `adapter`.
    draft: speculative decoding, which changes no answer: "lookup" drafts tokens from the text so far; another model,
        smaller and of the same vocabulary, is named as `ref` is, and loaded on the same device (of several, the first)
        in the same dtype and quantised alike.
    progress: called with (bytes done, bytes in all) while weights are read.
    first: called with the model's `Prompts` before its weights are read, so that a faulty request is refused early.

    Raises CardError, FetchError, WeightsError or CapacityError, each before memory is taken for the weights
    where it can be known by then; RankError when the process of another device ends.
    """
    quantize, batch = _kind_name(quantize), batch_of(max_batch_size)
    check_switches(prefix_cache=prefix_cache)
    deadline()  # told now, and not where a model has several devices only
    # Asks torch for huge pages, which it decides on at its first allocation: weights are read faster by half.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    found = locate(ref, _with_cache(cache_dtype, overrides))
    plan = resolve(found.card)
    from zoo.loading.ahead import ReadAhead, weights_at_hand

    place = weights_at_hand(found, weights) if _alone(devices) else None
    with ReadAhead(place, found.card.source.layout) as ahead:
        with without_collections():
            from zoo.devices import running
            from zoo.drafts import draft_named
            from zoo.fitting import fitting
            from zoo.loading.fill import filled

        spread, placement, context = _laid(plan, device, dtype, devices, quantize, max_context)
        follows = spread is not None and spread.rank > 0
        other = None if follows else draft_named(draft, plan)
        memory = fitting(plan, spread, placement, context, quantize, other, asked=max_context is not None)
        paths = _checked_adapters(adapters, plan, placement)
        notes = [placement.note]
        source = _source(found, weights, progress, notes.append)
        folder = found.folder if source == "random" else _beside(Path(source))
        with without_collections():
            check_variables(placement.device)
            tokenizer = _tokenizer(plan, folder)
        if first is not None and not follows:
            asked(first, plan, tokenizer, source)
        guessing = _guessing(draft, other, plan, tokenizer, placement, weights, quantize, notes)
        with running(spread, plan, placement, source, quantize, context) as run:
            told, part = ahead.passed(progress), None if run is None else run.part
            module, files, more = filled(plan, placement, source, quantize=quantize, progress=told, part=part)
            notes += [*more, memory.note]
            model = _model(
                plan, module, placement, folder, tokenizer, files, notes, batch, context, guessing, prefix_cache, run
            )
    names = [model.load_adapter(path) for path in paths]
    with model.engine.between_steps() as (loaded, _):
        loaded.defaults = names
    return model


@reported
def layout(
    ref: Ref,
    *,
    devices: "Wanted",
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    max_context: int | None = None,
    cache_dtype: str = "auto",
    overrides: Mapping[str, Any] | None = None,
    **others: Any,
) -> str | None:
    """How `load` with these arguments spreads the model over devices, in words; None for one device, and for all
    processes but the first.

    Raises RequestError where it cannot be spread so.
    """
    if _alone(devices):
        return None
    plan, quantize = resolve(locate(ref, _with_cache(cache_dtype, overrides)).card), _kind_name(quantize)
    spread, placement, context = _laid(plan, device, dtype, devices, quantize, max_context)
    return None if spread is None or spread.rank else spread.describe(plan, placement, quantize, context)


@reported
def check_fits(
    ref: Ref,
    *,
    devices: "Wanted" = None,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    max_context: int | None = None,
    cache_dtype: str = "auto",
    overrides: Mapping[str, Any] | None = None,
    draft: Ref | None = None,
    **others: Any,
) -> None:
    """Raises what `load` with these arguments would for a model that does not fit, and reads nothing for it."""
    from zoo.drafts import draft_named
    from zoo.fitting import fitting

    plan, quantize = resolve(locate(ref, _with_cache(cache_dtype, overrides)).card), _kind_name(quantize)
    spread, placement, context = _laid(plan, device, dtype, devices, quantize, max_context)
    guesser, asked_for = draft_named(draft, plan), max_context is not None
    fitting(plan, spread, placement, context, quantize, guesser, asked=asked_for)


def _alone(devices: "Wanted") -> bool:
    """Whether there is one device, and no other process that torchrun has started."""
    return devices in (None, 1) and devices is not True and "WORLD_SIZE" not in os.environ


def _spread(plan: Plan, devices: "Wanted") -> "Spread | None":
    """The layout over several devices; None for one."""
    if _alone(devices):
        return None
    from zoo.devices.run import spread

    return spread(plan, devices)


def _laid(
    plan: Plan, device: str, dtype: str, devices: "Wanted", quantize: str | None, max_context: int | None
) -> "tuple[Spread | None, Placement, int]":
    """The layout over several devices, where this process computes, and tokens of a sequence."""
    from zoo.device import choose
    from zoo.devices.mesh import wish

    spread = _spread(plan, devices)
    # The only one of the devices may have a name.
    name = wish(devices).device(device) if spread is None else spread.device(device)
    placement, context = choose(name, dtype, plan.card.source.dtype), context_of(plan.card, max_context)
    return None if spread is None else spread.laid(plan, placement, quantize, context), placement, context


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
    try:
        return open_tokenizer(plan.tokenizer, plan.chat, _beside(folder), vocab_size=plan.model.vocab_size)
    except TextError as error:
        return error


def _owners(card: Card, plan: Plan | None) -> dict[str, str]:
    """Who brought the card and each component in use."""
    resource = manager().catalog.cards.get(card.name)
    card_owner = resource.owner if resource and str(resource.file) == card.file else card.file
    entries = plan.entries if plan else ()
    return {"card": card_owner, **{f"{entry.slot} {entry.kind}": entry.owner for entry in entries}}


def _kind_name(quantize: str | None) -> str | None:
    """The name of a kind of quantised weights. Raises RequestError for one that is not known."""
    return None if quantize in (None, "none") else kind_named(quantize).name


def _checked_adapters(
    adapters: Iterable[str | Path], plan: Plan, placement: "Placement"
) -> "builtins.list[str | Path]":
    """Refuse adapters that do not fit the model before its weights are read."""
    if not isinstance(adapters, Iterable):
        raise RequestError("not adapters", where="adapters", found=repr(adapters), expected="a list of paths")
    paths: builtins.list[str | Path] = [adapters] if isinstance(adapters, str | Path) else [*adapters]
    if paths:
        from zoo.assemble import assemble
        from zoo.loading.adapters.plan import plan_adapter

        module = assemble(plan, placement.dtype)
        for path in paths:
            plan_adapter(path, plan, module)
    return paths


def _beside(source: Path) -> Path:
    """The folder of a file or a folder."""
    return source if source.is_dir() else source.parent


def _source(
    found: Located, weights: str | Path, progress: "Progress | None", note: Callable[[str], None]
) -> str | Path:
    """Where the weights are: a folder or file, fetched if need be, or "random"."""
    if weights == "random":
        return "random"
    if weights != "auto":
        from zoo.loading.files import existing

        return existing(weights)
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
    tokenizer: "Tokenizer | TextError",
    files: "WeightSet | None",
    notes: "builtins.list[str]",
    batch: int,
    context: int,
    guessing: "Literal['lookup'] | Model | None",
    prefix_cache: bool,
    run: "Run | None",
) -> "Model":
    from zoo.engine.engine import Engine
    from zoo.engine.fidelity import coding_notes
    from zoo.model import Model

    if run is not None:
        run.loaded(module)
    notes = [*notes, *(coding_notes(module, placement.dtype, placement.device) if run is None else [str(run)])]
    notes = [*notes, *(["no tokenizer: token ids only"] if isinstance(tokenizer, TextError) else tokenizer.notes)]
    sizes: dict[str, Any] = {"max_batch_size": batch, "max_context": context}
    own: dict[str, Any] = {"draft": (guessing.module, guessing.plan) if isinstance(guessing, Model) else guessing}
    own |= {"prefix_cache": prefix_cache}
    others = None
    if run is None:
        sizes["memory_bytes"] = _cache_budget(placement)
    else:
        others, sizes = run.begin(sizes)
    fronted = plan if run is None else run.part.fronted
    device, dtype = placement.device, placement.dtype
    engine = Engine(module, fronted, device=device, dtype=dtype, others=others, **own, **sizes)
    return Model(plan, module, engine, tokenizer, placement, folder, notes, files, run)


def _cache_budget(placement: "Placement") -> int:
    """Bytes that the cache may take of what is free now. The engine takes no more than its batch can use."""
    from zoo.device import memory_free

    return int(CACHE_SHARE * memory_free(placement.device))


def _guessing(
    draft: Ref | None,
    other: Literal["lookup"] | Plan | None,
    plan: Plan,
    tokenizer: "Tokenizer | TextError",
    placement: "Placement",
    weights: str | Path,
    quantize: str | None,
    notes: "builtins.list[str]",
) -> "Literal['lookup'] | Model | None":
    """What guesses: of a model, itself, loaded and closed for requests of its own; the notes get what is to be said."""
    if draft is None or not isinstance(other, Plan):
        return "lookup" if other == "lookup" else None
    from zoo.drafts import check_tokenizers

    where: dict[str, Any] = {"device": str(placement.device), "dtype": placement.dtype_name, "quantize": quantize}
    where |= {"weights": "random" if weights == "random" else "auto", "devices": 1}
    model = load(draft, max_batch_size=1, max_context=1, **where)
    known = None if isinstance(tokenizer, TextError) else tokenizer
    notes += [f"{model.card.name} guesses", check_tokenizers(plan, known, model.plan, model.tokenizer)]
    model.engine.close()
    return model
