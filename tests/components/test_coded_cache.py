"""Caches of codes: what a row loses, what layers see of it, and what it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from zoo.components.cache.code import RowCode
from zoo.components.cache.store import make_store
from zoo.components.decoder.spec import DecoderSpec
from zoo.engine.fidelity import cache_error, coding_notes
from zoo.registry.errors import CardError
from zoo.testing import prefill, relative_error, step_through

KINDS: Any = ("int8", "fp8")
ERRORS = {"int8": 0.008, "fp8": 0.03}
"""Relative error of normal numbers, 64 of which share a scale."""

TURNED = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "rope": {"theta": 50.0}}
LATENT: dict[str, Any] = {
    "kind": "latent_attention",
    "num_heads": 3,
    "q_lora_rank": None,
    "kv_lora_rank": 14,
    "nope_head_dim": 6,
    "rope_head_dim": 4,
    "v_head_dim": 5,
    "rope": {"theta": 50.0},
    "indexer": {"kind": "lightning", "num_heads": 4, "head_dim": 6, "top_k": 9, "norm_eps": 1e-6},
}
MAMBA = {"kind": "mamba1", "inner_dim": 32, "state_size": 6, "dt_rank": 3, "conv_size": 4}
MODELS: dict[str, list[dict[str, Any]]] = {
    "full": [{"mixer": TURNED, "ffn": None}],
    "windowed": [{"mixer": TURNED | {"window": 5}, "ffn": None}, {"mixer": TURNED, "ffn": None}],
    "capped": [{"mixer": TURNED | {"softcap": 2.0, "window": 7}, "ffn": None}],
    "latent": [{"mixer": LATENT, "ffn": None}],
    "hybrid": [{"mixer": MAMBA, "ffn": None}, {"mixer": TURNED | {"sinks": True}, "ffn": None}],
}
Small = Callable[..., DecoderSpec]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_read_back_within_half_a_step(kind: Any, dtype: torch.dtype) -> None:
    code = RowCode(kind, (64,), dtype)
    x = (torch.randn(50, 2, 64, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    rows = code.encode(x)
    assert (rows.shape, rows.dtype) == ((50, 2, 66), torch.int8)
    y = code.decode(rows)
    assert y.dtype is dtype
    error, peaks = (y.float() - x.float()).abs(), x.float().abs().amax(-1, keepdim=True)
    steps = peaks / 127 if kind == "int8" else torch.maximum(x.float().abs() / 8, peaks / 448 / 512)
    assert (error <= 0.51 * steps + 2**-8 * x.float().abs()).all()
    assert error.norm() / x.float().norm() < ERRORS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_every_group_of_lanes_has_its_own_scale(kind: Any) -> None:
    code = RowCode(kind, (5, 4), torch.float32)
    x = torch.randn(3, 9, generator=torch.Generator().manual_seed(2)) * torch.tensor([1000.0] * 5 + [0.001] * 4)
    assert code.encode(x).shape == (3, 4 + 9 + 1)
    y = code.rounded(x)
    for lanes in (slice(5), slice(5, 9)):
        assert (y[:, lanes] - x[:, lanes]).norm() / x[:, lanes].norm() < ERRORS[kind]
    assert torch.equal(code.rounded(x[1:2]), y[1:2])


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_and_what_is_not_finite_is_not_hidden(kind: Any) -> None:
    code = RowCode(kind, (6,), torch.float32)
    x = torch.ones(4, 6)
    x[0], x[1, 2], x[2, 3] = 0.0, float("inf"), float("nan")
    y = code.rounded(x)
    assert torch.equal(y[0], x[0])
    assert not y[1:3].isfinite().any()
    assert torch.allclose(y[3], x[3], rtol=0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", ["slab", "pages"])
@pytest.mark.parametrize("name", MODELS)
def test_prefill_chunks_and_single_tokens_read_the_same_codes(
    name: str, storage: str, kind: Any, small: Small, filled: Callable[..., Any]
) -> None:
    module = filled(small(layers=MODELS[name], cache_dtype=kind))
    generator = torch.Generator().manual_seed(4)
    sequences = [torch.randint(37, (length,), generator=generator).tolist() for length in (23, 9)]
    expected = step_through(module, sequences, 32, storage)
    for chunk in (7, 1):
        for found, whole in zip(step_through(module, sequences, chunk, storage), expected, strict=True):
            assert relative_error(found, whole) < 1e-4
    for tokens, whole in zip(sequences, expected, strict=True):
        assert relative_error(step_through(module, [tokens], 32, "slab")[0], whole) < 1e-4
        assert 1e-3 < relative_error(whole, prefill(module, tokens)) < 0.3


@pytest.mark.parametrize("storage", ["slab", "pages"])
@pytest.mark.parametrize("name", MODELS)
def test_stores_take_what_specs_say(name: str, storage: str, small: Small) -> None:
    specs = [small(layers=MODELS[name], cache_dtype=kind).states() for kind in (None, "int8")]
    for plain, coded in zip(*specs, strict=True):
        assert plain is not None
        assert coded is not None
        store = make_store(coded, 1, torch.bfloat16, "cpu", storage)
        store.grow(1, 256)
        tokens = 256 if coded.kind != "window" or storage == "slab" else 16
        assert store.nbytes == store.cost(256) >= coded.nbytes(256, 2)
        if tokens == 256:
            assert store.nbytes == coded.nbytes(256, 2)
        assert (coded.nbytes(256, 2) < plain.nbytes(256, 2)) == (coded.kind != "recurrent")


def test_the_error_is_measured_and_told(small: Small, filled: Callable[..., Any]) -> None:
    errors = {}
    for kind in KINDS:
        module = filled(small(layers=MODELS["full"], cache_dtype=kind))
        count, errors[kind] = cache_error(module, torch.float32, "cpu")
        assert count == 64
        [note] = coding_notes(module, torch.float32, "cpu")
        assert note.startswith(f"cache in {kind}: 33% of the bytes of float32, logits of 64 random tokens change by ")
        assert note.endswith(f"{errors[kind]:.2%}")
    assert 1e-4 < errors["int8"] < errors["fp8"] < 0.3
    plain = filled(small(layers=MODELS["full"]))
    assert coding_notes(plain, torch.float32, "cpu") == []
    assert cache_error(plain, torch.float32, "cpu")[1] < 1e-6


def test_a_model_without_keys_has_nothing_to_code(small: Small) -> None:
    with pytest.raises(
        CardError, match="cache_dtype needs layers that cache keys, values or latents; found states rec"
    ):
        small(layers=[{"mixer": MAMBA, "ffn": None}], cache_dtype="int8")
    with pytest.raises(CardError, match="'int8' or 'fp8'"):
        small(cache_dtype="int4")
