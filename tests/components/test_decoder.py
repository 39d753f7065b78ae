"""Whole decoders: equal to the oracle, however their tokens arrive, alone or with strangers."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from zoo.components.cache.store import fresh_step

TOKENS = [1, 5, 32, 7, 16, 11, 3, 8, 30, 2, 27, 31, 0]
MOE = {
    "kind": "moe",
    "num_experts": 4,
    "experts_per_token": 2,
    "expert": {"kind": "gated", "hidden_dim": 24, "activation": "gelu_tanh"},
}
ATTENTION = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "rope": {"theta": 1.0e4}}
BLOCK = {"mixer": ATTENTION, "ffn": {"kind": "gated", "hidden_dim": 24}}
WINDOWED = BLOCK | {"mixer": ATTENTION | {"window": 3}}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one kv head": {"mixer": {"num_heads": 3, "num_kv_heads": 1, "head_dim": 10}},
    "no sharing": {"mixer": {"num_kv_heads": 4}},
    "biases": {"mixer": {"qkv_bias": True, "o_bias": True}},
    "qk norm": {"mixer": {"qk_norm": {"kind": "rms", "eps": 1e-6}}},
    "no positions": {"mixer": {"rope": None}},
    "some lanes": {"mixer": {"rope": {"theta": 100.0, "rotary_dim": 4}}},
    "linear": {"mixer": {"rope": {"kind": "linear", "theta": 100.0, "factor": 2.5}}},
    "query scaling": {"mixer": {"query_scaling": {"beta": 0.3, "original_context": 3}}},
    "bounded scores": {"mixer": {"scale": 0.9, "softcap": 0.7}},
    "bounded scores, window": {"mixer": {"softcap": 0.7, "window": 5}},
    "sinks": {"mixer": {"sinks": True, "softcap": 0.7}},
    "sinks, window": {"mixer": {"sinks": True, "window": 5}},
    "tied": {"tied_embeddings": True},
    "mixture": {"ffn": MOE},
    "gelu": {"ffn": {"kind": "gated", "hidden_dim": 20, "activation": "gelu"}},
    "full cache behind a window": {"mixer": {"window": 5, "cache": {"kind": "full"}}},
    "window": {"mixer": {"window": 5}},
    "window, mixture": {"mixer": {"window": 4}, "ffn": MOE},
    "interleaved": {"layers": [{"repeat": 2, "pattern": [BLOCK, WINDOWED, WINDOWED]}]},
}


@pytest.fixture(params=MODELS, scope="module")
def spec(request: pytest.FixtureRequest, small: Callable[..., Any]) -> Any:
    return small(**MODELS[request.param])


def test_equals_the_oracle(
    spec: Any,
    filled: Callable[..., Any],
    taken_apart: Callable[..., Any],
    oracle: ModuleType,
    close: Callable[..., None],
) -> None:
    model = filled(spec)
    found = model(torch.tensor(TOKENS), fresh_step(spec, [len(TOKENS)]))
    close(found, oracle.logits(spec, taken_apart(spec, model), TOKENS), "oracle")


@pytest.mark.parametrize("storage", ["slab", "pages"])
@pytest.mark.parametrize("kernel", ["sdpa", "reference"])
def test_chunks_change_nothing(
    spec: Any,
    storage: str,
    kernel: str,
    filled: Callable[..., Any],
    sequences: Any,
    close: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ZOO_ATTENTION", kernel)
    model = filled(spec)
    whole = model(torch.tensor(TOKENS), fresh_step(spec, [len(TOKENS)]))
    for chunks in ([13], [1] * 13, [4, 9], [5, 5, 3], [6, 1, 1, 5], [3, 1, 9], [11, 2]):
        fed, pieces, start = sequences(model, storage), [], 0
        for count in chunks:
            pieces.append(fed.feed({7: TOKENS[start : start + count]})[7])
            start += count
        close(torch.cat(pieces), whole)


@pytest.mark.parametrize("storage", ["slab", "pages"])
def test_strangers_change_nothing(
    spec: Any, storage: str, filled: Callable[..., Any], sequences: Any, close: Callable[..., None]
) -> None:
    """Three sequences that start, chunk and end at different steps."""
    model = filled(spec)
    fed = sequences(model, storage)
    lists = {1: TOKENS, 2: TOKENS[::-1], 3: TOKENS[4:11]}
    pieces: dict[int, list[torch.Tensor]] = {1: [], 2: [], 3: []}
    schedule = [{1: 6}, {1: 1, 2: 3}, {1: 1, 2: 1, 3: 4}, {2: 1, 3: 1, 1: 1}, {1: 1, 2: 1, 3: 1}, {3: 1, 2: 7, 1: 3}]
    done = {1: 0, 2: 0, 3: 0}
    for counts in schedule:
        step = {seq: lists[seq][done[seq] : done[seq] + n] for seq, n in counts.items()}
        for seq, logits in fed.feed(step).items():
            pieces[seq].append(logits)
            done[seq] += counts[seq]
    assert done == {seq: len(tokens) for seq, tokens in lists.items()}
    for seq, tokens in lists.items():
        close(torch.cat(pieces[seq]), model(torch.tensor(tokens), fresh_step(spec, [len(tokens)])))


@pytest.mark.parametrize("length", [6, 7, 8, 14, 21])
@pytest.mark.parametrize("chunk", [1, 2, 6, 7, 8, 15])
@pytest.mark.parametrize("storage", ["slab", "pages"])
def test_ring_equals_full_with_mask(
    length: int,
    chunk: int,
    storage: str,
    small: Callable[..., Any],
    filled: Callable[..., Any],
    sequences: Any,
    close: Callable[..., None],
) -> None:
    """Lengths W-1, W, W+1, 2W and 3W of a window of 7, in chunks from one token to more than two windows."""
    tokens = [i * 7 % 37 for i in range(length)]
    results = []
    for cache in ("window", "full"):
        fed = sequences(filled(small(mixer={"window": 7, "cache": {"kind": cache}})), storage)
        results.append(torch.cat([fed.feed({0: tokens[i : i + chunk]})[0] for i in range(0, length, chunk)]))
    close(results[0], results[1])


def test_packed_sequences_do_not_see_each_other(
    small: Callable[..., Any], filled: Callable[..., Any], close: Callable[..., None]
) -> None:
    spec = small(mixer={"window": 4})
    model = filled(spec)
    together = model(torch.tensor(TOKENS), fresh_step(spec, [5, 8]))
    close(together[:5], model(torch.tensor(TOKENS[:5]), fresh_step(spec, [5])))
    close(together[5:], model(torch.tensor(TOKENS[5:]), fresh_step(spec, [8])))


def test_rows_are_picked_before_the_head(
    small: Callable[..., Any], filled: Callable[..., Any], close: Callable[..., None]
) -> None:
    spec = small()
    model = filled(spec)
    tokens = torch.tensor(TOKENS)
    every = model(tokens, fresh_step(spec, [13]))
    assert every.dtype is torch.float32
    close(model(tokens, fresh_step(spec, [13]), torch.tensor([12, 3])), every[[12, 3]])
    close(model.logits(model.hidden(tokens, fresh_step(spec, [13]))), every)


def test_bfloat16_gives_float32_logits(
    small: Callable[..., Any], filled: Callable[..., Any], close: Callable[..., None]
) -> None:
    spec = small(ffn=MOE)
    exact, rounded = filled(spec), filled(spec, torch.bfloat16)
    tokens = torch.tensor(TOKENS)
    found = rounded(tokens, fresh_step(spec, [13]))
    assert found.dtype is torch.float32
    close(found, exact(tokens, fresh_step(spec, [13])), "bfloat16")


def test_gradients_reach_every_parameter(spec: Any, filled: Callable[..., Any]) -> None:
    """Also against the slope of finite differences, along a random direction."""
    model = filled(spec).double()
    tokens = torch.tensor(TOKENS)

    def loss() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(tokens[:-1], fresh_step(spec, [7, 5])), tokens[1:])

    loss().backward()
    weights = list(model.parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in weights)
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) * 1e-4 for p in weights]
    values = []
    with torch.no_grad():
        for factor in (1, -2):
            for p, d in zip(weights, direction, strict=True):
                p += factor * d
            values.append(loss().item())
    slope = sum(float((p.grad * d).sum()) for p, d in zip(weights, direction, strict=True))
    length = 1e-4 * sum(float(p.grad.square().sum()) for p in weights) ** 0.5
    assert (values[0] - values[1]) / 2 == pytest.approx(slope, abs=1e-2 * length)
