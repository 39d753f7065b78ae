"""Indexers, layers that read an earlier layer's latents, scalable softmax, learned rope."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from zoo.components.decoder.spec import DecoderSpec
from zoo.components.indexer.lightning import best
from zoo.registry.errors import CardError
from zoo.testing import check_component, prefill, relative_error, step_through

LIGHTNING: dict[str, Any] = {"kind": "lightning", "num_heads": 16, "head_dim": 6, "top_k": 5, "norm_eps": 1e-6}
MIXER: dict[str, Any] = {
    "kind": "latent_attention",
    "num_heads": 3,
    "q_lora_rank": None,
    "kv_lora_rank": 14,
    "nope_head_dim": 6,
    "rope_head_dim": 4,
    "v_head_dim": 5,
    "rope": {"theta": 100.0},
    "indexer": LIGHTNING,
}
PLAIN: dict[str, Any] = MIXER | {"nope_head_dim": 10, "rope_head_dim": 0, "rope": None}
GATED = {"kind": "gated", "hidden_dim": 24}
TOKENS = [1, 5, 32, 7, 16, 11, 3, 8, 30, 2, 27, 31, 0, 9, 4]


def of(*mixers: dict[str, Any], **model: Any) -> dict[str, Any]:
    return {"layers": [{"mixer": mixer, "ffn": GATED} for mixer in mixers], **model}


def reading(mixer: dict[str, Any], layer: int, **changes: Any) -> dict[str, Any]:
    return mixer | {"cache": {"kind": "shared", "layer": layer}} | changes


SHAPES: dict[str, dict[str, Any]] = {
    "indexed": of(MIXER, MIXER),
    "without positions": of(MIXER, PLAIN),
    "scalable softmax": of(MIXER | {"ssmax": True, "indexer": LIGHTNING | {"ssmax": True}}),
    "learned rope": of(MIXER, PLAIN, lerope=True),
    "latents of an earlier layer": of(MIXER, PLAIN, reading(MIXER, 0), reading(PLAIN, 1)),
    "a choice used again": of(MIXER, MIXER | {"indexer": {"kind": "shared"}}),
    "nothing of its own": of(MIXER, reading(MIXER, 0, indexer={"kind": "shared"})),
    "latents without an indexer": of(MIXER | {"indexer": None}, reading(MIXER, 0, indexer=None)),
}


def test_conforms() -> None:
    variants = {"q_lora_rank": 8, "mscale": 1.0, "query_scaling": {"beta": 0.7, "original_context": 4}}
    check_component("mixer", MIXER | {"ssmax": True}, variants=variants)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("storage", ["slab", "pages"])
def test_prefill_is_chunks_is_single_tokens_is_a_batch(
    shape: dict[str, Any], storage: str, small: Callable[..., DecoderSpec], filled: Callable[..., Any]
) -> None:
    module = filled(small(**shape))
    expected = prefill(module, TOKENS)
    for chunk in (15, 4, 1):
        assert relative_error(step_through(module, [TOKENS], chunk, storage)[0], expected) < 1e-5
    for tokens, found in zip(
        (TOKENS, TOKENS[:3], TOKENS[2:12]),
        step_through(module, [TOKENS, TOKENS[:3], TOKENS[2:12]], 1, storage),
        strict=True,
    ):
        assert relative_error(found, prefill(module, tokens)) < 1e-5


def test_a_wide_choice_is_full_attention(small: Callable[..., DecoderSpec], filled: Callable[..., Any]) -> None:
    def logits(top_k: int) -> torch.Tensor:
        return prefill(filled(small(**of(MIXER | {"indexer": LIGHTNING | {"top_k": top_k}}))), TOKENS)

    wide, narrow = logits(15), logits(5)
    assert torch.equal(wide, logits(100))
    assert torch.equal(wide[:5], narrow[:5]), "rows with fewer keys than the choice see them all"
    assert relative_error(narrow, wide) > 1e-3


def test_choice_is_the_best_and_of_equals_the_first() -> None:
    scores = torch.tensor([[0.0, 2.0, 0.0, 1.0, 0.0], [3.0, 1.0, 2.0, 5.0, 4.0]])
    assert best(scores, 3).tolist() == [[True, True, False, True, False], [True, False, False, True, True]]
    more = torch.cat((scores[:1], torch.tensor([[0.0, -1.0]])), 1)
    assert best(more, 3).tolist() == [[True, True, False, True, False, False, False]]


@pytest.mark.parametrize("kernel", ["reference", "sdpa"])
def test_kernels_agree(
    kernel: str,
    small: Callable[..., DecoderSpec],
    filled: Callable[..., Any],
    close: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = filled(small(**SHAPES["indexed"]))
    expected = prefill(module, TOKENS)
    monkeypatch.setenv("ZOO_ATTENTION", kernel)
    close(prefill(module, TOKENS), expected, "oracle")


def test_a_reader_caches_its_index_keys_alone(small: Callable[..., DecoderSpec]) -> None:
    spec = small(**of(MIXER, reading(MIXER, 0), reading(MIXER, 0, indexer={"kind": "shared"})))
    assert [state and state.elements(10) for state in spec.states()] == [240, 60, None]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (of(MIXER, reading(PLAIN, 0)), "layer 1 reads the state of layer 0, which must be an earlier one"),
        (of(reading(MIXER, 0)), "layer 0 reads the state of layer 0"),
        (of(MIXER, reading(MIXER, 0), reading(MIXER, 1)), "layer 2 reads the state of layer 1"),
        (of(MIXER | {"indexer": {"kind": "shared"}}), "layer 0 uses the choice of an earlier indexer; found none"),
        (of(MIXER | {"rope": None}), "rope is null where rope_head_dim is 0; found null and 4"),
        (of(PLAIN, lerope=True), "lerope needs layers whose ropes turn equally many lanes; found none"),
        (of(MIXER | {"indexer": LIGHTNING | {"head_dim": 3}}), "head_dim must be at least rope_head_dim, 4; found 3"),
    ],
)
def test_what_does_not_fit_is_refused(shape: dict[str, Any], message: str, small: Callable[..., DecoderSpec]) -> None:
    with pytest.raises(CardError, match=message):
        small(**shape)
