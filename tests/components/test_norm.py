"""The RMS norm against its formula and against transformers'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from zoo.components.norm.rms import rms_reference
from zoo.components.norm.spec import LayerNormSpec, RMSPlusOneSpec, RMSSpec

SPEC = RMSSpec(dim=48, eps=1e-3)


@pytest.mark.parametrize("shape", [(1, 48), (5, 48), (5, 3, 48)])
def test_equals_the_formula(shape: tuple[int, ...], filled: Callable[..., Any], close: Callable[..., None]) -> None:
    norm, x = filled(SPEC), torch.randn(shape) * 3
    expected = x / (x.square().mean(-1, keepdim=True) + SPEC.eps).sqrt() * norm.weight
    close(norm(x), expected)
    close(rms_reference(x, norm.weight, SPEC.eps), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_as_models_were_trained(dtype: torch.dtype, filled: Callable[..., Any]) -> None:
    """Bit for bit: normalised in float32, rounded, multiplied, rounded; also for values whose squares overflow."""
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm

    norm, x = filled(SPEC, dtype), (torch.randn(64, 48) * 300).to(dtype)
    theirs = MistralRMSNorm(48, SPEC.eps)
    theirs.weight = norm.weight
    with torch.inference_mode():
        assert torch.equal(norm(x), rms_reference(x, norm.weight, SPEC.eps))
        assert torch.equal(norm(x), theirs(x))
    assert torch.equal(norm(x), theirs(x))


def test_leaves_its_input_alone(filled: Callable[..., Any]) -> None:
    norm, x = filled(SPEC), torch.randn(4, 48)
    before = x.clone()
    with torch.inference_mode():
        norm(x)
    assert torch.equal(x, before)


def test_weights_stored_less_one(filled: Callable[..., Any], close: Callable[..., None]) -> None:
    """In float32 to the end: one rounding, where the plain norm has two."""
    x_TD = torch.randn(5, 48, generator=torch.Generator().manual_seed(1)).bfloat16()
    norm = filled(RMSPlusOneSpec(dim=48, eps=1e-3), torch.bfloat16)
    expected = rms_reference(x_TD.float(), 1 + norm.weight.float(), 1e-3)
    assert torch.equal(norm(x_TD), expected.bfloat16())
    close(norm(x_TD.float()), expected)


@pytest.mark.parametrize("shape", [(1, 48), (5, 3, 48)])
def test_layer_norm_equals_the_formula(
    shape: tuple[int, ...], filled: Callable[..., Any], close: Callable[..., None]
) -> None:
    norm, x = filled(LayerNormSpec(dim=48, eps=1e-3)), torch.randn(shape) * 3 + 1
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight + norm.bias
    close(norm(x), expected)
