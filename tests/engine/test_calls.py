"""Decode steps recorded as calls of the native kernels against steps that are planned anew: the very same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zoo
from zoo.components import native
from zoo.engine.capture import Captured, captures

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"no native kernels: {native.missing()}")

ATTENTION = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "rope": {"theta": 50.0}}
GATED = {"kind": "gated", "hidden_dim": 48}
MOE = {"kind": "moe", "num_experts": 4, "experts_per_token": 2, "expert": GATED}
SHARED = {"num_experts": 8, "experts_per_token": 3, "router": {"kind": "sigmoid", "groups": 4, "groups_per_token": 2}}
CLAMPED = {"kind": "clamped", "hidden_dim": 48, "gain": 1.7, "limit": 7.0}
SSM = {"num_heads": 6, "head_dim": 4, "num_groups": 2, "state_size": 5, "conv_size": 4, "norm_eps": 1e-5}
MAMBA1 = {"kind": "mamba1", "inner_dim": 32, "state_size": 6, "dt_rank": 3, "conv_size": 4}
MAMBA1 |= {"bcdt_norm": {"eps": 1e-3, "weights": True}}
LATENT: dict[str, Any] = {"kind": "latent_attention", "num_heads": 3, "kv_lora_rank": 32, "rope": {"theta": 50.0}}
LATENT |= {"q_lora_rank": 12, "nope_head_dim": 6, "rope_head_dim": 16, "v_head_dim": 8}
BORROWING = LATENT | {"cache": {"kind": "shared", "layer": 0}}
NORMED = {"qk_norm": {"kind": "rms", "eps": 1e-5}}
LAYERS: dict[str, list[dict[str, Any]]] = {
    "full": [{"mixer": ATTENTION, "ffn": GATED}] * 2,
    "window": [{"mixer": ATTENTION | {"window": 8}, "ffn": GATED}, {"mixer": ATTENTION, "ffn": GATED}],
    "softcap": [{"mixer": ATTENTION | {"softcap": 3.0}, "ffn": GATED | {"activation": "gelu"}}],
    "sinks": [{"mixer": ATTENTION | {"sinks": True} | window, "ffn": GATED} for window in ({"window": 8}, {})],
    "postnorm": [{"kind": "postnorm", "mixer": ATTENTION, "ffn": GATED}],
    "mixture": [{"mixer": ATTENTION, "ffn": MOE}, {"mixer": ATTENTION | {"window": 8}, "ffn": MOE}],
    "shared": [{"mixer": ATTENTION, "ffn": MOE | SHARED | {"shared": GATED}}],
    "softmax": [{"mixer": ATTENTION, "ffn": MOE | {"router": {"kind": "softmax", "normalize": True}}}],
    "clamped": [{"mixer": ATTENTION, "ffn": MOE | {"expert": CLAMPED}}],
    "filled mixture": [{"mixer": ATTENTION, "ffn": MOE | {"expert": GATED | {"hidden_dim": 36}}}],
    "odd mixture": [{"mixer": ATTENTION, "ffn": MOE | {"expert": GATED | {"hidden_dim": 35}}}],
    "latent": [{"mixer": LATENT, "ffn": GATED}, {"mixer": BORROWING | {"q_lora_rank": None}, "ffn": MOE}],
    "odd latent": [{"mixer": LATENT | {"kv_lora_rank": 20}, "ffn": GATED}],
    "mamba2": [{"mixer": {"kind": "mamba2"} | SSM, "ffn": GATED}, {"mixer": ATTENTION, "ffn": None}],
    "mamba1": [{"mixer": MAMBA1, "ffn": None}, {"mixer": MAMBA1, "ffn": GATED}],
}
PLANNED_ANEW = ("odd mixture", "odd latent")
"""Kinds that ask for numbers on the way: experts with an odd number of inputs, which panels do not take, are multiplied
one by one, and latents whose sizes the kernel does not fit are read sequence by sequence."""


def card(kind: str, **changes: Any) -> dict[str, Any]:
    model = {"dim": 32, "vocab_size": 67, "norm": {"kind": "rms", "eps": 1e-5}, "layers": LAYERS[kind]}
    return {"name": "called", "context_length": 600, "model": model | changes}


def answers(kind: str, monkeypatch: pytest.MonkeyPatch, capture: str, **options: Any) -> tuple[list[Any], int]:
    """Tokens and log-probabilities of a crowded run, and how many steps a record made."""
    monkeypatch.setenv("ZOO_CAPTURE", capture)
    runs, run = [0], Captured.run

    def counted(self: Captured, batch: Any) -> Any:
        found = run(self, batch)
        runs[0] += found is not None
        return found

    monkeypatch.setattr(Captured, "run", counted)
    changes = options.pop("changes", {})
    with zoo.load(card(kind, **changes), weights="random", device="cpu", dtype="bfloat16", **options) as model:
        prompts = [[(7 * n + k) % 67 for k in range(size)] for n, size in enumerate((1, 7, 40, 250))]
        found = model.generate(prompts, max_tokens=24, temperature=0.9, seed=3, ignore_eos=True, logprobs=2)
    monkeypatch.undo()
    return [(one.tokens, one.logprobs, one.top_logprobs) for one in found], runs[0]


@pytest.mark.parametrize("kind", LAYERS)
def test_recorded_calls_give_the_same_numbers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, none = answers(kind, monkeypatch, "off", max_batch_size=3)
    found, runs = answers(kind, monkeypatch, "auto", max_batch_size=3)
    assert found == expected
    assert none == 0
    assert (runs > 20) == (kind not in PLANNED_ANEW), "what asks for numbers on the way is planned anew"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("window", {"quantize": "int8", "changes": {"dim": 96}}),
        ("window", {"quantize": "int4", "changes": {"dim": 96}}),
        ("mixture", {"quantize": "int8", "changes": {"dim": 96}}),
        ("shared", {"quantize": "int4", "changes": {"dim": 96}}),
        ("window", {"changes": {"cache_dtype": "int8"}}),
        ("latent", {"changes": {"cache_dtype": "fp8"}}),
        ("latent", {"draft": "lookup"}),
        ("window", {"draft": "lookup"}),
        ("mixture", {"draft": "lookup"}),
    ],
    ids=[
        *("int8", "int4", "mixture in int8", "mixture in int4", "cache of int8"),
        *("latents in fp8", "latents with lookup", "lookup", "mixture with lookup"),
    ],
)
def test_recorded_calls_of_other_stores_and_weights(
    kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = answers(kind, monkeypatch, "off", **dict(options))
    found, runs = answers(kind, monkeypatch, "auto", **dict(options))
    assert found == expected
    assert runs > 10


def test_hooks_and_threads_are_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    with zoo.load(card("full"), weights="random", device="cpu", dtype="bfloat16") as model:
        ask: dict[str, Any] = {"max_tokens": 6, "ignore_eos": True, "temperature": 0.0}
        [first], seen = model.generate([[1, 2, 3]], **ask), []
        hook = model.module.layers[1].register_forward_hook(lambda *_: seen.append(1))
        assert model.generate([[1, 2, 3]], **ask)[0].tokens == first.tokens
        assert len(seen) == 6
        hook.remove()
        captured = model.engine._runner.captured  # type: ignore[union-attr]
        assert captured is not None
        before, threads = len(captured._steps), torch.get_num_threads()
        torch.set_num_threads(threads + 1)
        try:
            assert model.generate([[1, 2, 3]], **ask)[0].tokens == first.tokens
        finally:
            torch.set_num_threads(threads)
        assert len(captured._steps) == before + 1


def test_a_model_over_ranks_is_not_recorded() -> None:
    assert captures(torch.device("cpu"), spread=True) is None
    assert captures(torch.device("cpu")) == "calls"
