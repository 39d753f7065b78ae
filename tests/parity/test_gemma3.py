"""Gemma 3 from 4B on: the language model out of a checkpoint that also holds an image encoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import zoo
from zoo.registry.errors import CardError, WeightsError
from zoo.testing import relative_error, step_through

TOLERANCE, VOCABULARY = 1e-4, 131


@pytest.fixture(scope="module")
def model() -> transformers.Gemma3ForConditionalGeneration:
    torch.manual_seed(0)
    text = {
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "query_pre_attn_scalar": 12,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "sliding_window": 7,
        "pad_token_id": None,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
    }
    vision = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    found = transformers.Gemma3ForConditionalGeneration(config).float().eval()
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.15)
    return found


def test_the_language_model_alone(model: transformers.Gemma3ForConditionalGeneration, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    tokens = torch.randint(VOCABULARY, (23,)).tolist()
    with torch.inference_mode():
        expected_TV = model(torch.tensor([tokens])).logits[0]
    with zoo.load(tmp_path, device="cpu", dtype="float32") as ours:
        assert relative_error(ours.logits(tokens), expected_TV) < TOLERANCE
        for chunk in (5, 1):
            assert relative_error(step_through(ours.module, [tokens], chunk)[0], expected_TV) < TOLERANCE


def test_the_language_model_says_no_more_than_it_must(
    model: transformers.Gemma3ForConditionalGeneration, tmp_path: Path
) -> None:
    """Published files name only what differs from the class, in the spelling of transformers 4."""
    model.save_pretrained(tmp_path)
    card = zoo.inspect("gemma-3-4b").plan.model
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 1152}}
    for file in tmp_path.iterdir():
        file.unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert zoo.inspect(tmp_path).plan.model == card.model_copy(update={"tied_embeddings": True})


def test_what_is_left_out_is_named(model: transformers.Gemma3ForConditionalGeneration, tmp_path: Path) -> None:
    """The encoder's tensors are known by name: one more is an error, and so are settings of another encoder."""
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"vision_tower.other": torch.zeros(2)}, file)
    with pytest.raises(WeightsError, match=r"in the files only: vision_tower\.other"):
        zoo.load(tmp_path, device="cpu", dtype="float32")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"audio_config": {"hidden_size": 8}}))
    with pytest.raises(CardError, match="an audio encoder"):
        zoo.load(tmp_path, device="cpu")
