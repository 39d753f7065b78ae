"""State-space models against transformers, in both layouts, through the engine, alone and among others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import zoo
from zoo.assemble import assemble
from zoo.engine.engine import Engine
from zoo.engine.request import Request, SamplingParams
from zoo.registry.card import Card
from zoo.registry.resolve import resolve
from zoo.testing import relative_error, step_through

TOLERANCE = 1e-4
"""Relative error of the logits in float32."""

LENGTH = 150
"""Tokens: more than two chunks of the scan, and no multiple of them."""

SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 97, "conv_kernel": 4}
HEADS: dict[str, Any] = {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 12}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2": ("Mamba2", HEADS),
    "mamba2 one group, tied": ("Mamba2", HEADS | {"n_groups": 1, "tie_word_embeddings": True}),
    "mamba2 biases": ("Mamba2", HEADS | {"use_bias": True, "use_conv_bias": False}),
    "mamba": ("Mamba", {"state_size": 5}),
    "mamba untied, biases": ("Mamba", {"tie_word_embeddings": False, "use_bias": True, "use_conv_bias": False}),
    "mamba three taps, another rank": ("Mamba", {"conv_kernel": 3, "time_step_rank": 7}),
    "falcon mamba": ("FalconMamba", {"state_size": 5, "mixer_rms_eps": 1e-2}),
}

Checkpoint = Callable[[str], tuple[Path, PreTrainedModel]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Makes, once per case, a folder that transformers saved and the model that it saved."""
    made: dict[str, tuple[Path, PreTrainedModel]] = {}

    def make(case: str) -> tuple[Path, PreTrainedModel]:
        if case not in made:
            name, changes = CASES[case]
            config = getattr(transformers, f"{name}Config")(**{**SMALL, **changes})
            torch.manual_seed(len(made))
            made[case] = save(getattr(transformers, f"{name}ForCausalLM")(config), tmp_path_factory.mktemp("it"))
        return made[case]

    return make


def save(model: PreTrainedModel, folder: Path) -> tuple[Path, PreTrainedModel]:
    """Decays and steps as drawn by the class, from slow to fast; all else from a normal distribution."""
    for name, parameter in model.named_parameters():
        if not name.endswith(("A_log", "dt_bias", "dt_proj.bias")):
            torch.nn.init.normal_(parameter, mean=1.0 if name.endswith((".D", "norm.weight")) else 0.0, std=0.2)
    model = model.float().eval()
    model.save_pretrained(folder)
    return folder, model


def random_tokens(length: int = LENGTH, seed: int = 7) -> list[int]:
    return torch.randint(97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def expected_logits(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits_TV: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits_TV


@pytest.mark.parametrize("case", CASES)
def test_logits_equal(case: str, checkpoint: Checkpoint) -> None:
    folder, model = checkpoint(case)
    tokens = random_tokens()
    expected = expected_logits(model, tokens)
    assert expected.argmax(-1).unique().numel() > 20, "the model must not be trivial"
    with zoo.load(folder, device="cpu", dtype="float32") as ours:
        assert relative_error(ours.logits(tokens), expected) < TOLERANCE
        for chunk in (70, 7, 1):
            [found] = step_through(ours.module, [tokens], chunk)
            assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize("case", ["mamba2", "mamba", "falcon mamba"])
def test_greedy_tokens_equal(case: str, checkpoint: Checkpoint) -> None:
    folder, model = checkpoint(case)
    tokens = random_tokens(20)
    with torch.inference_mode():
        expected = model.generate(
            torch.tensor([tokens]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(tokens) :].tolist()
    with zoo.load(folder, device="cpu", dtype="float32") as ours:
        [completion] = ours.generate([tokens], max_tokens=24, ignore_eos=True)
        streamed = [t for chunk in ours.stream(tokens, max_tokens=24, ignore_eos=True) for t in chunk.tokens]
    assert len(set(expected)) > 5
    assert completion.tokens == streamed == expected


def test_state_matters(checkpoint: Checkpoint) -> None:
    """The references above would notice a state that is forgotten between chunks, or a convolution's."""
    _, model = checkpoint("mamba2")
    tokens = random_tokens()
    expected = expected_logits(model, tokens)
    last = [expected_logits(model, tokens[100 - seen :])[-1] for seen in (0, 3)]
    assert min(relative_error(logits, expected[-1]) for logits in last) > 10 * TOLERANCE


# --- native files ---------------------------------------------------------------------------------------------------

PARAMS: dict[str, Any] = {
    "model_type": "mamba",
    "dim": 64,
    "n_layers": 2,
    "vocab_size": 97,
    "n_groups": 1,
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 1,
    "tie_embeddings": False,
}


@pytest.mark.parametrize("embedding", ["embedding", "embeddings"])
def test_native_folder_gives_the_same_logits(embedding: str, tmp_path: Path) -> None:
    """The sizes that params.json leaves out: heads of 64, twice the model's size, a state of 128, four taps."""
    torch.manual_seed(0)
    config = transformers.Mamba2Config(
        hidden_size=64, num_hidden_layers=2, vocab_size=97, num_heads=2, n_groups=1, state_size=128
    )
    folder, model = save(transformers.Mamba2ForCausalLM(config), tmp_path / "huggingface")
    native = tmp_path / "native"
    native.mkdir()
    tensors = load_file(folder / "model.safetensors")
    renamed = {f"model.{name.replace('embeddings.', f'{embedding}.')}": value for name, value in tensors.items()}
    save_file(renamed, native / "consolidated.safetensors")
    (native / "params.json").write_text(json.dumps(PARAMS), encoding="utf-8")
    tokens = random_tokens(40)
    with (
        zoo.load(native, device="cpu", dtype="float32") as ours,
        zoo.load(folder, device="cpu", dtype="float32") as theirs,
    ):
        assert torch.equal(ours.logits(tokens), theirs.logits(tokens))
        assert relative_error(ours.logits(tokens), expected_logits(model, tokens)) < TOLERANCE
        [completion] = ours.generate([tokens], max_tokens=3, ignore_eos=True)
        assert completion.usage.completion_tokens == 3


# --- the engine -----------------------------------------------------------------------------------------------------

MAMBA2: dict[str, Any] = {
    "kind": "mamba2",
    "num_heads": 4,
    "head_dim": 8,
    "num_groups": 2,
    "state_size": 6,
    "conv_size": 4,
    "norm_eps": 1e-5,
}
MAMBA1: dict[str, Any] = {"kind": "mamba1", "inner_dim": 32, "state_size": 6, "dt_rank": 3, "conv_size": 4}
ATTENTION: dict[str, Any] = {"kind": "attention", "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "rope": None}
GATED = {"kind": "gated", "hidden_dim": 24}
MIXERS = {"mamba2": [MAMBA2], "mamba1": [MAMBA1], "hybrid": [MAMBA2, ATTENTION | {"window": 9}, ATTENTION, MAMBA1]}


def engine(mixers: list[dict[str, Any]], contexts: int | None = None, **sizes: Any) -> Engine:
    """contexts: how many whole contexts fit in its cache."""
    layers = [{"pattern": [{"mixer": mixer, "ffn": GATED if mixer is ATTENTION else None} for mixer in mixers]}]
    model = {"dim": 16, "vocab_size": 97, "norm": {"kind": "rms", "eps": 1e-5}, "layers": layers}
    plan = resolve(Card.from_dict({"name": "recurrent", "context_length": 120, "model": model}))
    module = assemble(plan, torch.float32).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    budget = None if contexts is None else contexts * Engine(module, plan, **sizes)._memory.cost(120)
    return Engine(module, plan, memory_bytes=budget, **sizes)


def requests(prompts: list[list[int]]) -> list[Request]:
    return [Request(prompt, SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)) for prompt in prompts]


@pytest.mark.parametrize("storage", ["slab", "pages"])
@pytest.mark.parametrize("mixers", MIXERS)
def test_batches_and_chunks_change_nothing(mixers: str, storage: Any) -> None:
    prompts = [random_tokens(length, length) for length in (1, 2, 17, 70, 5, 33)]
    expected = [engine(MIXERS[mixers], chunk_tokens=128).generate([one])[0].tokens for one in requests(prompts)]
    assert len({token for tokens in expected for token in tokens}) > 20, "the model must not be trivial"
    for sizes in ({"chunk_tokens": 11}, {"chunk_tokens": 64, "max_batch_size": 2}, {"contexts": 2, "chunk_tokens": 16}):
        crowded = engine(MIXERS[mixers], storage=storage, **sizes)
        assert [one.tokens for one in crowded.generate(requests(prompts))] == expected
        assert crowded.memory["cache_used"] == 0


def test_hybrids_are_preempted_and_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention's part of the cache runs out while others wait: who is thrown out begins its state anew."""
    prompts = [random_tokens(60, seed) for seed in range(5)]
    expected = [engine(MIXERS["hybrid"]).generate([one])[0].tokens for one in requests(prompts)]
    monkeypatch.setattr("zoo.components.cache.slab.STEP", 16)
    tight = engine(MIXERS["hybrid"], contexts=2, storage="slab")
    assert [one.tokens for one in tight.generate(requests(prompts))] == expected
    assert tight._scheduler.preemptions > 0


@pytest.mark.parametrize("mixers", ["mamba2", "mamba1"])
def test_cache_does_not_grow(mixers: str) -> None:
    one = engine(MIXERS[mixers])
    costs = {one._memory.cost(tokens) for tokens in (1, 100, 120)}
    assert len(costs) == 1
    [tokens] = one.generate(requests([random_tokens(60)]))
    assert one.memory["cache_peak"] in costs
    assert len(tokens.tokens) == 20
