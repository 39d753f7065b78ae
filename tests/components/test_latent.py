"""Latent attention: both of its ways, single rows of a batch, and what its cache holds."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from zoo.components.attention.latent import Heads
from zoo.components.cache.spec import LatentCacheSpec
from zoo.components.cache.store import make_store
from zoo.components.decoder.spec import DecoderSpec
from zoo.components.step import Cached
from zoo.registry.errors import CardError
from zoo.testing import check_component, relative_error, step_through

YARN = {"kind": "yarn", "theta": 100.0, "factor": 4.0, "original_context": 16, "attention_factor": 1.0}
MIXER: dict[str, Any] = {
    "kind": "latent_attention",
    "num_heads": 3,
    "q_lora_rank": 10,
    "kv_lora_rank": 14,
    "nope_head_dim": 6,
    "rope_head_dim": 4,
    "v_head_dim": 5,
    "rope": YARN,
}
SCALING = {"beta": 0.5, "original_context": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "queries have a latent": {},
    "queries have none": {"q_lora_rank": None},
    "values are larger than keys": {"v_head_dim": 13},
    "scores and queries are scaled": {"mscale": 0.7, "query_scaling": SCALING},
}


def of(**changes: Any) -> dict[str, Any]:
    return {"layers": [{"repeat": 2, "mixer": MIXER | changes, "ffn": {"kind": "gated", "hidden_dim": 24}}]}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_conforms(changes: dict[str, Any]) -> None:
    rank = 10 if changes.get("q_lora_rank", 1) is None else 8
    variants = {"q_lora_rank": rank, "mscale": 1.0, "query_scaling": SCALING | {"beta": 0.7}}
    check_component("mixer", MIXER | changes, variants=variants)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_equals_the_formula(
    changes: dict[str, Any],
    small: Callable[..., DecoderSpec],
    filled: Callable[..., Any],
    taken_apart: Callable[..., Any],
    oracle: ModuleType,
) -> None:
    spec = small(**of(**changes))
    module, tokens = filled(spec), [1, 5, 32, 7, 16, 11, 3, 8, 30]
    expected = oracle.logits(spec, taken_apart(spec, module), tokens)
    for chunk in (9, 4, 1):
        assert relative_error(step_through(module, [tokens], chunk)[0].double(), expected) < 2e-5


@pytest.mark.parametrize("kernel", ["reference", "sdpa"])
@pytest.mark.parametrize(("rows", "past"), [(1, 0), (1, 9), (7, 0), (5, 8), (20, 3)])
def test_both_ways_agree(
    rows: int,
    past: int,
    kernel: str,
    small: Callable[..., DecoderSpec],
    filled: Callable[..., Any],
    close: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ZOO_ATTENTION", kernel)
    heads: Heads = filled(small(**of())).layers[0].mixer.kv_b
    generator = torch.Generator().manual_seed(rows)
    q_THd = torch.randn(rows, 3, 10, generator=generator)
    cached = Cached(torch.randn(1, past + rows, 18, generator=generator), rows)
    expected = heads.expanded(q_THd, cached.kept_BSm[0], None, {})
    close(heads.absorbed(q_THd, cached.kept_BSm[0], None, {}), expected)
    if rows == 1:
        kept = torch.cat((cached.kept_BSm, torch.full((1, 3, 18), 7.0)), 1).repeat(2, 1, 1)
        seen = (torch.arange(kept.shape[1]) <= past).repeat(2, 1)
        close(heads(q_THd.repeat(2, 1, 1), Cached(kept, 1, seen), None, {}), expected.repeat(2, 1, 1))


def test_the_cheaper_way_is_taken(small: Callable[..., DecoderSpec], filled: Callable[..., Any]) -> None:
    heads: Heads = filled(small(**of())).layers[0].mixer.kv_b
    assert heads.expands(64, 64), "a prefill needs keys and values of its own rows alone"
    assert not heads.expands(1, 64), "a single row would have to expand everything before it"


@pytest.mark.parametrize("storage", ["slab", "pages"])
def test_a_token_costs_one_row(storage: str) -> None:
    spec = LatentCacheSpec(kv_lora_rank=14, rope_head_dim=4)
    assert spec.elements(10) == 10 * 18
    store = make_store(spec, 3, torch.float32, "cpu", storage)
    assert store.cost(256) == 256 * 3 * 18 * 4
    store.grow(1, 256)
    assert store.nbytes == store.cost(256)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope": {"theta": 100.0}, "mscale": 1.0}, "mscale needs a rope of kind 'yarn'; found mscale 1 without one"),
        ({"rope": {"theta": 100.0, "rotary_dim": 2}}, "remove rotary_dim from the rope"),
        ({"rope_head_dim": 3}, "must be even; found 3"),
        ({"cache": {"kind": "full"}}, "this kind needs 'num_kv_heads' from the nodes around it"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str, small: Callable[..., DecoderSpec]) -> None:
    with pytest.raises(CardError, match=message):
        small(**of(**changes))
