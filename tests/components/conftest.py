"""Small decoders from card nodes, filled with seeded numbers; the oracle; the table of tolerances."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.components.build import build
from zoo.components.cache.store import Store, make_store
from zoo.components.decoder.model import Decoder
from zoo.components.decoder.spec import DecoderSpec
from zoo.components.step import Step
from zoo.registry.card import Card
from zoo.registry.resolve import resolve
from zoo.registry.spec import Spec

Node = dict[str, Any]

TOLERANCES = {
    "same": 2e-6,  # one formula by two ways, float32
    "oracle": 2e-5,  # whole float32 models against float64
    "bfloat16": 2e-2,  # kernels in bfloat16 against float32
}
"""Largest error relative to the largest value."""

ATTENTION: Node = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "rope": {"theta": 1.0e4}}
GATED: Node = {"kind": "gated", "hidden_dim": 24}
MOE: Node = {"kind": "moe", "num_experts": 4, "experts_per_token": 2, "expert": GATED}


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    """`tests/reference/decoder.py`."""
    file = Path(__file__).parent.parent / "reference" / "decoder.py"
    spec = importlib.util.spec_from_file_location("reference_decoder", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def close() -> Callable[[Tensor, Tensor, str], None]:
    """Asserts that two tensors are equal within a tolerance of the table."""

    def check(found: Tensor, expected: Tensor, tolerance: str = "same") -> None:
        assert found.shape == expected.shape
        error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
        assert error <= TOLERANCES[tolerance], f"relative error {error:.2e}"

    return check


@pytest.fixture(scope="session")
def small() -> Callable[..., DecoderSpec]:
    """A decoder's Spec, by the real resolver: small(mixer={...}, ffn={...}, **model fields)."""

    def make(mixer: Node | None = None, ffn: Node | None = None, **model: Any) -> DecoderSpec:
        block = {"repeat": 2, "mixer": ATTENTION | (mixer or {}), "ffn": ffn or GATED}
        node = {"dim": 16, "vocab_size": 37, "norm": {"kind": "rms", "eps": 1e-5}, "layers": [block], **model}
        spec = resolve(Card.from_dict({"name": "small", "context_length": 128, "model": node})).model
        assert isinstance(spec, DecoderSpec)
        return spec

    return make


@pytest.fixture(scope="session")
def filled() -> Callable[..., Any]:
    """A module with seeded random parameters, on the CPU."""

    def make(spec: Spec, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        module = build(spec, device="cpu")
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4 + 0.1)
        return module.to(dtype)

    return make


@pytest.fixture(scope="session")
def taken_apart() -> Callable[[Spec, nn.Module], dict[str, Tensor]]:
    """A module's parameters as the tensors of a checkpoint."""

    def make(spec: Spec, module: nn.Module) -> dict[str, Tensor]:
        stored = dict(module.named_parameters())
        return {t.name: stored[t.param].detach()[t.index] for t in spec.tensors()}

    return make


class Sequences:
    """Feeds token lists through a decoder with stores, as an engine does."""

    def __init__(self, model: Decoder, storage: str = "auto") -> None:
        self.model, self.past = model, dict[int, int]()
        states = model.spec.states()
        groups = {state: states.count(state) for state in states if state is not None}
        self.stores: dict[Any, Store] = {
            state: make_store(state, count, torch.float32, "cpu", storage) for state, count in groups.items()
        }

    def feed(self, tokens: dict[int, Sequence[int]]) -> dict[int, Tensor]:
        """One step; sequence -> its new tokens; gives each one's logits."""
        seqs, rows = list(tokens), [len(new) for new in tokens.values()]
        past = [self.past.get(seq, 0) for seq in seqs]
        for seq, old, new in zip(seqs, past, rows, strict=True):
            for store in self.stores.values():
                store.grow(seq, old + new)
            self.past[seq] = old + new
        views = {state: iter(store.views(seqs, rows, past)) for state, store in self.stores.items()}
        states = [None if state is None else next(views[state]) for state in self.model.spec.states()]
        positions = torch.cat([torch.arange(old, old + new) for old, new in zip(past, rows, strict=True)])
        packed = torch.tensor([token for new in tokens.values() for token in new])
        with torch.inference_mode():
            logits = self.model(packed, Step(positions, rows, past, states))
        return dict(zip(seqs, torch.split(logits, rows), strict=True))

    def free(self, seq: int) -> None:
        """Forget a sequence."""
        del self.past[seq]
        for store in self.stores.values():
            store.free(seq)


@pytest.fixture(scope="session")
def sequences() -> type[Sequences]:
    return Sequences
