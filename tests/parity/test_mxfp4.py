"""A gpt-oss folder as published, its experts in MXFP4, against a model of transformers with the same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import zoo
from zoo.testing import relative_error, step_through

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What three bits of a number mean; a fourth is its sign (Open Compute Project, Microscaling Formats 1.0)."""

GROUP, BIAS = 32, 127


def packed(rows_EOI: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Random blocks (E, O, I / 32, 16), their scales (E, O, I / 32), and the numbers (E, O, I) that both mean."""
    experts, rows, columns = rows_EOI
    codes = torch.randint(16, (experts, rows, columns // GROUP, GROUP))
    scales = torch.randint(BIAS - 6, BIAS - 3, codes.shape[:3], dtype=torch.uint8)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    values = torch.tensor([*E2M1, *(-value for value in E2M1)])[codes]
    numbers = values * 2.0 ** (scales.double() - BIAS).unsqueeze(-1)
    return blocks, scales, numbers.flatten(2).float()


def test_published_experts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=131,
        sliding_window=7,
        max_position_embeddings=64,
        layer_types=["sliding_attention", "full_attention"],
        pad_token_id=None,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
    )
    model = transformers.GptOssForCausalLM(config).float().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.15)
    experts: dict[str, Tensor] = {}
    for i, layer in enumerate(model.model.layers):
        for name, shape in (("gate_up_proj", (4, 64, 64)), ("down_proj", (4, 64, 32))):
            blocks, scales, numbers_EOI = packed(shape)
            getattr(layer.mlp.experts, name).data = numbers_EOI.transpose(1, 2).contiguous()
            place = f"model.layers.{i}.mlp.experts.{name}"
            experts |= {f"{place}_blocks": blocks, f"{place}_scales": scales}
    tokens = torch.randint(131, (19,)).tolist()
    with torch.inference_mode():
        expected_TV = model(torch.tensor([tokens])).logits[0]
    model.save_pretrained(tmp_path)
    file, settings = tmp_path / "model.safetensors", tmp_path / "config.json"
    plain = {k: v for k, v in load_file(file).items() if not k.endswith(("gate_up_proj", "down_proj"))}
    save_file(plain | experts, file)
    quantised = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"quantization_config": quantised}))
    with zoo.load(tmp_path, device="cpu", dtype="float32") as ours:
        assert relative_error(ours.logits(tokens), expected_TV) < 1e-4
        assert relative_error(step_through(ours.module, [tokens], 5)[0], expected_TV) < 1e-4
