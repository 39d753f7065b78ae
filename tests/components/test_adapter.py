"""Adapters at the linear seam: on the rows that use them, at every product that can be adapted, with gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from zoo.assemble import assemble
from zoo.components.adapter import Changes, LowRank, adaptable, hook, merge, uses_of, using
from zoo.components.cache.store import fresh_step
from zoo.components.decoder.model import Decoder
from zoo.components.linear import Linear
from zoo.loading.load import random_weights
from zoo.registry.card import Card
from zoo.registry.errors import PluginError
from zoo.registry.resolve import resolve
from zoo.testing import relative_error

ATTENTION = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "rope": {"theta": 100.0}}
MAMBA2 = {"kind": "mamba2", "num_heads": 4, "head_dim": 6, "num_groups": 2, "state_size": 5, "conv_size": 3}
MAMBA1 = {"kind": "mamba1", "inner_dim": 20, "state_size": 5, "conv_size": 3, "dt_rank": 4}
GATED = {"kind": "gated", "hidden_dim": 20}
MOE = {"kind": "moe", "num_experts": 3, "experts_per_token": 2, "expert": GATED}
CARD: dict[str, Any] = {
    "name": "hybrid",
    "context_length": 64,
    "model": {
        "dim": 12,
        "vocab_size": 31,
        "norm": {"kind": "rms", "eps": 1e-5},
        "layers": [
            {"mixer": {**ATTENTION, "o_bias": True}, "ffn": GATED},
            {"mixer": {**MAMBA2, "norm_eps": 1e-5}, "ffn": MOE},
            {"mixer": MAMBA1, "ffn": None},
        ],
    },
}
TOLERANCE = 1e-4
"""Relative error of the logits in float32."""

TOKENS = [5, 9, 1, 30, 2, 2, 17]
CPU = torch.device("cpu")


@pytest.fixture
def decoder() -> Decoder:
    plan = resolve(Card.from_dict(CARD))
    module = assemble(plan, torch.float32)
    random_weights(module, plan, device="cpu")
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=torch.Generator().manual_seed(parameter.numel()))
    return module


def paths(decoder: Decoder) -> list[str]:
    return [name for name, _ in decoder.named_modules() if adaptable(decoder, name)]


def change(decoder: Decoder, path: str, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    outputs, inputs = decoder.get_submodule(path).get_parameter("weight").shape
    return LowRank(*(torch.randn(shape, generator=generator) * 0.3 for shape in ((2, inputs), (outputs, 2))))


def logits(decoder: Decoder, tokens: list[int], *adapters: Changes | None, rows: list[int] | None = None) -> Any:
    rows = rows or [len(tokens)]
    with torch.inference_mode(), using(uses_of(adapters, rows, CPU)):
        return decoder(torch.tensor(tokens), fresh_step(decoder.spec, rows))


def test_products_within_blocks_can_be_adapted(decoder: Decoder) -> None:
    attention = {"layers.0.mixer.qkv", "layers.0.mixer.o", "layers.0.ffn.gate_up", "layers.0.ffn.down"}
    recurrent = {"layers.1.mixer.in_proj", "layers.1.mixer.out_proj"}
    recurrent |= {f"layers.2.mixer.{name}_proj" for name in ("in", "x", "dt", "out")}
    assert set(paths(decoder)) == attention | recurrent
    assert not adaptable(decoder, "layers.9.mixer.o")


def test_each_product_adds_what_merging_adds(decoder: Decoder) -> None:
    plain = logits(decoder, TOKENS)
    handles = hook(decoder, paths(decoder))
    for seed, path in enumerate(paths(decoder)):
        changes = {path: change(decoder, path, seed)}
        unmerged = logits(decoder, TOKENS, changes)
        assert relative_error(unmerged, plain) > 5 * TOLERANCE, path
        linear = decoder.get_submodule(path)
        assert isinstance(linear, Linear)
        before = linear.values("weight").clone()
        merge(linear, changes[path])
        assert relative_error(logits(decoder, TOKENS), unmerged) < TOLERANCE, path
        linear.replace("weight", (), before)
    assert torch.equal(logits(decoder, TOKENS), plain)
    for handle in handles:
        handle.remove()
    assert torch.equal(logits(decoder, TOKENS, changes), plain)


def test_sequences_of_a_step_use_their_own(decoder: Decoder) -> None:
    first, second = ({path: change(decoder, path, seed) for path in paths(decoder)} for seed in (1, 2))
    hook(decoder, paths(decoder))
    chosen, rows = (first, None, second, first), [3, 1, 7, 2]
    pieces = [TOKENS[:count] for count in rows]
    together = logits(decoder, [t for piece in pieces for t in piece], *chosen, rows=rows).split(rows)
    for piece, changes, found in zip(pieces, chosen, together, strict=True):
        assert relative_error(found, logits(decoder, piece, changes)) < TOLERANCE
    assert relative_error(together[0], logits(decoder, pieces[0], second)) > 0.01


def test_uses_are_over_with_their_block(decoder: Decoder) -> None:
    changes = {"layers.0.mixer.o": change(decoder, "layers.0.mixer.o", 0)}
    hook(decoder, changes)
    plain = logits(decoder, TOKENS)
    with pytest.raises(IndexError), using(uses_of([changes], [len(TOKENS)], CPU)):
        decoder(torch.tensor([999]), fresh_step(decoder.spec, [1]))
    assert torch.equal(logits(decoder, TOKENS), plain)


def test_rows_that_are_not_the_step_s_are_refused(decoder: Decoder) -> None:
    changes = {"layers.0.mixer.o": change(decoder, "layers.0.mixer.o", 0)}
    hook(decoder, changes)
    expected = r"layers\.0\.mixer\.o: this product cannot be adapted: .* found 7 rows; expected 5"
    with pytest.raises(PluginError, match=expected), using(uses_of([changes], [5], CPU)):
        decoder(torch.tensor(TOKENS), fresh_step(decoder.spec, [len(TOKENS)]))


def test_gradients_reach_the_factors(decoder: Decoder) -> None:
    path = "layers.0.mixer.qkv"
    factors = change(decoder, path, 0)
    for factor in (factors.a_LI, factors.b_OL):
        factor.requires_grad_(True)
    hook(decoder, [path])
    with using(uses_of([{path: factors}, None], [4, 3], CPU)):
        decoder(torch.tensor(TOKENS), fresh_step(decoder.spec, [4, 3])).square().sum().backward()
    for factor in (factors.a_LI, factors.b_OL):
        assert factor.grad is not None
        assert factor.grad.abs().max() > 0
