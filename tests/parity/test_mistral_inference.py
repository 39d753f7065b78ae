"""zoo on native folders computes what mistral-inference's own code computes."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import zoo
from zoo.testing import relative_error

TOKENS = [1, 5, 42, 7, 96, 11, 3, 8, 60, 2, 77, 31]


@pytest.mark.parametrize("experts", [None, 4], ids=["dense", "mixture"])
@pytest.mark.parametrize("window", [None, 5, [None, 5]], ids=["full", "window", "interleaved"])
def test_oracle_agrees_with_itself(
    mistral_inference: ModuleType, tmp_path: Path, experts: int | None, window: Any
) -> None:
    """Prefill, chunks and single tokens: three of its masks, which must mean the same."""
    model = mistral_inference.open_folder(
        mistral_inference.write_folder(tmp_path, experts=experts, sliding_window=window)
    )
    (whole_TV,) = mistral_inference.logits(model, [TOKENS])
    for chunk in (4, 1):
        torch.testing.assert_close(mistral_inference.logits(model, [TOKENS], chunk=chunk)[0], whole_TV)
    both = mistral_inference.logits(model, [TOKENS[:3], TOKENS])
    torch.testing.assert_close(both[1], whole_TV)


def test_oracle_sees_the_window(mistral_inference: ModuleType, tmp_path: Path) -> None:
    full = mistral_inference.open_folder(mistral_inference.write_folder(tmp_path / "full"))
    cut = mistral_inference.open_folder(mistral_inference.write_folder(tmp_path / "cut", sliding_window=5))
    (full_TV,), (cut_TV,) = (mistral_inference.logits(model, [TOKENS]) for model in (full, cut))
    torch.testing.assert_close(full_TV[:5], cut_TV[:5])
    assert (full_TV[5] - cut_TV[5]).abs().max() > 1e-2


SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "one-kv-head": {"n_kv_heads": 1, "vocab_size": 101},
    "all-kv-heads": {"n_kv_heads": 4, "dim": 40, "hidden_dim": 56},
    "narrow-heads": {"head_dim": 6, "n_heads": 6, "n_kv_heads": 3, "rope_theta": 1e6},
    "window": {"sliding_window": 5},
    "interleaved": {"sliding_window": [None, 5], "n_layers": 4},
}


@pytest.mark.parametrize("experts", [None, 4], ids=["dense", "mixture"])
@pytest.mark.parametrize("shape", SHAPES)
def test_same_logits_and_tokens(mistral_inference: ModuleType, tmp_path: Path, experts: int | None, shape: str) -> None:
    folder = mistral_inference.write_folder(tmp_path, experts=experts, **SHAPES[shape])
    theirs = mistral_inference.open_folder(folder)
    (theirs_TV,) = mistral_inference.logits(theirs, [TOKENS])
    with zoo.load(folder, device="cpu", dtype="float32") as model:
        ours_TV = model.logits(TOKENS)
        completion = model.generate([TOKENS], max_tokens=12, temperature=0.0, ignore_eos=True)[0]
    assert relative_error(ours_TV, theirs_TV) < 1e-4
    assert completion.tokens == mistral_inference.greedy(theirs, TOKENS, 12)


def test_same_logits_from_a_pickled_checkpoint(mistral_inference: ModuleType, tmp_path: Path) -> None:
    folder = mistral_inference.write_folder(tmp_path, pickled=True)
    (theirs_TV,) = mistral_inference.logits(mistral_inference.open_folder(folder), [TOKENS])
    with zoo.load(folder, device="cpu", dtype="float32") as model:
        assert relative_error(model.logits(TOKENS), theirs_TV) < 1e-4
