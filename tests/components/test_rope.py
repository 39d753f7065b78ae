"""Rope against complex rotation and against transformers' own frequencies."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from zoo.components.build import build
from zoo.components.rope import frequencies
from zoo.components.rope.rotary import rope_angles
from zoo.components.rope.spec import DefaultRopeSpec, LinearRopeSpec, Llama3RopeSpec, RopeSpec, YarnRopeSpec
from zoo.components.step import Step

LLAMA3: dict[str, Any] = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SPECS: dict[str, RopeSpec] = {
    "default": DefaultRopeSpec(head_dim=64, theta=1e4),
    "linear": LinearRopeSpec(head_dim=64, theta=5e5, factor=4.0),
    "llama3": Llama3RopeSpec(head_dim=64, theta=5e5, original_context=512, **LLAMA3),
    "yarn": YarnRopeSpec(head_dim=64, theta=1e4, factor=4.0, original_context=512),
    "yarn, given factor": YarnRopeSpec(
        head_dim=64, theta=1e6, factor=16.0, original_context=512, attention_factor=1.0, beta_fast=16.0, beta_slow=2.0
    ),
    "yarn, exact borders": YarnRopeSpec(head_dim=64, theta=1e6, factor=16.0, original_context=512, truncate=False),
    "yarn, not stretched": YarnRopeSpec(head_dim=64, theta=1e4, factor=1.0, original_context=512),
    "yarn, one lane pair": YarnRopeSpec(head_dim=2, theta=1e4, factor=4.0, original_context=512, beta_fast=80.0),
}


@pytest.fixture(params=SPECS)
def rope(request: pytest.FixtureRequest) -> RopeSpec:
    return SPECS[request.param]


def _config(rope: RopeSpec) -> LlamaConfig:
    """transformers' name for the same settings."""
    fields = rope.model_dump(exclude={"kind", "head_dim", "rotary_dim", "theta", "original_context"})
    parameters: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta} | fields
    if "original_context" in type(rope).model_fields:
        parameters["original_max_position_embeddings"] = rope.original_context  # type: ignore[attr-defined]
    return LlamaConfig(
        hidden_size=2 * rope.head_dim,
        num_attention_heads=2,
        head_dim=rope.head_dim,
        max_position_embeddings=4096,
        rope_parameters=parameters,
    )


def test_frequencies_equal_the_oracle(rope: RopeSpec, oracle: ModuleType, close: Callable[..., None]) -> None:
    found, factor = getattr(frequencies, rope.kind)(rope)
    expected, expected_factor = oracle.rope_frequencies(rope)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=2e-6, atol=0)
    assert factor == pytest.approx(expected_factor)


def test_frequencies_equal_transformers(rope: RopeSpec) -> None:
    if rope.kind == "default":
        embedding = LlamaRotaryEmbedding(_config(rope))
        expected, expected_factor = embedding.inv_freq, embedding.attention_scaling
    else:
        expected, expected_factor = ROPE_INIT_FUNCTIONS[rope.kind](_config(rope), device=torch.device("cpu"))
    found, factor = getattr(frequencies, rope.kind)(rope)
    assert torch.equal(found, expected)
    assert factor == expected_factor


def test_rotation_equals_transformers(rope: RopeSpec, close: Callable[..., None]) -> None:
    positions = torch.tensor([0, 1, 2, 511, 3000])
    x = torch.randn(5, 3, rope.head_dim)
    cos, sin = LlamaRotaryEmbedding(_config(rope))(x, positions[None])
    expected, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    found = build(rope, device="cpu")(x, Step(positions, [5], [0], []))
    close(found, expected[0].transpose(0, 1))


def test_partial_rotation_leaves_the_other_lanes(oracle: ModuleType, close: Callable[..., None]) -> None:
    some = DefaultRopeSpec(head_dim=10, theta=100.0, rotary_dim=4)
    x = torch.randn(6, 2, 10)
    found = build(some, device="cpu")(x, Step(torch.arange(6), [6], [0], []))
    assert torch.equal(found[..., 4:], x[..., 4:])
    close(found, oracle.rope(some, x.double()).float())


def test_angles_stay_exact_at_long_positions() -> None:
    """In float32 the angle itself is off by at most half a unit in the last place of the position."""
    rope, position = SPECS["default"], 131_071
    cos, sin = rope_angles(rope, torch.tensor([position]))
    exact = position * torch.tensor([rope.theta ** (-2 * i / 64) for i in range(32)], dtype=torch.float64)
    assert (cos[0, 0, :32] - exact.cos()).abs().max() < 0.02
    assert (sin[0, 0, 32:] - exact.sin()).abs().max() < 0.02


def test_bfloat16_is_turned_in_float32() -> None:
    rope = build(SPECS["default"], device="cpu")
    x = torch.randn(4, 2, 64).bfloat16()
    step = Step(torch.arange(4), [4], [0], [])
    assert torch.equal(rope(x, step), rope(x.float(), step).bfloat16())


def test_angles_are_made_once_per_step_and_setting() -> None:
    one, same, other = (DefaultRopeSpec(head_dim=8, theta=theta) for theta in (1e4, 1e4, 1e6))
    step = Step(torch.arange(3), [3], [0], [])
    for rope in (one, same, other, one):
        build(rope, device="cpu")(torch.randn(3, 2, 8), step)
    assert len(step.memo) == 2
