"""Quantised checkpoints of whole models against transformers, which dequantises them itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import zoo
from zoo.testing import relative_error

SIZES = {
    "vocab_size": 131,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "sliding_window": None,
}


@pytest.mark.parametrize("block", [None, 128])
def test_fp8_equals_transformers(tmp_path: Path, block: int | None) -> None:
    torch.manual_seed(0)
    transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        scale_GG = torch.rand([size // block for size in tensors[name].shape] if block else [])
        tensors[name] = (tensors[name] * 300).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = (scale_GG + 0.5) / 300
        tensors[name.replace("weight", "activation_scale")] = torch.tensor(0.01)
    if block:
        tensors = {name: tensor for name, tensor in tensors.items() if "activation" not in name}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [block, block] if block else None,
        "activation_scheme": "dynamic" if block else "static",
        "modules_to_not_convert": ["lm_head"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole = transformers.FineGrainedFP8Config(weight_block_size=block and (block, block), dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=whole).float()
    tokens = torch.randint(131, (11,)).tolist()
    with zoo.load(tmp_path, device="cpu", dtype="float32") as ours, torch.inference_mode():
        assert any(note.startswith("quantised weights (FP8) take 1.") for note in ours.notes), ours.notes
        assert relative_error(ours.logits(tokens), theirs(torch.tensor([tokens])).logits[0]) < 1e-4
