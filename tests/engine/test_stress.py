"""Two hundred requests that come, go and change their minds, in a cache that is too small for them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import pytest
import torch

from zoo.assemble import assemble
from zoo.components.adapter import LowRank
from zoo.components.cache import slab
from zoo.components.decoder.model import Decoder
from zoo.components.linear import Linear
from zoo.engine.engine import Engine
from zoo.engine.request import Completion, Request, SamplingParams
from zoo.loading.adapters.read import Adapter
from zoo.registry.card import Card
from zoo.registry.plan import Plan
from zoo.registry.resolve import resolve

COUNT, CONTEXT, VOCABULARY, WINDOW = 200, 80, 83, 21
ATTENTION: dict[str, Any] = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
TURNED = ATTENTION | {"rope": {"theta": 50.0}}
GATED: dict[str, Any] = {"kind": "gated", "hidden_dim": 20}
MAMBA1: dict[str, Any] = {"kind": "mamba1", "inner_dim": 32, "state_size": 6, "dt_rank": 3, "conv_size": 4}
LAYERS: dict[str, list[dict[str, Any]]] = {
    "windowed and full": [{"mixer": TURNED | {"window": WINDOW}, "ffn": GATED}, {"mixer": TURNED, "ffn": GATED}],
    "recurrent and full": [{"mixer": MAMBA1, "ffn": GATED}, {"mixer": ATTENTION | {"rope": None}, "ffn": GATED}],
}


def built(name: str) -> tuple[Decoder, Plan]:
    layers, _, coded = name.partition(" in ")
    model = {"dim": 16, "vocab_size": VOCABULARY, "norm": {"kind": "rms", "eps": 1e-5}, "layers": LAYERS[layers]}
    model["cache_dtype"] = coded or None
    plan = resolve(Card.from_dict({"name": "stress", "context_length": CONTEXT, "model": model}))
    module = assemble(plan, torch.float32).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return module, plan


def adapter(module: Decoder, seed: int) -> Adapter:
    """A change of every product within the layers."""
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for path, linear in module.named_modules():
        if isinstance(linear, Linear) and path.startswith("layers."):
            rows, columns = linear.weight.shape
            a_LI, b_OL = (torch.randn(shape, generator=generator) * 0.4 for shape in ((2, columns), (rows, 2)))
            changes[path] = LowRank(a_LI, b_OL)
    return Adapter(changes, [], "")


def make_engine(name: str, contexts: int | None = None, **sizes: Any) -> Engine:
    """contexts: how many whole contexts fit in the cache."""
    module, plan = built(name)
    budget = None if contexts is None else contexts * Engine(module, plan, **sizes)._memory.cost(CONTEXT)
    engine = Engine(module, plan, memory_bytes=budget, **sizes)
    with engine.between_steps() as (adapters, _):
        for number in range(2):
            adapters.add(f"adapter {number}", adapter(module, number))
    return engine


@dataclass
class Guest:
    """A request, the step at which it comes, and the number of its tokens after which it is cancelled, if ever."""

    request: Request
    arrival: int
    patience: int | None


def guests(seed: int) -> list[Guest]:
    """In bursts: sometimes more come at once than run together, sometimes nobody for a while."""
    chance = random.Random(seed)
    found, arrival = [], 0
    for number in range(COUNT):
        arrival += chance.choice((0, 0, 0, 0, 1, 2, 9))
        length = chance.choice((chance.randint(1, 16), chance.randint(17, 50)))
        params = SamplingParams(
            max_tokens=chance.randint(1, 30),
            temperature=chance.choice((0.0, 1.0)),
            top_k=chance.choice((0, 5)),
            seed=number,
            stop_ids=(chance.randrange(VOCABULARY),),
            prompt_logprobs=chance.random() < 0.1,
            adapter=chance.choice((None, None, "adapter 0", "adapter 1")),
        )
        request = Request(chance.choices(range(VOCABULARY), k=length), params, request_id=str(number))
        found.append(Guest(request, arrival, chance.randint(0, 9) if chance.random() < 0.2 else None))
    return found


@cache
def alone(name: str, seed: int) -> list[Completion]:
    """What every request gives when nobody else is there."""
    engine = make_engine(name)
    return [engine.generate([guest.request])[0] for guest in guests(seed)]


def crowd(engine: Engine, coming: list[Guest]) -> dict[str, Completion]:
    """All of them in one engine, those that lose patience cancelled."""
    ended: dict[str, Completion] = {}
    made = {guest.request.request_id: 0 for guest in coming}
    waiting, step = coming[::-1], 0
    while waiting or engine.busy:
        while waiting and waiting[-1].arrival <= step:
            engine.submit(waiting.pop().request)
        for chunk in engine.step():
            assert chunk.error is None
            made[chunk.request_id] += len(chunk.tokens)
            if chunk.completion is not None:
                ended[chunk.request_id] = chunk.completion
        for guest in coming:
            name = str(guest.request.request_id)
            if guest.arrival <= step and guest.patience is not None and made[name] >= guest.patience:
                engine.cancel(name)
        assert engine._memory.used == engine._memory.holds(engine._memory.numbers) <= engine._memory.budget
        step += 1
    ended |= {chunk.request_id: chunk.completion for chunk in engine.step() if chunk.completion is not None}
    return ended


@pytest.mark.parametrize("name", [*LAYERS, "windowed and full in int8"])
@pytest.mark.parametrize(
    ("storage", "capture", "draft"), [("slab", "off", None), ("pages", "off", "lookup"), ("pages", "on", None)]
)
def test_everyone_gets_what_they_get_alone(
    name: str,
    storage: Literal["slab", "pages"],
    capture: str,
    draft: Literal["lookup"] | None,
    monkeypatch: pytest.MonkeyPatch,
    always_guess: None,
) -> None:
    monkeypatch.setenv("ZOO_CAPTURE", capture)
    # Slabs grow as often as with a context sixteen times as long.
    monkeypatch.setattr(slab, "STEP", 16)
    engine = make_engine(name, contexts=3, storage=storage, chunk_tokens=24, max_batch_size=9, draft=draft)
    ended, reasons = crowd(engine, guests(1)), []
    assert len(ended) == COUNT
    for number, expected in enumerate(alone(name, 1)):
        found = ended[str(number)]
        reasons.append(found.finish_reason)
        if found.finish_reason == "cancelled":
            assert found.tokens == expected.tokens[: len(found.tokens)], number
        else:
            assert (found.tokens, found.finish_reason) == (expected.tokens, expected.finish_reason), number
            scores = [(done.prompt_logprobs or [None])[1:] for done in (found, expected)]
            assert scores[0] == pytest.approx(scores[1], rel=1e-4, abs=1e-5)
    # A pool of states has room for as many sequences as whole contexts fit, so that there nobody is thrown out.
    assert (engine._scheduler.preemptions > 10) == (storage == "slab" or name.startswith("windowed"))
    assert min(reasons.count("stop"), reasons.count("cancelled")) >= 10
    assert engine.memory["cache_used"] == 0
    assert (sum(done.usage.accepted_tokens for done in ended.values()) > 20) == (draft is not None)
