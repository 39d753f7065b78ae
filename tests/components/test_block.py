"""Blocks that norm or scale what they add, each by its formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from zoo.components.cache.store import fresh_step
from zoo.testing import check_component

KINDS: dict[str, dict[str, Any]] = {"postnorm": {}, "sandwich": {}, "scaled": {"residual_scale": 0.3}}
BOTH: tuple[str, ...] = ("mixer", "ffn")
BEFORE = {"postnorm": (), "scaled": BOTH, "sandwich": BOTH}
AFTER = {"postnorm": BOTH, "scaled": (), "sandwich": BOTH}
X_TD = torch.randn(7, 16, generator=torch.Generator().manual_seed(3))


def by_formula(block: Any, mix: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    before = {"mixer": same, "ffn": same, **{n: getattr(block, f"{n}_norm") for n in BEFORE[block.spec.kind]}}
    after = {"mixer": same, "ffn": same, **{n: getattr(block, f"{n}_post_norm") for n in AFTER[block.spec.kind]}}
    scale = KINDS[block.spec.kind].get("residual_scale", 1.0)
    x = X_TD + scale * after["mixer"](mix(before["mixer"](X_TD)))
    expected: torch.Tensor = x + scale * after["ffn"](block.ffn(before["ffn"](x)))
    return expected


def same(x: torch.Tensor) -> torch.Tensor:
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_block_is_its_formula(
    kind: str, small: Callable[..., Any], filled: Callable[..., Any], close: Callable[..., None]
) -> None:
    layer = small().model_dump()
    attention = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "rope": {"theta": 1e4}}
    node = {"kind": kind, **KINDS[kind], "mixer": attention, "ffn": {"kind": "gated", "hidden_dim": 24}}
    spec = small(layers=[node])
    assert layer["dim"] == X_TD.shape[1]
    block, step = filled(spec).layers[0], fresh_step(spec, [len(X_TD)])
    expected = by_formula(block, lambda x: block.mixer(x, step, step.states[0]))
    close(block(X_TD, step, step.states[0]), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_block_keeps_every_promise(kind: str) -> None:
    check_component("block", {"kind": kind, **KINDS[kind]})
