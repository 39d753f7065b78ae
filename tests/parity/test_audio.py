"""Models with a sound encoder against transformers: several sounds in one prompt, also of several chunks, random
weights under every spelling of their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.whisper.modeling_whisper import sinusoids

import zoo
from zoo.engine.request import Media
from zoo.testing import relative_error, step_through

TOLERANCE, AUDIO, BANDS, FRAMES = 1e-4, 24, 10, 24
TEXT = {
    "model_type": "llama",
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "vocab_size": 131,
    "rms_norm_eps": 1e-3,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
SOUND = {
    "model_type": "voxtral_encoder",
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_mel_bins": BANDS,
    "max_source_positions": FRAMES // 2,
}
CARD: dict[str, Any] = {
    "name": "voxtral",
    "context_length": 128,
    "model": {
        "dim": 40,
        "vocab_size": 131,
        "norm": {"kind": "rms", "eps": 1e-3},
        "audio": {
            "kind": "whisper",
            "token": AUDIO,
            "dim": 32,
            "num_layers": 2,
            "num_heads": 2,
            "hidden_dim": 128,
            "num_mel_bins": BANDS,
            "positions": FRAMES // 2,
            "stack": 4,
            "norm": {"kind": "layer", "eps": 1e-5},
        },
        "layers": [
            {
                "repeat": 2,
                "mixer": {
                    "kind": "attention",
                    "num_heads": 4,
                    "num_kv_heads": 2,
                    "head_dim": 12,
                    "rope": {"theta": 1e4},
                },
                "ffn": {"kind": "gated", "hidden_dim": 56},
            }
        ],
    },
}
MODERN = {"language_model.model.": "model.language_model.", "audio_tower.": "model.audio_tower."}
MODERN |= {"language_model.lm_head.": "lm_head.", "multi_modal_projector.": "model.multi_modal_projector."}
ENCODER = "mm_whisper_embeddings.whisper_encoder."
NATIVE = {
    "language_model.lm_head": "output",
    "language_model.model.embed_tokens": "mm_whisper_embeddings.tok_embeddings",
    "language_model.model.": "",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn_layer_norm": "attention_norm",
    "final_layer_norm": "ffn_norm",
    "self_attn.": "attention.",
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "out_proj": "wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "fc1": "feed_forward.w1",
    "fc2": "feed_forward.w2",
    "audio_tower.conv1": ENCODER + "conv_layers.0",
    "audio_tower.conv2": ENCODER + "conv_layers.1",
    "audio_tower.layer_norm": ENCODER + "transformer.norm",
    "audio_tower.": ENCODER + "transformer.",
    "multi_modal_projector.linear_1": "mm_whisper_embeddings.audio_language_projection.0",
    "multi_modal_projector.linear_2": "mm_whisper_embeddings.audio_language_projection.2",
}


def random_model() -> Any:
    torch.manual_seed(0)
    config = transformers.VoxtralConfig(text_config=TEXT, audio_config=SOUND, audio_token_id=AUDIO)
    model = transformers.VoxtralForConditionalGeneration(config).float().eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.15)
    table = model.model.audio_tower.embed_positions.weight
    table.copy_(sinusoids(*table.shape))
    return model


def prompt_of(sounds: list[Tensor]) -> list[int]:
    """The sounds between and after text."""
    tokens = [1, 3]
    for sound in sounds:
        tokens += [25, *[AUDIO] * (sound.shape[1] // 8), 40, 41, 42]
    return [*tokens, 4]


def logits_of(model: Any, tokens: list[int], sounds: list[Tensor]) -> Tensor:
    """By transformers, which takes the chunks of all sounds as one batch."""
    chunks = torch.cat([torch.stack(sound.split(FRAMES, 1)) for sound in sounds])
    with torch.inference_mode():
        logits_TV: Tensor = model(torch.tensor([tokens]), input_features=chunks).logits[0]
    return logits_TV


@pytest.mark.parametrize("chunks", [(1,), (3,), (1, 2, 1)], ids=["one sound", "long", "several"])
def test_sounds_equal_transformers(chunks: tuple[int, ...], tmp_path: Path) -> None:
    model = random_model()
    sounds = [torch.randn(BANDS, count * FRAMES) for count in chunks]
    tokens, media = prompt_of(sounds), [Media("audio", sound) for sound in sounds]
    expected = logits_of(model, tokens, sounds)
    model.save_pretrained(tmp_path)
    with zoo.load(CARD, weights=tmp_path, device="cpu", dtype="float32") as ours:
        found = [ours.engine.logits(tokens, None, media)]
        found += [step_through(ours.module, [tokens], chunk, media=[media])[0] for chunk in (5, 1)]
    assert max(relative_error(logits, expected) for logits in found) < TOLERANCE
    assert relative_error(found[0], logits_of(model, tokens, [sounds[0].flip(1), *sounds[1:]])) > 0.01


@pytest.mark.parametrize("spelling", ["today", "native"])
def test_other_spellings_of_names_give_the_same(spelling: str, tmp_path: Path) -> None:
    random_model().save_pretrained(tmp_path / "hub")
    tensors = load_file(tmp_path / "hub" / "model.safetensors")
    (tmp_path / "other").mkdir()
    if spelling == "native":  # Mistral's own files leave the positions out, which follow from their number
        del tensors["audio_tower.embed_positions.weight"]
    rename = native if spelling == "native" else today
    file = {"today": "model.safetensors", "native": "consolidated.safetensors"}[spelling]
    save_file(dict(rename(*item) for item in tensors.items()), tmp_path / "other" / file)
    sounds = [torch.randn(BANDS, FRAMES), torch.randn(BANDS, 2 * FRAMES)]
    logits = []
    for folder in ("hub", "other"):
        with zoo.load(CARD, weights=tmp_path / folder, device="cpu", dtype="float32") as ours:
            logits.append(ours.engine.logits(prompt_of(sounds), None, [Media("audio", sound) for sound in sounds]))
    assert torch.equal(*logits)


def today(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """As newer files have it: all of the model but its head inside of `model`."""
    old = next(prefix for prefix in MODERN if name.startswith(prefix))
    return MODERN[old] + name.removeprefix(old), tensor


def native(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """Mistral's own name, and the rows of queries and keys in pairs; not the encoder's, which has no rope."""
    if name.startswith("language_model") and ("q_proj" in name or "k_proj" in name):
        tensor = tensor.view(-1, 2, 6, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
    for old, new in NATIVE.items():
        name = name.replace(old, new)
    return name, tensor.contiguous()
