"""zoo's logits against transformers', on random checkpoints that transformers writes in its own layout."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import zoo
from zoo.testing import relative_error, step_through

TOLERANCE = 1e-4
"""Relative error of the logits in float32."""

LENGTH = 37

SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 131,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 1.5, 3.0, 6.0, 12.0, 25.0, 26.0, 27.0],
}

GEMMA2 = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "sliding_window": 9,
    "query_pre_attn_scalar": 12,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "tie_word_embeddings": True,
}

GEMMA3 = {
    "hidden_size": 64,
    "num_hidden_layers": 7,
    "sliding_window": 9,
    "query_pre_attn_scalar": 12,
    "tie_word_embeddings": True,
}
OLMO3_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral window below the prompt": ("Mistral", {"sliding_window": 11}),
    "mistral window at the prompt": ("Mistral", {"sliding_window": LENGTH}),
    "mistral tied": ("Mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "mistral head_dim above dim / heads": ("Mistral", {"sliding_window": None, "head_dim": 20}),
    "mistral one kv head": ("Mistral", {"sliding_window": 9, "num_key_value_heads": 1}),
    "mistral as many kv heads": ("Mistral", {"sliding_window": None, "num_key_value_heads": 4}),
    "mistral prime vocabulary": ("Mistral", {"sliding_window": None, "vocab_size": 509, "hidden_size": 44}),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None}),
    "mixtral window": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 1, "sliding_window": 8}),
    "ministral": (
        "Ministral",
        {
            "num_hidden_layers": 4,
            "sliding_window": 10,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "ministral3": ("Ministral3", {"rope_parameters": YARN, "sliding_window": None}),
    "llama": ("Llama", {}),
    "llama llama3 scaling": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama linear scaling": ("Llama", {"rope_parameters": LINEAR}),
    "llama biases": ("Llama", {"attention_bias": True}),
    "gemma2": ("Gemma2", GEMMA2),
    "gemma2 without bounds": ("Gemma2", GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3 own thetas": ("Gemma3Text", GEMMA3),
    "gemma3 stretched": (
        "Gemma3Text",
        GEMMA3
        | {
            "rope_parameters": {
                "full_attention": LINEAR,
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            }
        },
    ),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5, "hidden_size": 64, "pad_token_id": 0, "no_rope_layer_interval": 2}),
    "glm4": ("Glm4", {"hidden_size": 64, "pad_token_id": 0}),
    "glm4 without biases": ("Glm4", {"attention_bias": False, "pad_token_id": 0}),
    "olmo2": ("Olmo2", {"hidden_size": 64}),
    "olmo3": (
        "Olmo3",
        {"hidden_size": 64, "num_hidden_layers": 4, "sliding_window": 7}
        | {
            "rope_parameters": {
                "full_attention": OLMO3_YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            }
        },
    ),
    "granite": (
        "Granite",
        {"attention_multiplier": 0.4, "residual_multiplier": 0.3, "logits_scaling": 6.0, "embedding_multiplier": 12.0}
        | {"hidden_size": 64},
    ),
    "phi3 longrope": ("Phi3", {"hidden_size": 64, "pad_token_id": 0, "rope_parameters": LONGROPE}),
    "phi3 some lanes, beyond the original context": (
        "Phi3",
        {
            "hidden_size": 64,
            "pad_token_id": 0,
            "rope_parameters": LONGROPE
            | {"partial_rotary_factor": 0.75}
            | {"short_factor": [1.0, 1.1, 1.2, 2.0, 2.5, 3.0], "long_factor": [1.0, 2.0, 3.0, 9.0, 10.0, 11.0]},
        },
    ),
    "phi3 some lanes, within the original context": (
        "Phi3",
        {
            "hidden_size": 64,
            "pad_token_id": 0,
            "tie_word_embeddings": True,
            "rope_parameters": LONGROPE
            | {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 256}
            | {"short_factor": [1.0, 1.1, 1.2, 2.0, 2.5, 3.0], "long_factor": [1.0, 2.0, 3.0, 9.0, 10.0, 11.0]},
        },
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, PreTrainedModel]]:
    """Makes, once per case, a folder that transformers saved and the model that it saved."""
    made: dict[str, tuple[Path, PreTrainedModel]] = {}

    def make(case: str) -> tuple[Path, PreTrainedModel]:
        if case not in made:
            name, changes = CASES[case]
            config = getattr(transformers, f"{name}Config")(**{**SMALL, **changes})
            torch.manual_seed(len(made))
            model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.1)
            folder = tmp_path_factory.mktemp("checkpoint")
            model.save_pretrained(folder, max_shard_size="100KB" if "window" in case else "1GB")
            made[case] = folder, model
        return made[case]

    return make


def expected_logits(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits_TV: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits_TV.float()


def random_tokens(model: PreTrainedModel, length: int = LENGTH) -> list[int]:
    return torch.randint(model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(7)).tolist()


@pytest.mark.parametrize("case", CASES)
def test_logits_equal(case: str, checkpoint: Callable[[str], tuple[Path, PreTrainedModel]]) -> None:
    folder, model = checkpoint(case)
    tokens = random_tokens(model)
    expected = expected_logits(model, tokens)
    with zoo.load(folder, device="cpu", dtype="float32") as ours:
        assert relative_error(ours.logits(tokens), expected) < TOLERANCE
        for chunk in (10, 1):
            [found] = step_through(ours.module, [tokens], chunk)
            assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize("case", ["mistral window below the prompt", "mixtral", "ministral"])
def test_greedy_tokens_equal(case: str, checkpoint: Callable[[str], tuple[Path, PreTrainedModel]]) -> None:
    folder, model = checkpoint(case)
    tokens = random_tokens(model, 20)
    with torch.inference_mode():
        expected = model.generate(
            torch.tensor([tokens]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(tokens) :].tolist()
    with zoo.load(folder, device="cpu", dtype="float32") as ours:
        [completion] = ours.generate([tokens], max_tokens=24, ignore_eos=True)
    assert completion.tokens == expected


def test_windows_and_yarn_matter(checkpoint: Callable[[str], tuple[Path, PreTrainedModel]]) -> None:
    """The references above would notice a window or a scaling that is ignored."""
    folder, model = checkpoint("mistral window below the prompt")
    tokens = random_tokens(model)
    with zoo.load(folder, device="cpu", dtype="float32", overrides={"model.layers.0.mixer.window": None}) as wrong:
        assert relative_error(wrong.logits(tokens), expected_logits(model, tokens)) > 100 * TOLERANCE
    folder, model = checkpoint("ministral3")
    unscaled = {"model.layers.0.mixer.query_scaling": None}
    with zoo.load(folder, device="cpu", dtype="float32", overrides=unscaled) as wrong:
        assert relative_error(wrong.logits(tokens), expected_logits(model, tokens)) > 100 * TOLERANCE
