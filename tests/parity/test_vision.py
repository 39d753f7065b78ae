"""Models with an image encoder against transformers: several images of several sizes in one prompt, random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import zoo
from zoo.engine.request import Media
from zoo.testing import relative_error, step_through

TOLERANCE, PATCH, IMAGE = 1e-4, 7, 10
TEXT = {
    "model_type": "mistral",
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "vocab_size": 131,
    "rms_norm_eps": 1e-3,
    "sliding_window": None,
    "max_position_embeddings": 128,
}
VISION = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": PATCH,
    "hidden_act": "silu",
}
OUTER: dict[str, dict[str, Any]] = {
    "mistral3": {"spatial_merge_size": 2, "multimodal_projector_bias": False},
    "llava": {
        "multimodal_projector_bias": True,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
}
MODERN = {"language_model.model.": "model.language_model.", "vision_tower.": "model.vision_tower."}
MODERN |= {"language_model.lm_head.": "lm_head.", "multi_modal_projector.": "model.multi_modal_projector."}
NATIVE = {
    "language_model.lm_head": "output",
    "language_model.model.embed_tokens": "tok_embeddings",
    "language_model.model.": "",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.": "attention.",
    "mlp.": "feed_forward.",
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    "vision_tower.": "vision_encoder.",
    "multi_modal_projector.norm": "pre_mm_projector_norm",
    "multi_modal_projector.patch_merger": "patch_merger",
    "multi_modal_projector.linear_1": "vision_language_adapter.w_in",
    "multi_modal_projector.linear_2": "vision_language_adapter.w_out",
}


def card_of(kind: str) -> dict[str, Any]:
    norm = {"kind": "rms", "eps": 1e-5}
    merged = {"merge": 2, "norm": {"kind": "rms", "eps": TEXT["rms_norm_eps"]}, "bias": False}
    vision = {
        "kind": "pixtral",
        "token": IMAGE,
        "dim": 32,
        "num_layers": 2,
        "num_heads": 2,
        "hidden_dim": 44,
        "patch_size": PATCH,
        "max_image_size": 56,
        "theta": 1e4,
        "norm": norm,
        "projector": merged if kind == "mistral3" else {"bias": True},
    }
    mixer = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 12, "rope": {"theta": 1e4}}
    layers = [{"repeat": 2, "mixer": mixer, "ffn": {"kind": "gated", "hidden_dim": 56}}]
    model = {"dim": 40, "vocab_size": 131, "norm": norm | {"eps": 1e-3}, "vision": vision, "layers": layers}
    return {"name": kind, "context_length": 128, "model": model}


def random_model(kind: str) -> Any:
    torch.manual_seed(0)
    inner = {"text_config": TEXT, "vision_config": VISION, "image_token_index": IMAGE, "tie_word_embeddings": False}
    config = transformers.AutoConfig.for_model(kind, **inner, **OUTER[kind])
    model = transformers.AutoModelForImageTextToText.from_config(config).float().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.15)
    return model


def prompt_of(images: list[Tensor], cell: int) -> list[int]:
    """The images between and after text, each row of an image ended by a token of its own."""
    tokens = [1, 5]
    for image in images:
        rows, columns = image.shape[1] // cell, image.shape[2] // cell
        tokens += ([IMAGE] * columns + [12]) * rows + [20, 21]
    return tokens


def logits_of(model: Any, tokens: list[int], images: list[Tensor]) -> Tensor:
    """By transformers, which takes images padded to one size."""
    sizes = torch.tensor([image.shape[1:] for image in images])
    height, width = sizes.amax(0).tolist()
    padded = [torch.nn.functional.pad(i, (0, width - i.shape[2], 0, height - i.shape[1])) for i in images]
    with torch.inference_mode():
        found = model(torch.tensor([tokens]), pixel_values=torch.stack(padded), image_sizes=sizes)
    logits_TV: Tensor = found.logits[0]
    return logits_TV


@pytest.mark.parametrize("kind", list(OUTER))
def test_several_images_equal_transformers(kind: str, tmp_path: Path) -> None:
    model, cell = random_model(kind), PATCH * OUTER[kind].get("spatial_merge_size", 1)
    images = [torch.randn(3, 28, 42), torch.randn(3, 56, 14), torch.randn(3, 14, 14)]
    tokens, media = prompt_of(images, cell), [Media("vision", image) for image in images]
    expected = logits_of(model, tokens, images)
    model.save_pretrained(tmp_path / "new")
    with zoo.load(card_of(kind), weights=tmp_path / "new", device="cpu", dtype="float32") as ours:
        found = [ours.engine.logits(tokens, None, media)]
        found += [step_through(ours.module, [tokens], chunk, media=[media])[0] for chunk in (5, 1)]
    assert max(relative_error(logits, expected) for logits in found) < TOLERANCE
    assert relative_error(found[0], logits_of(model, tokens, [images[0].flip(2), *images[1:]])) > 0.01


@pytest.mark.parametrize("kind", list(OUTER))
@pytest.mark.parametrize("spelling", ["today", "native"])
def test_other_spellings_of_names_give_the_same(kind: str, spelling: str, tmp_path: Path) -> None:
    random_model(kind).save_pretrained(tmp_path / "hub")
    tensors = load_file(tmp_path / "hub" / "model.safetensors")
    assert "vision_tower.patch_conv.weight" in tensors
    (tmp_path / "other").mkdir()
    rename = native if spelling == "native" else today
    file = {"today": "model.safetensors", "native": "consolidated.safetensors"}[spelling]
    save_file(dict(rename(*item) for item in tensors.items()), tmp_path / "other" / file)
    images = [torch.randn(3, 14, 28), torch.randn(3, 28, 14)]
    tokens = prompt_of(images, PATCH * OUTER[kind].get("spatial_merge_size", 1))
    logits = []
    for folder in ("hub", "other"):
        with zoo.load(card_of(kind), weights=tmp_path / folder, device="cpu", dtype="float32") as ours:
            logits.append(ours.engine.logits(tokens, None, [Media("vision", image) for image in images]))
    assert torch.equal(*logits)


def today(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """As newer files have it: all of the model but its head inside of `model`."""
    old = next(prefix for prefix in MODERN if name.startswith(prefix))
    return MODERN[old] + name.removeprefix(old), tensor


def native(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """Mistral's own name, and the rows of queries and keys in pairs."""
    if "q_proj" in name or "k_proj" in name:
        size = 12 if name.startswith("language_model") else 16
        tensor = tensor.view(-1, 2, size // 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
    for old, new in NATIVE.items():
        name = name.replace(old, new)
    return name, tensor.contiguous()
