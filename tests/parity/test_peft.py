"""zoo's adapters against PEFT's, on random adapters that PEFT writes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import zoo
from zoo.components import native
from zoo.components.native import panels
from zoo.engine.request import SamplingParams
from zoo.model import Model
from zoo.testing import relative_error

HAS_PANELS = native.missing() is None

TOLERANCE = 1e-4
"""Relative error of the logits in float32."""

EFFECT = 0.01
"""What an adapter must change at least, or nothing would be shown."""

TOKENS = [3, 17, 5, 99, 23, 42, 7, 64, 11, 58, 2, 77, 31]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EVERYWHERE = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]

SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 131,
    "max_position_embeddings": 64,
    "sliding_window": None,
    "tie_word_embeddings": False,
}

CASES: dict[str, dict[str, Any]] = {
    "every product": {"r": 4, "lora_alpha": 8, "target_modules": EVERYWHERE},
    "one part of a fused weight": {"r": 3, "lora_alpha": 5, "target_modules": ["k_proj", "up_proj"]},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ATTENTION},
    "ranks and alphas by module": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": EVERYWHERE,
        "rank_pattern": {"q_proj": 5, "layers.1.mlp.up_proj": 3},
        "alpha_pattern": {"v_proj": 1, r"layers\.0\..*down_proj": 7},
    },
    "some layers": {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "a pattern of names": {"r": 2, "lora_alpha": 6, "target_modules": r".*layers\.1.*(q|gate)_proj"},
}

Made = tuple[Path, dict[str, Path], dict[str, torch.Tensor], torch.Tensor]


def base_model() -> PreTrainedModel:
    torch.manual_seed(5)
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**SMALL)).float().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.1)
    return model


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits_TV: torch.Tensor = model(torch.tensor([TOKENS])).logits[0]
    return logits_TV.float()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The base's folder, and for each case the folder that PEFT saved and PEFT's logits; the base's logits."""
    folder = tmp_path_factory.mktemp("peft")
    base_model().save_pretrained(folder / "base")
    adapters: dict[str, Path] = {}
    expected: dict[str, torch.Tensor] = {}
    for seed, (case, settings) in enumerate(CASES.items()):
        model = peft.get_peft_model(base_model(), peft.LoraConfig(init_lora_weights=False, **settings)).eval()
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        adapters[case] = folder / case.replace(" ", "-")
        model.save_pretrained(str(adapters[case]))
        expected[case] = logits_of(model)
    return folder / "base", adapters, expected, logits_of(base_model())


@pytest.fixture
def base(made: Made) -> Iterator[Model]:
    with zoo.load(made[0], device="cpu", dtype="float32") as model:
        yield model


@pytest.mark.parametrize("case", CASES)
def test_unmerged_and_merged_equal_peft(case: str, made: Made) -> None:
    folder, adapters, expected, plain = made
    assert relative_error(expected[case], plain) > EFFECT
    with zoo.load(folder, device="cpu", dtype="float32", adapters=[adapters[case]]) as model:
        [name] = model.adapters
        assert relative_error(model.logits(TOKENS), expected[case]) < TOLERANCE
        assert relative_error(model.logits(TOKENS, adapter=None), plain) < TOLERANCE
        model.merge_adapter(name)
        assert model.adapters == []
        assert relative_error(model.logits(TOKENS), expected[case]) < TOLERANCE


def test_load_swap_and_unload(base: Model, made: Made) -> None:
    _, adapters, expected, _ = made
    plain = base.logits(TOKENS)
    first = base.load_adapter(adapters["every product"])
    second = base.load_adapter(adapters["rslora"], name="other")
    assert base.adapters == [first, second] == ["every-product", "other"]
    assert torch.equal(base.logits(TOKENS), plain), "an adapter that no request chose"
    assert relative_error(base.logits(TOKENS, adapter=first), expected["every product"]) < TOLERANCE
    assert relative_error(base.logits(TOKENS, adapter=second), expected["rslora"]) < TOLERANCE
    base.unload_adapter(first)
    assert relative_error(base.logits(TOKENS, adapter=second), expected["rslora"]) < TOLERANCE
    with pytest.raises(zoo.ZooError, match=r"no adapter of this name is loaded; found 'every-product'; .* other"):
        base.logits(TOKENS, adapter=first)
    base.unload_adapter(second)
    assert torch.equal(base.logits(TOKENS), plain)
    assert not any(module._forward_hooks for module in base.module.modules())


def test_merging_one_leaves_the_others(base: Model, made: Made) -> None:
    _, adapters, expected, _ = made
    base.load_adapter(adapters["every product"], name="a")
    base.load_adapter(adapters["rslora"], name="b")
    base.merge_adapter("a")
    assert relative_error(base.logits(TOKENS), expected["every product"]) < TOLERANCE
    base.load_adapter(adapters["every product"], name="a again")
    with pytest.raises(zoo.ZooError, match="merged into the weights, for all requests and for good"):
        base.merge_adapter("a")
    with pytest.raises(zoo.ZooError, match="merged into the weights"):
        base.unload_adapter("a")
    both = base.logits(TOKENS, adapter="b")
    base.merge_adapter("b")
    assert relative_error(base.logits(TOKENS), both) < TOLERANCE


def test_a_batch_of_different_adapters_equals_each_alone(base: Model, made: Made) -> None:
    _, adapters, _, _ = made
    base.load_adapter(adapters["every product"], name="a")
    base.load_adapter(adapters["rslora"], name="b")
    prompts = {"a": TOKENS, "b": TOKENS[:5], None: TOKENS[2:9]}
    options: dict[str, Any] = {"max_tokens": 9, "logprobs": 2, "prompt_logprobs": True}
    alone = [base.generate(prompt, adapter=name, **options)[0] for name, prompt in prompts.items()]
    requests = [base.request(prompt, SamplingParams(adapter=name, **options)) for name, prompt in prompts.items()]
    together = base.engine.generate(requests)
    assert [c.tokens for c in together] == [c.tokens for c in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert one.prompt_logprobs is not None
        assert other.prompt_logprobs is not None
        assert one.prompt_logprobs[1:] == pytest.approx(other.prompt_logprobs[1:], abs=1e-4)
    same = base.engine.generate([base.request(TOKENS, SamplingParams(adapter=n, **options)) for n in ("a", "b", None)])
    assert len({tuple(c.prompt_logprobs[1:]) for c in same if c.prompt_logprobs}) == 3


NATIVE = {"self_attn": "attention", "mlp": "feed_forward", "q_proj": "wq", "k_proj": "wk", "v_proj": "wv"}
NATIVE |= {"o_proj": "wo", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "base_model.model.model.": ""}


def as_native(folder: Path, file: Path) -> Path:
    """PEFT's adapter under Mistral's names: rows of B of q and k in interleaved pairs."""
    tensors = {}
    for name, value in load_file(folder / "adapter_model.safetensors").items():
        if name.endswith(("q_proj.lora_B.weight", "k_proj.lora_B.weight")):
            halves = value.unflatten(0, (-1, 2, SMALL["head_dim"] // 2))
            value = halves.transpose(1, 2).flatten(0, 2).contiguous()
        for theirs, ours in NATIVE.items():
            name = name.replace(theirs, ours)
        tensors[name] = value
    save_file(tensors, file)
    return file


@pytest.mark.parametrize("scaling", [None, 0.75])
def test_native_files_equal_peft(scaling: float | None, base: Model, made: Made, tmp_path: Path) -> None:
    _, adapters, expected, plain = made
    file = as_native(adapters["every product"], tmp_path / "lora.safetensors")
    if scaling is not None:
        (tmp_path / "params.json").write_text(json.dumps({"dim": 48, "lora": {"rank": 4, "scaling": scaling}}))
    assert base.load_adapter(file) == "lora"
    found = base.logits(TOKENS, adapter="lora")
    if scaling is None:
        assert base.notes[-1] == "adapter lora: matched 14/14, rank 4, scale 2 (Mistral's default)"
        assert relative_error(found, expected["every product"]) < TOLERANCE
    else:
        assert base.notes[-1] == "adapter lora: matched 14/14, rank 4, scale 0.75 (params.json)"
        assert relative_error(found, expected["every product"]) > EFFECT
        assert relative_error(found, plain) > EFFECT


def test_replaced_modules_take_effect_when_merged(base: Model, made: Made, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"], init_lora_weights=False
    )
    model = peft.get_peft_model(base_model(), config).eval()
    torch.manual_seed(11)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(tmp_path))
    base.load_adapter(tmp_path, name="full")
    assert base.notes[-1].startswith("adapter full: matched 4/4, rank 2, scale 4, 2 whole tensors")
    with pytest.raises(zoo.ZooError, match=r"replaces whole tensors.*embed\.weight.*Merge it first"):
        base.generate(TOKENS, adapter="full")
    base.merge_adapter("full")
    assert relative_error(base.logits(TOKENS), logits_of(model)) < TOLERANCE


ONEDNN = pytest.mark.skipif(not HAS_PANELS, reason="no native kernels")


@pytest.mark.parametrize("packing", [False, pytest.param(True, marks=ONEDNN)])
def test_adapters_of_low_precision(packing: bool, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not packing:
        monkeypatch.setattr(panels, "pays", lambda _: False)
    folder, adapters, expected, _ = made
    tensors = load_file(adapters["every product"] / "adapter_model.safetensors")
    config = (adapters["every product"] / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config)
    save_file({name: value.bfloat16() for name, value in tensors.items()}, tmp_path / "adapter_model.safetensors")
    with zoo.load(folder, device="cpu", dtype="float32", adapters=[tmp_path]) as model:
        assert relative_error(model.logits(TOKENS), expected["every product"]) < 0.02
    with zoo.load(folder, device="cpu", dtype="bfloat16", adapters=[tmp_path]) as model:
        unmerged = model.logits(TOKENS)
        model.merge_adapter(tmp_path.name)
        assert any(parameter.is_meta for parameter in model.module.parameters()) == packing
        assert relative_error(unmerged, expected["every product"]) < 0.1
        assert relative_error(model.logits(TOKENS), unmerged) < 0.1


def test_several_adapters_need_a_choice(made: Made) -> None:
    folder, adapters, expected, _ = made
    paths = [adapters["every product"], adapters["rslora"]]
    with zoo.load(folder, device="cpu", dtype="float32", adapters=paths) as model:
        with pytest.raises(zoo.ZooError, match=r"the request names none; expected one of every-product, rslora, or"):
            model.generate(TOKENS)
        assert relative_error(model.logits(TOKENS, adapter="rslora"), expected["rslora"]) < TOLERANCE


def test_adapters_in_use_stay(base: Model, made: Made) -> None:
    _, adapters, _, _ = made
    base.load_adapter(adapters["rslora"], name="a")
    stream = base.stream(TOKENS, adapter="a", max_tokens=8)
    next(stream)
    for act in (base.unload_adapter, base.merge_adapter):
        with pytest.raises(zoo.ZooError, match=r"1 (unfinished requests|of them)"):
            act("a")
    assert len([*stream]) > 1
    base.unload_adapter("a")
