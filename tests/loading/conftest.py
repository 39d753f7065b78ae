"""Tiny checkpoints for the loading tests."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from zoo.registry.card import Card
from zoo.registry.resolve import Plan, resolve

_spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).with_name("hub_server.py"))
assert _spec is not None
assert _spec.loader is not None
hub_server = sys.modules["hub_server"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hub_server)
hub, weights = hub_server.hub, hub_server.weights

SIZES = {"dim": 64, "vocab_size": 509, "norm": {"kind": "rms", "eps": 1.0e-5}}
MIXER = {"kind": "attention", "num_heads": 4, "num_kv_heads": 1, "head_dim": 24, "rope": {"theta": 1.0e4}}
DENSE = {"kind": "gated", "hidden_dim": 40}
MOE = {"kind": "moe", "num_experts": 3, "experts_per_token": 2, "expert": DENSE}


@pytest.fixture(scope="session")
def plan_of() -> Callable[..., Plan]:
    """plan_of(ffn="dense" | "moe", mixer={...}, **model fields) -> the Plan of a two-layer model."""

    def build(ffn: str = "dense", mixer: Mapping[str, Any] | None = None, **fields: Any) -> Plan:
        layer = {"mixer": {**MIXER, **(mixer or {})}, "ffn": MOE if ffn == "moe" else DENSE}
        model = {**SIZES, "layers": [{"repeat": 2, **layer}], **fields}
        return resolve(Card.from_dict({"name": "little", "context_length": 64, "model": model}))

    return build


@pytest.fixture(scope="session")
def native_names() -> Callable[[Plan], dict[str, tuple[int, ...]]]:
    """The names and shapes of a plan's tensors as Mistral's own files write them."""
    words = {
        "embed": "tok_embeddings",
        "head": "output",
        "mixer_norm": "attention_norm",
        "mixer.q": "attention.wq",
        "mixer.k": "attention.wk",
        "mixer.v": "attention.wv",
        "mixer.o": "attention.wo",
        "ffn.router": "feed_forward.gate",
        ".gate.": ".w1.",
        ".up.": ".w3.",
        ".down.": ".w2.",
        "ffn.": "feed_forward.",
    }

    def rename(name: str) -> str:
        for ours, theirs in words.items():
            name = name.replace(ours, theirs) if not name.endswith("feed_forward.gate.weight") else name
        return name

    return lambda plan: {rename(t.name): t.shape for t in plan.model.tensors()}


@pytest.fixture(scope="session")
def save() -> Callable[..., Path]:
    """save(file, {name: shape}, dtype, seed) -> the file, filled with seeded values."""

    def write(
        file: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> Path:
        generator = torch.Generator().manual_seed(seed)
        tensors = {n: torch.randn(tuple(s), generator=generator).to(dtype) for n, s in shapes.items()}
        save_file(tensors, file)
        return file

    return write


@pytest.fixture(scope="session")
def raw() -> Callable[..., Path]:
    """raw(file, header object or bytes, data) -> a safetensors file put together byte by byte."""

    def write(file: Path, header: Any, data: bytes = b"") -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data)
        return file

    return write
