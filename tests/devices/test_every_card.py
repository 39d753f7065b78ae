"""Every card over several devices: laid out, or refused for a reason that the documentation lists."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.shrinking import CARDS, layers_of, shrunk
from zoo.assemble import assemble
from zoo.components.decoder.spec import DecoderSpec
from zoo.devices.cut import Load, Loads
from zoo.devices.mesh import Mesh, lay_out, wish
from zoo.devices.shares import Part
from zoo.loading.load import random_weights
from zoo.registry.card import Card, load_card
from zoo.registry.errors import RequestError
from zoo.registry.plan import Plan
from zoo.registry.resolve import resolve
from zoo.registry.spec import Spec, StateSpec
from zoo.testing import TOLERANCE, prefill, relative_error, share_out, step_through

PAGE = Path(__file__).parents[2] / "docs" / "devices.md"
TOKENS = [5, 66, 0, 31, 32, 33, 34, 16, 17, 50, 1, 99, 3, 2, 8, 9, 44]

MECHANISMS = [
    "falcon-mamba-7b",
    "gemma-2-27b",
    "gemma-3-12b",
    "glm-4-32b-0414",
    "gpt-oss-120b",
    "granite-4.0-h-1b",
    "granite-4.0-h-small",
    "llama-3.1-405b",
    "mistral-large-4",
    "nemotron-3-nano-30b-a3b",
    "nemotron-h-47b",
    "olmo-2-13b",
    "pixtral-12b-2409",
    "voxtral-mini-3b-2507",
    "zamba2-1.2b",
    "zamba2-2.7b",
]
"""Cards that together have every component of the catalogue."""


def listed() -> list[list[str]]:
    """Rows of the table of refusals: card, layout, reason."""
    rows = PAGE.read_text(encoding="utf-8").partition("## Which cards")[2].partition("\n## ")[0].splitlines()
    return [[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in rows if row.startswith("| `")]


def layouts_of(model: Spec) -> list[str]:
    mixture = any("num_experts" in type(spec).model_fields for _, spec in model.walk())
    return ["pp=2", "pp=4", "tp=2", *(["tp=2,ep=2"] if mixture else [])]


@cache
def refusals(card: str) -> list[list[str]]:
    """Layouts that are refused, and why. card: its model, in JSON."""
    model, found = resolve(Card.from_dict({"name": "a-card", **json.loads(card)})).model, []
    for layout in layouts_of(model):
        try:
            mesh = lay_out(model, wish(layout))
        except RequestError as error:
            found.append([layout, f"{str(error.where).rpartition('.')[2]}: {error.found}"])
        else:
            assert mesh.size == (4 if layout == "pp=4" else 2)
    return found


def sizes_of(name: str) -> str:
    card = load_card(name).to_dict()
    return json.dumps({key: card[key] for key in ("context_length", "model")})


@pytest.mark.parametrize("names", [CARDS[i : i + 20] for i in range(0, len(CARDS), 20)], ids=lambda names: names[0])
def test_every_card_is_laid_out_or_refused_for_a_listed_reason(names: list[str]) -> None:
    found = [[name, *row] for name in names for row in refusals(sizes_of(name))]
    assert found == [row for row in listed() if row[0] in names]


def test_refusals_are_those_of_known_cards() -> None:
    assert {name for name, *_ in listed()} <= {*CARDS}


@cache
def small(name: str) -> Plan:
    card = shrunk(name) | {"name": "shrunk"}
    for layer in layers_of(card):
        if (ffn := layer.get("ffn")) and "num_experts" in ffn:
            ffn["num_experts"] = min(32, ffn["num_experts"])
    return resolve(Card.from_dict(card))


def features(plan: Plan) -> set[str]:
    """What a model is made of: its components, their flags and what stands in their slots."""
    found = {state.kind for state in decoder(plan).states() if state}
    for _, spec in plan.model.walk():
        values = {name: getattr(spec, name) for name in type(spec).model_fields}
        found |= {f"{spec.kind}.{name}" for name, value in values.items() if value is True}
        found |= {f"{spec.kind}.{name}.{value.kind}" for name, value in values.items() if isinstance(value, Spec)}
        found |= {f"{spec.kind}.{n}" for n in ("window", "softcap", "logits_softcap") if values.get(n) is not None}
    return found


def decoder(plan: Plan) -> DecoderSpec:
    assert isinstance(plan.model, DecoderSpec)
    return plan.model


def test_these_cards_have_every_component() -> None:
    known = {feature for name in MECHANISMS for feature in features(small(name))}
    missing = {feature: name for name in CARDS for feature in features(small(name)) - known}
    assert not missing


@pytest.mark.parametrize("name", MECHANISMS)
def test_two_ranks_give_the_logits_of_one(name: str) -> None:
    plan = small(name)
    module = assemble(plan, torch.float32)
    random_weights(module, plan)
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    expected = prefill(module, TOKENS)

    def both(rank: Any) -> torch.Tensor:
        [stepped] = step_through(rank, [TOKENS[:6]], 3)
        return torch.cat((prefill(rank, TOKENS), stepped))

    for mesh in (Mesh(1, 2), Mesh(2)):
        whole, stepped = share_out(plan, module, mesh, both).split([len(TOKENS), 6])
        assert relative_error(whole, expected) < TOLERANCE
        assert relative_error(stepped, expected[:6]) < TOLERANCE


def cache_bytes(states: Sequence[StateSpec | None]) -> int:
    """Of a sequence of 100 tokens in float32."""
    return sum(state.nbytes(100, 4) for state in states if state)


@pytest.mark.parametrize("name", ["mistral-large-4", "zamba2-2.7b"])
def test_every_layer_may_be_a_stage(name: str) -> None:
    """What later layers read of earlier ones passes through the stages between."""
    plan = small(name)
    module = assemble(plan, torch.float32)
    random_weights(module, plan)
    count = len(decoder(plan).layers)
    mesh = Mesh(1, count, borders=tuple(range(count + 1)))
    [found] = share_out(plan, module, mesh, lambda rank: step_through(rank, [TOKENS], 7)[0]).unsqueeze(0)
    assert relative_error(found, prefill(module, TOKENS)) < TOLERANCE
    kept = [cache_bytes(Part.of(plan, mesh, rank).states) for rank in range(count)]
    whole = cache_bytes(decoder(plan).states())
    assert sum(kept) >= whole
    assert (sum(kept) > whole) == (name == "mistral-large-4")


@pytest.mark.parametrize("name", ["mistral-large-4", "zamba2-1.2b", "gemma-3-12b"])
def test_loads_are_what_stages_hold(name: str) -> None:
    plan, load = small(name), Load("float32", None, 100)
    count, loads = len(decoder(plan).layers), Loads(decoder(plan), load)
    for start, stop in pairwise(sorted({0, 1, count // 2, count - 1, count})):
        mesh = Mesh(1, 3, borders=tuple(sorted({0, start, stop, count})))
        rank = mesh.borders.index(start)
        part = Part.of(plan, mesh, rank)
        params = {n: p for n, p in part.local.model.all_parameters().items() if n != "lerope.alpha"}
        assert loads.of(start, stop) == load.weights(params) + cache_bytes(part.states)
