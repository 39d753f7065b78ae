"""The whole engine on a CUDA device against the same on the CPU, in float32: small models of every mechanism.

Random weights follow from the seed and the name alone, so both devices have the same without a file.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from zoo.components.fused import KERNELS, wanted, works
from zoo.testing import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

VOCABULARY, TOLERANCE = 131, 1e-4
ROPE = {"theta": 1e4}
ATTENTION: dict[str, Any] = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "rope": ROPE}
LATENT: dict[str, Any] = {"kind": "latent_attention", "num_heads": 4, "q_lora_rank": 40, "kv_lora_rank": 48}
LATENT |= {"nope_head_dim": 16, "rope_head_dim": 8, "v_head_dim": 16, "rope": ROPE}
INDEXER: dict[str, Any] = {"kind": "lightning", "num_heads": 32, "head_dim": 16, "top_k": 20, "norm_eps": 1e-6}
READING = LATENT | {"indexer": INDEXER, "cache": {"kind": "shared", "layer": 0}}
GATED: dict[str, Any] = {"kind": "gated", "hidden_dim": 80}
MOE = {"kind": "moe", "num_experts": 8, "experts_per_token": 2, "expert": {"kind": "gated", "hidden_dim": 32}}
MAMBA2 = {"kind": "mamba2", "num_heads": 8, "head_dim": 8, "num_groups": 2, "state_size": 16, "conv_size": 4}
MAMBA1 = {"kind": "mamba1", "inner_dim": 64, "dt_rank": 4, "state_size": 8, "conv_size": 4}
LAYERS: dict[str, list[dict[str, Any]]] = {
    "dense": [{"repeat": 2, "mixer": ATTENTION, "ffn": GATED}],
    "mixture": [{"repeat": 2, "mixer": ATTENTION, "ffn": MOE}],
    "window": [{"mixer": ATTENTION | {"window": 24}, "ffn": GATED}, {"mixer": ATTENTION, "ffn": GATED}],
    "norms": [{"mixer": ATTENTION | {"qk_norm": {"kind": "rms", "eps": 1e-6}, "qkv_bias": True}, "ffn": GATED}],
    "softcap": [{"mixer": ATTENTION | {"softcap": 30.0}, "ffn": GATED}],
    "sinks": [{"mixer": ATTENTION | {"sinks": True} | window, "ffn": GATED} for window in ({"window": 24}, {})],
    "latent": [{"repeat": 2, "mixer": LATENT, "ffn": MOE}],
    "indexed": [{"mixer": LATENT | {"indexer": INDEXER}, "ffn": GATED}, {"mixer": READING, "ffn": GATED}],
    "mamba2": [{"repeat": 2, "mixer": MAMBA2 | {"norm_eps": 1e-5}, "ffn": None}],
    "mamba1": [{"repeat": 2, "mixer": MAMBA1, "ffn": None}],
    "hybrid": [{"mixer": MAMBA2 | {"norm_eps": 1e-5}, "ffn": GATED}, {"mixer": ATTENTION, "ffn": MOE}],
}
WAITING = [kind for kind, layers in LAYERS.items() if any(layer["ffn"] is MOE for layer in layers)]
"""Models whose step waits for the host, in float32: torch's grouped products do, but for bfloat16."""

ASK: dict[str, Any] = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True, "logprobs": 1}


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """Full float32 in products and convolutions."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def load(kind: str, device: str, **options: Any) -> zoo.Model:
    """The model with weights large enough that its tokens differ."""
    model = {"dim": 64, "vocab_size": VOCABULARY, "norm": {"kind": "rms", "eps": 1e-5}, "layers": LAYERS[kind]}
    card = {"name": "on-cuda", "context_length": 2048, "model": model}
    loaded = zoo.load(card, **{"weights": "random", "device": device, "dtype": "float32"} | options)
    if "weights" not in options:
        for parameter in loaded.module.parameters():
            if parameter.ndim > 1:
                parameter.data.mul_(8)
    return loaded


def prompts() -> list[list[int]]:
    return [random.Random(n).choices(range(VOCABULARY), k=n) for n in (1, 5, 24, 25, 63, 300, 700)]


@pytest.mark.parametrize("kind", LAYERS)
def test_logits_equal_the_cpus(kind: str) -> None:
    tokens = prompts()[-1]
    with load(kind, "cpu") as host:
        expected_TV = host.logits(tokens)
    with load(kind, "cuda") as device:
        assert relative_error(device.logits(tokens).cpu(), expected_TV) < TOLERANCE


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("capture", ["auto", "off"])
def test_generation_equals_the_cpus(kind: str, capture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, and their log-probabilities: of a batch of all lengths, and of one sequence after the other."""
    with load(kind, "cpu") as host:
        expected = host.generate(prompts(), **ASK)
    assert len({token for c in expected for token in c.tokens}) > 10, "the model must not be trivial"
    monkeypatch.setenv("ZOO_CAPTURE", capture)
    for batch in (1, 3, 64):
        with load(kind, "cuda", max_batch_size=batch) as device:
            found = device.generate(prompts(), **ASK)
            captured = device.engine._runner.captured  # type: ignore[union-attr]
            assert (captured is None) == (capture == "off")
            if kind not in WAITING:
                assert captured is None or captured._steps, "decode steps must have been replayed"
        assert [c.tokens for c in found] == [c.tokens for c in expected]
        for one, other in zip(found, expected, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", LAYERS)
def test_narrow_types_stay_near(kind: str, dtype: str) -> None:
    tokens = prompts()[-2]
    with load(kind, "cpu") as host:
        expected_TV = host.logits(tokens)
    with load(kind, "cuda", dtype=dtype) as device:
        found_TV = device.logits(tokens).cpu()
    # Of most logits: a router may choose otherwise for a few tokens, whose logits then differ altogether.
    off_T = (found_TV - expected_TV).abs().mean(-1) / expected_TV.abs().mean(-1)
    assert off_T.median() < 0.1


@pytest.mark.parametrize("kind", LAYERS)
def test_bfloat16_steps_are_replayed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And give what steps give that are launched one by one."""
    found = []
    for capture in ("auto", "off"):
        monkeypatch.setenv("ZOO_CAPTURE", capture)
        with load(kind, "cuda", dtype="bfloat16") as device:
            found.append(device.generate(prompts(), **ASK | {"max_tokens": 8}))
            captured = device.engine._runner.captured  # type: ignore[union-attr]
            assert captured is None or captured._steps, "decode steps must have been replayed"
    same = [one.tokens[:1] == other.tokens[:1] for one, other in zip(*found, strict=True)]
    assert all(same)


def test_files_are_read_to_the_device(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with load("mixture", "cpu") as host:
        save_file(dict(host.module.state_dict()), tmp_path / "model.safetensors")
        expected_TV = host.logits([1, 2, 3])
        names = set(host.module.state_dict())
    assert any("experts" in name for name in names)
    with load("mixture", "cuda", weights=_checkpoint_names(tmp_path)) as device:
        assert relative_error(device.logits([1, 2, 3]).cpu(), expected_TV) < TOLERANCE


def _checkpoint_names(folder: Path) -> Path:
    """The file's tensors under the names that zoo's own layout gives them."""
    from safetensors.torch import load_file, save_file

    from zoo.registry.card import Card
    from zoo.registry.resolve import resolve

    model = {"dim": 64, "vocab_size": VOCABULARY, "norm": {"kind": "rms", "eps": 1e-5}, "layers": LAYERS["mixture"]}
    spec = resolve(Card.from_dict({"name": "on-cuda", "context_length": 2048, "model": model})).model
    stored = load_file(folder / "model.safetensors")
    named = {t.name: stored[t.param][t.index].clone().contiguous() for t in spec.tensors()}
    (folder / "model.safetensors").unlink()
    save_file(named, folder / "model.safetensors")
    return folder


def test_sampling_does_not_depend_on_the_batch() -> None:
    ask = ASK | {"temperature": 0.9, "top_p": 0.9, "seed": 7}
    with load("hybrid", "cuda") as model:
        together = model.generate(prompts(), **ask)
        alone = [model.generate([prompt], **ask)[0] for prompt in prompts()]
    assert [c.tokens for c in together] == [c.tokens for c in alone]


def test_memory_comes_back() -> None:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        with load("dense", "cuda", dtype="bfloat16") as model:
            model.generate([[1, 2, 3]], **ASK)
    assert torch.cuda.memory_allocated() - before < 1 << 20


@pytest.mark.parametrize("kernel", ["reference", "sdpa"])
def test_kernels_agree(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with load("window", "cpu") as host:
        expected_TV = host.logits(prompts()[-1])
    monkeypatch.setenv("ZOO_ATTENTION", kernel)
    with load("window", "cuda") as device:
        assert relative_error(device.logits(prompts()[-1]).cpu(), expected_TV) < TOLERANCE


WIDE: dict[str, Any] = {"kind": "gated", "hidden_dim": 160}
CODED: dict[str, list[dict[str, Any]]] = {
    "dense": [{"repeat": 2, "mixer": ATTENTION, "ffn": WIDE}],
    "mixture": [{"mixer": ATTENTION, "ffn": MOE | {"expert": WIDE}}],
    "mamba2": [{"repeat": 2, "mixer": MAMBA2 | {"norm_eps": 1e-5}, "ffn": WIDE}],
}


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("fused", ["auto", "off"])
def test_quantised_weights_are_the_cpus(kind: str, quantize: str, fused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that are longer and shorter than the kernels' rows; the CPU's by the formula, without rounding rows.

    In four bits two scales of a group may leave the same error up to rounding, so that devices choose differently.
    """
    monkeypatch.setenv("ZOO_FUSED", fused)
    wanted.cache_clear()
    monkeypatch.setattr("zoo.components.quantised.is_native", lambda: False)
    monkeypatch.setitem(LAYERS, kind, CODED[kind])
    for tokens in (prompts()[-1], prompts()[-2], prompts()[1]):
        with load(kind, "cpu", quantize=quantize) as host, load(kind, "cuda", quantize=quantize) as device:
            found_TV, expected_TV = device.logits(tokens).cpu(), host.logits(tokens)
        assert relative_error(found_TV, expected_TV) < (TOLERANCE if quantize == "int8" else 1e-2)
    wanted.cache_clear()


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("kind", CODED)
def test_steps_with_quantised_weights_are_replayed(kind: str, quantize: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYERS, kind, CODED[kind])
    with load(kind, "cuda", quantize=quantize) as device:
        together = device.generate(prompts(), **ASK)
        captured = device.engine._runner.captured  # type: ignore[union-attr]
        assert captured is not None
        assert captured._steps, "decode steps must have been replayed"
    monkeypatch.setenv("ZOO_CAPTURE", "off")
    with load(kind, "cuda", quantize=quantize) as device:
        assert [c.tokens for c in device.generate(prompts(), **ASK)] == [c.tokens for c in together]


@pytest.mark.parametrize("cache_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("kind", ["dense", "window", "softcap", "sinks", "latent"])
def test_caches_of_codes_are_the_cpus(kind: str, cache_dtype: str) -> None:
    """Log-probabilities of what is decoded. A number near a border may get another code, and a token that nearly ties
    another place: so of the first tokens."""
    ask = ASK | {"max_tokens": 4}
    with load(kind, "cpu", cache_dtype=cache_dtype) as host, load(kind, "cuda", cache_dtype=cache_dtype) as device:
        expected, found = host.generate(prompts(), **ask), device.generate(prompts(), **ask)
    for one, other in zip(found, expected, strict=True):
        assert one.tokens[0] == other.tokens[0]
        if one.tokens == other.tokens:
            assert one.logprobs == pytest.approx(other.logprobs, abs=0.05)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_passes_its_check(kernel: str) -> None:
    assert works(torch.device("cuda"), kernel)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_gpu_than_the_first() -> None:
    with load("hybrid", "cuda:0") as first, load("hybrid", "cuda:1") as second:
        expected, found = (model.generate(prompts(), **ASK) for model in (first, second))
    assert [c.tokens for c in found] == [c.tokens for c in expected]
