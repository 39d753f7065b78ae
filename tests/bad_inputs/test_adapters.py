"""Adapters that do not belong to the model, are not whole, or are of a kind that is not read: each has its message."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import zoo
from zoo.model import Model

MIXER = {"kind": "attention", "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "rope": {"theta": 100.0}}
GATED = {"kind": "gated", "hidden_dim": 20}
MOE = {"kind": "moe", "num_experts": 2, "experts_per_token": 1, "expert": GATED}
CARD: dict[str, Any] = {
    "name": "little",
    "context_length": 64,
    "model": {
        "dim": 12,
        "vocab_size": 31,
        "norm": {"kind": "rms", "eps": 1e-5},
        "layers": [{"repeat": 2, "mixer": MIXER, "ffn": GATED}, {"mixer": MIXER, "ffn": MOE}],
    },
}

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "someone/base"}
Q = "base_model.model.model.layers.{}.self_attn.q_proj"

Shapes = dict[str, tuple[int, ...]]
Write = Callable[..., Path]


def pair(name: str, inputs: int = 12, outputs: int = 16, rank: int = 2) -> Shapes:
    return {f"{name}.lora_A.weight": (rank, inputs), f"{name}.lora_B.weight": (outputs, rank)}


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with zoo.load(CARD, weights="random", device="cpu", dtype="float32") as loaded:
        yield loaded


@pytest.fixture
def peft_folder(tmp_path: Path) -> Write:
    """Writes a PEFT folder: shapes of tensors, and what differs in the config."""

    def write(shapes: Shapes, **config: Any) -> Path:
        save_file({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
        return tmp_path

    return write


@pytest.fixture
def native_file(tmp_path: Path) -> Write:
    def write(shapes: Shapes) -> Path:
        save_file({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "lora.safetensors")
        return tmp_path / "lora.safetensors"

    return write


def message(model: Model, path: Path) -> str:
    """The one message, after which nothing is loaded."""
    with pytest.raises(zoo.ZooError) as caught:
        model.load_adapter(path)
    assert model.adapters == []
    return str(caught.value)


CASES: dict[str, tuple[Shapes, str]] = {
    "nothing matches": (
        pair("base_model.model.transformer.h.0.attn.c_attn"),
        r"the adapter matches nothing of this model; found .*c_attn.weight, which is no tensor of this model",
    ),
    "another prefix": (
        pair("base_model.model.language_tower.model.layers.0.self_attn.q_proj"),
        r"matches nothing of this model; found language_tower.*trained on 'someone/base': is this its base\?",
    ),
    "some match": (
        pair(Q.format(0)) | pair(Q.format(7)),
        r"does not fit the model: 1 of its 2 modules have no place; found .*layers\.7.*a tensor that the card has not",
    ),
    "another base's shapes": (
        pair(Q.format(0), 16, 24),
        r"q_proj: A \[2, 16\] and B \[24, 2\], the model needs A \[2, 12\] and B \[16, 2\]. It was trained on",
    ),
    "rank 0": (pair(Q.format(0), rank=0), r"the adapter of 'model\.layers\.0\.self_attn\.q_proj' has rank 0"),
    "another rank than its config": (pair(Q.format(0), rank=3), r"found 3; expected 2, by r and rank_pattern"),
    "half a pair": (
        {f"{Q.format(0)}.lora_A.weight": (2, 12)},
        r"half of an adapter: model\.layers\.0\.self_attn\.q_proj\.lora_B\.weight is missing",
    ),
    "factors that do not fit": (
        {f"{Q.format(0)}.lora_A.weight": (2, 12), f"{Q.format(0)}.lora_B.weight": (16, 3)},
        r"do not fit together; found A \[2, 12\] and B \[16, 3\]",
    ),
    "experts": (
        pair("base_model.model.model.layers.2.mlp.experts.0.gate_proj", 12, 20),
        r"layers\.2\.ffn\.experts\.0\.gate\.weight cannot be adapted, only products within a block can",
    ),
    "a router": (pair("base_model.model.model.layers.2.mlp.gate", 12, 2), r"layers\.2\.ffn\.router\.weight cannot be"),
    "the head": (pair("base_model.model.lm_head", 12, 31), r"head\.weight cannot be adapted"),
    "DoRA's tensors": (
        pair(Q.format(0)) | {f"{Q.format(0)}.lora_magnitude_vector": (16,)},
        r"q_proj\.lora_magnitude_vector: DoRA's magnitudes is not supported",
    ),
    "an embedding": (
        {"base_model.model.model.embed_tokens.lora_embedding_A": (2, 31)},
        r"embed_tokens\.lora_embedding_A: a low-rank change of an embedding is not supported",
    ),
    "twice": (
        pair(Q.format(0)) | pair("base_model.model.model.layers.0.self_attn.qkv_proj", outputs=32),
        r"layers\.0\.mixer\.q\.weight is changed twice",
    ),
    "a whole tensor of another shape": (
        pair(Q.format(0)) | {"base_model.model.lm_head.weight": (40, 12)},
        r"lm_head\.weight: \[40, 12\], the model needs \[31, 12\]",
    ),
    "empty": ({}, r"the adapter holds no tensors"),
}


@pytest.mark.parametrize("case", CASES)
def test_tensors(case: str, model: Model, peft_folder: Write) -> None:
    shapes, expected = CASES[case]
    assert re.search(expected, message(model, peft_folder(shapes)))


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"peft_type": "IA3"}, r"not a LoRA adapter; found peft_type 'IA3'"),
    "DoRA": ({"use_dora": True}, r"use_dora is not supported; found True"),
    "biases": ({"bias": "all"}, r"bias is not supported; found 'all'; expected 'none'"),
    "a bias of B": ({"lora_bias": True}, r"lora_bias is not supported"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, r"init_lora_weights is not supported; found 'pissa_niter_4'"),
    "expert parameters": ({"target_parameters": ["mlp.experts.down_proj"]}, r"target_parameters is not supported"),
    "tokens": ({"trainable_token_indices": [3]}, r"trainable_token_indices is not supported"),
    "a setting of next year": ({"use_xora": {"depth": 2}}, r"use_xora is not supported; found \{'depth': 2\}"),
    "no rank": ({"r": None}, r"the adapter's r is not understood; found None; expected a whole number"),
    "rank 0": ({"r": 0}, r"the adapter's r is not understood; found 0"),
    "no alpha": ({"lora_alpha": "16"}, r"the adapter's lora_alpha is not understood; found '16'"),
    "targets that are not there": (
        {"target_modules": ["q_proj", "o_proj"]},
        r"the adapter is not whole; found model\.layers\.0\.self_attn\.o_proj: named in target_modules, and not in the",
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(case: str, model: Model, peft_folder: Write) -> None:
    settings, expected = SETTINGS[case]
    assert re.search(expected, message(model, peft_folder(pair(Q.format(0)), **settings)))


def test_settings_that_do_nothing(model: Model, peft_folder: Write) -> None:
    inert = {"use_dora": False, "lora_bias": False, "lora_dropout": 0.1, "init_lora_weights": True, "use_qalora": False}
    folder = peft_folder(pair(Q.format(0)), **inert, target_parameters=None, exclude_modules=[], fan_in_fan_out=True)
    name = model.load_adapter(folder)
    model.unload_adapter(name)


def test_folders(model: Model, peft_folder: Write, tmp_path: Path) -> None:
    folder = peft_folder(pair(Q.format(0)))
    (folder / "adapter_config.json").unlink()
    for path in (folder, folder / "adapter_model.safetensors"):
        assert re.search("config is missing, and without it its scale cannot be known", message(model, path))
    (folder / "adapter_model.safetensors").unlink()
    (folder / "notes.txt").write_text("")
    assert "there is no adapter in this folder; found notes.txt; expected adapter_config" in message(model, folder)
    (folder / "adapter_config.json").write_text("{")
    assert "not valid JSON" in message(model, folder)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    assert "the adapter's weights are missing" in message(model, folder)
    assert "no such folder or file" in message(model, tmp_path / "nowhere")


def test_native_files(model: Model, native_file: Write) -> None:
    name = "layers.{}.attention.wq"
    assert "this is not an adapter" in message(model, native_file({"layers.0.attention.wq.weight": (16, 12)}))
    mixed = native_file(pair(name.format(0)) | {"norm.weight": (12,)})
    assert "it holds tensors that are no low-rank factors; found norm.weight" in message(model, mixed)
    assert "1 of its 2 modules have no place" in message(
        model, native_file(pair(name.format(0)) | pair(name.format(5)))
    )
    file = native_file(pair(name.format(0)))
    (file.parent / "params.json").write_text(json.dumps({"lora": {"scaling": "two"}}))
    assert "`lora` is not understood" in message(model, file)
    (file.parent / "params.json").write_text(json.dumps({"lora": None}))
    model.load_adapter(file)
    assert model.notes[-1].endswith("matched 1/1, rank 2, scale 2 (Mistral's default)")
    model.unload_adapter("lora")


def test_files_that_are_cut_off(model: Model, native_file: Write) -> None:
    file = native_file(pair("layers.0.attention.wq"))
    file.write_bytes(file.read_bytes()[:-8])
    assert "the file is cut off inside tensor" in message(model, file)


def test_names(model: Model, native_file: Write) -> None:
    file = native_file(pair("layers.0.attention.wq"))
    model.load_adapter(file, name="mine")
    for name in ("mine", "auto"):
        with pytest.raises(zoo.ZooError, match=f"this name of an adapter is taken; found '{name}'"):
            model.load_adapter(file, name=name)
    with pytest.raises(zoo.ZooError, match=r"no adapter of this name is loaded; found 'mien'; .* Did you mean 'mine'"):
        model.generate([1, 2], adapter="mien")
    with pytest.raises(zoo.ZooError, match="adapter: out of range; found 3; expected the name"):
        model.generate([1, 2], adapter=3)
    model.unload_adapter("mine")
    with pytest.raises(zoo.ZooError, match="expected no name: no adapter is loaded"):
        model.unload_adapter("mine")


def test_an_adapter_is_refused_before_weights_are_read(native_file: Write, tmp_path: Path) -> None:
    file = native_file(pair("layers.9.attention.wq"))
    with pytest.raises(zoo.ZooError, match="the adapter matches nothing of this model"):
        zoo.load(CARD, weights=tmp_path / "no weights here", device="cpu", dtype="float32", adapters=[file])


def test_an_adapter_of_another_base_is_told(native_file: Write, peft_folder: Write) -> None:
    card = {**CARD, "source": {"hub": "someone/other"}}
    folder = peft_folder(pair(Q.format(0)))
    with zoo.load(card, weights="random", device="cpu", dtype="float32", adapters=[folder]) as model:
        assert model.notes[-1].endswith("rank 2, scale 2; trained on someone/base, used on someone/other")


def test_a_closed_model_has_no_adapters(native_file: Write) -> None:
    loaded = zoo.load(CARD, weights="random", device="cpu", dtype="float32")
    loaded.close()
    with pytest.raises(zoo.ZooError, match="the model was closed"):
        loaded.load_adapter(native_file(pair("layers.0.attention.wq")))


MAMBA2 = {
    "kind": "mamba2",
    "num_heads": 3,
    "head_dim": 8,
    "num_groups": 1,
    "state_size": 4,
    "conv_size": 4,
    "norm_eps": 1e-5,
}


def test_names_are_read_by_the_table_that_means_the_model(native_file: Write) -> None:
    """zoo's own names of state-space layers: other tables know more of them than the short list that zoo goes by."""
    card = {**CARD, "model": {**CARD["model"], "layers": [{"repeat": 2, "mixer": MAMBA2, "ffn": None}]}}
    names = [f"layers.{i}.mixer.{part}" for i in range(2) for part in ("in_proj", "out_proj")]
    with zoo.load(card, weights="random", device="cpu", dtype="float32") as model:
        found = {name: model.module.get_parameter(f"{name}.weight").shape for name in names}
        factors = (pair(name, inputs, outputs) for name, (outputs, inputs) in found.items())
        before = model.logits([1, 2, 3])
        name = model.load_adapter(native_file({name: shape for some in factors for name, shape in some.items()}))
        assert not torch.equal(model.logits([1, 2, 3], adapter=name), before)
