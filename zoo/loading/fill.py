"""A plan and a place of weights -> the module with its weights, and what was chosen on the way."""

from __future__ import annotations

from pathlib import Path

import torch

from zoo.assemble import assemble
from zoo.components.decoder.model import Decoder
from zoo.components.kinds import KINDS
from zoo.device import Placement
from zoo.devices.shares import Part
from zoo.inspection import Inspection
from zoo.loading.adapters.plan import plan_adapter
from zoo.loading.adapters.read import Adapter, read_adapter
from zoo.loading.files import WeightSet, locate
from zoo.loading.layouts import layout_named
from zoo.loading.load import load_weights, random_weights
from zoo.loading.mapping import plan_mapping
from zoo.loading.quantising import described, storing_of
from zoo.loading.reader import Progress
from zoo.loading.targets import Storing
from zoo.registry.plan import Plan
from zoo.units import human_bytes


def storing(plan: Plan, device: torch.device, quantize: str | None) -> Storing:
    """How matrices are stored. Raises RequestError where they cannot be stored so."""
    return storing_of(plan, None if quantize is None else KINDS[quantize], device)


def filled(
    plan: Plan,
    placement: Placement,
    source: str | Path,
    *,
    quantize: str | None = None,
    progress: Progress | None = None,
    part: Part | None = None,
) -> tuple[Decoder, WeightSet | None, list[str]]:
    """The assembled module with its weights, their files, and what was chosen, in sentences.

    source: a folder or file, or "random". part: what this process holds of the model, where it is not all.
    """
    local, pieces = (plan, None) if part is None else (part.local, part.pieces)
    stored = storing(local, placement.device, quantize)
    module = assemble(local, placement.dtype)
    if source == "random":
        random_weights(module, plan, device=placement.device, storing=stored, pieces=pieces)
        return module, None, ["random weights: the answers mean nothing", *_quantised(module)]
    files, device = locate(source, plan.card.source.layout), placement.device
    load_weights(module, plan, files, device=device, storing=stored, progress=progress, pieces=pieces)
    return module, files, [files.note, *(_quantised(module) or _decoding(files, local, placement))]


def check_files(plan: Plan, source: str | Path) -> None:
    """Raises WeightsError unless files hold exactly the plan's tensors, by what stands before their data."""
    if source != "random":
        files = locate(source, plan.card.source.layout)
        plan_mapping(plan.model, layout_named(files.layout), files.headers, files.where)


def adapter_of(ref: str | Path, *, plan: Plan, module: Decoder, part: Part | None) -> Adapter:
    """An adapter as the module adds it. part: what this process holds of the model, where it is not all.

    Raises WeightsError for files that are no adapter of the model.
    """
    if part is None:
        return read_adapter(plan_adapter(ref, plan, module), module)
    whole = assemble(plan, torch.bfloat16)
    return read_adapter(plan_adapter(ref, plan, whole).of(part.pieces), module)


def _decoding(files: WeightSet, plan: Plan, placement: Placement) -> list[str]:
    """What quantised weights have become, in a sentence."""
    if not files.schemes:
        return []
    taken = human_bytes(Inspection(plan.card, plan, placement.dtype_name, None, {}).weight_bytes)
    return [f"quantised weights ({', '.join(files.schemes)}) take {taken} in {placement.dtype_name}"]


def _quantised(module: Decoder) -> list[str]:
    """What was quantised and its error, in a sentence."""
    found = described(module)
    return [found] if found else []
