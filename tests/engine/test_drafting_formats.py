"""Guesses change no answer however weights and caches are stored, whichever adapter answers, whoever else runs."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import zoo
from zoo.components import native
from zoo.components.adapter import LowRank
from zoo.components.linear import Linear
from zoo.engine.drafting import Asked
from zoo.engine.engine import Engine
from zoo.engine.lookup import Lookup
from zoo.engine.request import Completion, Request, SamplingParams
from zoo.loading.adapters.read import Adapter

pytestmark = pytest.mark.usefixtures("always_guess")

VOCABULARY, CONTEXT = 96, 160
ATTENTION: dict[str, Any] = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 32}
ATTENTION["rope"] = {"theta": 50.0}
LATENT: dict[str, Any] = {"kind": "latent_attention", "num_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 64}
LATENT |= {"nope_head_dim": 32, "rope_head_dim": 32, "v_head_dim": 32, "rope": {"theta": 50.0}}
MAMBA2 = {"kind": "mamba2", "num_heads": 8, "head_dim": 32, "num_groups": 2, "state_size": 32}
MAMBA2 |= {"conv_size": 4, "norm_eps": 1e-5}
GATED = {"kind": "gated", "hidden_dim": 128}
MOE = {"kind": "moe", "num_experts": 4, "experts_per_token": 2, "expert": GATED}
LAYERS: dict[str, list[dict[str, Any]]] = {
    "full": [{"mixer": ATTENTION, "ffn": GATED}] * 2,
    "windows and states": [
        {"mixer": ATTENTION | {"window": 21}, "ffn": MOE},
        {"mixer": MAMBA2, "ffn": None},
        {"mixer": ATTENTION, "ffn": GATED},
    ],
    "latent": [{"mixer": LATENT, "ffn": GATED}],
}


def card(kind: str) -> dict[str, Any]:
    model = {"dim": 64, "vocab_size": VOCABULARY, "norm": {"kind": "rms", "eps": 1e-5}, "layers": LAYERS[kind]}
    source = {"layout": "auto", "dtype": "bfloat16"}
    return {"name": "formats", "context_length": CONTEXT, "source": source, "model": model}


class Known(Lookup):
    """Guesses from known answers, of which some tokens are wrong."""

    def __init__(self, answers: dict[tuple[int, ...], list[int]]) -> None:
        super().__init__()
        self.answers, self.chance = answers, random.Random(3)

    def drafts(self, asked: Asked) -> list[list[int]]:
        found = []
        for seq, count in asked:
            rest = self.answers[tuple(seq.tokens[: seq.prompt_length])][seq.generated :]
            some = rest[: self.chance.randint(0, count)]
            found.append([t if self.chance.random() > 0.2 else self.chance.randrange(VOCABULARY) for t in some])
        return found


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.8, "top_p": 0.9, "min_p": 0.01, "seed": 4},
    {"temperature": 1.3, "top_k": 30, "seed": 5, "drafts": 0},
]


def prompts() -> list[list[int]]:
    chance = random.Random(1)
    return [chance.choices(range(VOCABULARY), k=length) for length in (40, 3, 57, 25)]


def requests(drafts: bool, adapter: str | None) -> list[Request]:
    """Four of which the last wants no guesses; without `drafts` none does."""
    common: dict[str, Any] = {"max_tokens": 32, "ignore_eos": True, "logprobs": 3, "adapter": adapter}
    settings = [{"drafts": None if drafts else 0} | options | common for options in OPTIONS]
    return [Request(p, SamplingParams(**some)) for p, some in zip(prompts(), settings, strict=True)]


def compare(engine: Engine, adapter: str | None = None) -> None:
    """Answers alone and without guesses are those with them: alone, and all together in steps that read prompts too."""
    expected = [engine.generate([request])[0] for request in requests(False, adapter)]
    assert not any(one.usage.drafted_tokens for one in expected)
    assert len({token for one in expected for token in one.tokens}) > 20, "the model must not be trivial"
    assert engine._scheduler.drafting is not None
    engine._scheduler.drafting.source = Known({tuple(c.prompt_ids): c.tokens for c in expected})
    alone = [engine.generate([request])[0] for request in requests(True, adapter)]
    for found in (alone, engine.generate(requests(True, adapter))):
        for one, other in zip(found, expected, strict=True):
            same(one, other, exact=adapter is None and native.missing() is None)
        assert sum(one.usage.accepted_tokens for one in found) > 25
        assert not found[3].usage.drafted_tokens


def same(one: Completion, other: Completion, exact: bool) -> None:
    """exact: to the last bit, as where nothing but the native kernels multiplies."""
    assert one.tokens == other.tokens
    assert one.logprobs is not None
    if exact:
        assert one.logprobs == other.logprobs
        assert one.top_logprobs == other.top_logprobs
    else:
        assert one.logprobs == pytest.approx(other.logprobs, abs=0.05)


def load(kind: str, **options: Any) -> zoo.Model:
    sizes: dict[str, Any] = {"prefix_cache": False, "max_batch_size": 3}
    return zoo.load(card(kind), weights="random", device="cpu", dtype="bfloat16", draft="lookup", **sizes, **options)


FORMATS: list[dict[str, Any]] = [
    {},
    {"quantize": "int8"},
    {"quantize": "int4"},
    {"cache_dtype": "int8"},
    {"cache_dtype": "fp8"},
    {"quantize": "int4", "cache_dtype": "int8"},
]
CASES = [("windows and states", options) for options in FORMATS]
CASES += [(kind, FORMATS[number]) for kind in ("full", "latent") for number in (2, 3)]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_however_numbers_are_stored(kind: str, options: dict[str, Any]) -> None:
    with load(kind, **options) as model:
        compare(model.engine)


@pytest.mark.parametrize("kind", ["full", "latent"])
def test_with_an_adapter(kind: str) -> None:
    with load(kind) as model:
        generator, changes = torch.Generator().manual_seed(2), {}
        for path, linear in model.module.named_modules():
            if isinstance(linear, Linear) and path.startswith("layers."):
                shapes = ((2, linear.weight.shape[1]), (linear.weight.shape[0], 2))
                changes[path] = LowRank(*(torch.randn(shape, generator=generator).bfloat16() * 0.2 for shape in shapes))
        with model.engine.between_steps() as (adapters, _):
            adapters.add("other", Adapter(changes, [], ""))
        compare(model.engine, "other")
