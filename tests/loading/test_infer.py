"""Cards from params.json and config.json: every spelling, and what is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo.loading.files import locate
from zoo.loading.infer import infer_card
from zoo.loading.infer.architecture import runs
from zoo.loading.layouts import layout_named
from zoo.loading.mapping import compare
from zoo.registry.card import Card
from zoo.registry.errors import CardError, WeightsError
from zoo.registry.resolve import Plan, resolve

Write = Callable[..., Path]
Plans = Callable[..., Plan]
Names = Callable[[Plan], dict[str, tuple[int, ...]]]

PARAMS = {
    "dim": 64,
    "n_layers": 4,
    "head_dim": 24,
    "hidden_dim": 40,
    "n_heads": 4,
    "n_kv_heads": 1,
    "norm_eps": 1e-5,
    "vocab_size": 509,
    "rope_theta": 1e6,
}
CONFIG = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 509,
    "max_position_embeddings": 2048,
    "sliding_window": None,
}
ROPE = {"rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 = {**ROPE, "rope_type": "llama3", "original_max_position_embeddings": 1024}
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 1,
    "vocab_size": 509,
    "max_position_embeddings": 2048,
}

# transformers' class, its settings, and what the card's attention must say.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mistral": ("Mistral", {"head_dim": 12, "sliding_window": 7}, {"head_dim": 12, "window": 7}),
    "mistral tied": (
        "Mistral",
        {"head_dim": None, "tie_word_embeddings": True, "sliding_window": None},
        {"head_dim": 8},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 3, "num_key_value_heads": 3}, {"num_kv_heads": 3, "head_dim": 8}),
    "ministral": (
        "Ministral",
        {"head_dim": 10, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"] * 2},
        {"head_dim": 10},
    ),
    "ministral3": (
        "Ministral3",
        {"head_dim": 16},
        {
            "rope": {
                "kind": "yarn",
                "theta": 1e6,
                "factor": 16.0,
                "original_context": 16384,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "attention_factor": 1.0,
            },
            "query_scaling": {"beta": 0.1, "original_context": 16384},
        },
    ),
    "llama": (
        "Llama",
        {"head_dim": 14, "rope_parameters": LLAMA3, "attention_bias": True},
        {
            "rope": {
                "kind": "llama3",
                "theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_context": 1024,
            },
            "qkv_bias": True,
            "o_bias": True,
        },
    ),
    "qwen2": ("Qwen2", {}, {"qkv_bias": True, "head_dim": 8}),
    "qwen3": ("Qwen3", {"head_dim": 10}, {"qk_norm": {"kind": "rms", "eps": 1e-6}, "head_dim": 10}),
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny random models as transformers saves them, one folder each."""
    import transformers

    root = tmp_path_factory.mktemp("transformers")
    for name, (kind, settings, _) in MODELS.items():
        config = getattr(transformers, f"{kind}Config")(**{**SIZES, **settings})
        torch.manual_seed(0)
        getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(root / name)
    return root


def folder_with(folder: Path, name: str, values: Any) -> Path:
    (folder / name).write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return folder


def params(folder: Path, **changes: Any) -> dict[str, Any]:
    values = {key: value for key, value in {**PARAMS, **changes}.items() if value is not ...}
    return infer_card(folder_with(folder, "params.json", values))


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    values = {key: value for key, value in {**CONFIG, **changes}.items() if value is not ...}
    return infer_card(folder_with(folder, "config.json", values))


def first(card: dict[str, Any]) -> dict[str, Any]:
    layer = card["model"]["layers"][0]
    mixer: dict[str, Any] = layer.get("pattern", [layer])[0]["mixer"]
    return mixer


def refused(infer: Callable[..., Any], folder: Path, **changes: Any) -> str:
    with pytest.raises(CardError) as caught:
        infer(folder, **changes)
    return str(caught.value)


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_saves_infers_to_a_card_that_closes(saved: Path, name: str) -> None:
    card = infer_card(saved / name)
    plan = resolve(Card.from_dict(card))
    files = locate(saved / name)
    assert compare(plan.model, layout_named(files.layout), files.headers).problems == []
    assert files.layout == "huggingface"
    mixer = first(card)
    for field, value in MODELS[name][2].items():
        assert mixer[field] == value, field
    assert card["name"] == name.replace(" ", "-")
    assert card["context_length"] == 2048
    assert card["source"]["dtype"] == "float32"
    assert card["model"]["tied_embeddings"] == (name == "mistral tied")


def test_layer_types_become_a_pattern(saved: Path) -> None:
    (run,) = infer_card(saved / "ministral")["model"]["layers"]
    assert run["repeat"] == 2
    assert [layer["mixer"].get("window") for layer in run["pattern"]] == [None, 5]


def test_windows_of_the_later_layers(tmp_path: Path) -> None:
    windows = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3}
    card = config(tmp_path, model_type="qwen2", **windows)
    assert [(run["repeat"], run["mixer"].get("window")) for run in card["model"]["layers"]] == [(3, None), (1, 8)]
    card = config(tmp_path, model_type="qwen2", **{**windows, "use_sliding_window": False})
    assert [(run["repeat"], run["mixer"].get("window")) for run in card["model"]["layers"]] == [(4, None)]


def test_attention_factor_of_yarn_is_that_of_transformers(saved: Path) -> None:
    from transformers import Ministral3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for change in ({}, {"mscale": 0.7}, {"mscale_all_dim": None}, {"attention_factor": 0.5}, {"factor": 1.0}):
        values = json.loads((saved / "ministral3" / "config.json").read_text())
        values["rope_parameters"] = {**values["rope_parameters"], **change}
        folder = saved / f"ministral3 {len(list(saved.iterdir()))}"
        folder.mkdir()
        rope = first(infer_card(folder_with(folder, "config.json", values)))["rope"]
        theirs = ROPE_INIT_FUNCTIONS["yarn"](Ministral3Config.from_pretrained(folder), "cpu")[1]
        ours = rope["attention_factor"] if "attention_factor" in rope else 0.1 * log(rope["factor"]) + 1
        assert ours == pytest.approx(theirs), change


@pytest.mark.parametrize("dtype", ["dtype", "torch_dtype"])
def test_old_and_new_spellings_mean_the_same(tmp_path: Path, dtype: str) -> None:
    old = {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}, dtype: "float16"}
    new = {"rope_parameters": LLAMA3, "dtype": "float16"}
    found = [config(tmp_path, model_type="llama", sliding_window=..., **spelling) for spelling in (old, new)]
    assert found[0] == found[1]
    assert found[0]["source"]["dtype"] == "float16"
    assert first(found[0])["rope"]["theta"] == 5e5


def test_defaults_of_transformers(tmp_path: Path) -> None:
    import transformers

    shared = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    kinds = ["Mistral", "Mixtral", "Ministral", "Ministral3", "Llama", "Qwen2", "Qwen3", "Olmo2", "Olmo3", "Phi3"]
    for kind in (*kinds, "Granite", "Gemma2", "Gemma3Text", "SmolLM3", "Glm4"):
        full = getattr(transformers, f"{kind}Config")(**shared).to_dict()
        needed = {"num_key_value_heads", "num_local_experts", "num_experts_per_tok"} & set(full)
        least = {**shared, **{key: full[key] for key in needed}, "model_type": full["model_type"]}
        found = infer_card(folder_with(tmp_path, "config.json", least))
        assert found == infer_card(folder_with(tmp_path, "config.json", full)), kind


def test_old_spellings_of_ropes_by_layer(tmp_path: Path) -> None:
    """As the files on the hub have them: a theta of its own for layers with a window, a stretch for the others."""
    gemma = {"model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 7}
    gemma |= {"sliding_window_pattern": 2, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "query_pre_attn_scalar": 64}
    gemma |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "head_dim": 16, "num_hidden_layers": 2}
    local, full = (layer["mixer"] for layer in config(tmp_path, **gemma)["model"]["layers"])
    assert (local["window"], local["rope"], local["scale"]) == (7, {"theta": 1e4}, 0.125)
    assert "window" not in full
    assert full["rope"] == {"kind": "linear", "theta": 1e6, "factor": 8.0}


def test_layers_without_positions(tmp_path: Path) -> None:
    listed = {"model_type": "smollm3", "no_rope_layers": [1, 0, 0, 1], "rope_theta": 5e6, "sliding_window": ...}
    card = config(tmp_path, **listed)
    layers = [run["mixer"]["rope"] for run in card["model"]["layers"] for _ in range(run["repeat"])]
    assert layers == [{"theta": 5e6}, None, None, {"theta": 5e6}]


def test_longrope(tmp_path: Path) -> None:
    rows = {"short_factor": [1.0] * 8, "long_factor": [2] * 8}
    settings = {"model_type": "phi3", "rope_scaling": {"type": "su", **rows}, "original_max_position_embeddings": 128}
    rope = first(config(tmp_path, **settings))["rope"]
    assert rope["attention_factor"] == pytest.approx((1 + log(16) / log(128)) ** 0.5)
    assert (rope["kind"], rope["original_context"], rope["long_factor"]) == ("longrope", 128, [2.0] * 8)


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"sliding_window": 4096}, "window", 4096),
        ({"sliding_window": "4096"}, "window", 4096),
        ({"_sliding_window": 4096}, "window", 4096),
        ({"sliding_window": None}, "window", None),
        ({"sliding_window": [None]}, "window", None),
        ({"rope_theta": 1e8}, "rope", {"theta": 1e8}),
        ({"rope_theta": ...}, "rope", {"theta": 1e6}),
        ({"rope_theta": ..., "sliding_window": 4096}, "rope", {"theta": 1e4}),
        ({"head_dim": 128}, "head_dim", 128),
    ],
)
def test_params(tmp_path: Path, change: dict[str, Any], field: str, value: Any) -> None:
    card = params(tmp_path, **change)
    assert first(card).get(field) == value
    resolve(Card.from_dict(card))


def test_params_with_a_list_of_windows(tmp_path: Path) -> None:
    (run,) = params(tmp_path, sliding_window=[None, 8, 8, 8], n_layers=12)["model"]["layers"]
    assert run["repeat"] == 3
    assert [layer["mixer"].get("window") for layer in run["pattern"]] == [None, 8, 8, 8]
    message = refused(params, tmp_path, sliding_window=[None, 8, 8], n_layers=4)
    assert "sliding_window has a value that zoo does not read; found [null, 8, 8]" in message
    assert "expected a list whose length divides 4 layers" in message


def test_params_of_a_mixture_and_of_a_long_context(tmp_path: Path) -> None:
    yarn = {"factor": 64, "original_max_position_embeddings": 4096, "beta": 4, "alpha": 1, "apply_scale": True}
    scaling = {"original_max_position_embeddings": 4096, "beta": 0.1}
    moe = {"num_experts": 8, "num_experts_per_tok": 2, "expert_parallel": 1}
    card = params(tmp_path, moe=moe, yarn=yarn, llama_4_scaling=scaling, tied_embeddings=True)
    (run,) = card["model"]["layers"]
    assert run["ffn"] == {
        "kind": "moe",
        "num_experts": 8,
        "experts_per_token": 2,
        "expert": {"kind": "gated", "hidden_dim": 40},
    }
    rope = {"kind": "yarn", "theta": 1e6, "factor": 64.0, "original_context": 4096, "beta_fast": 4.0, "beta_slow": 1.0}
    assert run["mixer"]["rope"] == rope
    assert run["mixer"]["query_scaling"] == {"beta": 0.1, "original_context": 4096}
    assert card["model"]["tied_embeddings"] is True
    assert card["context_length"] == 64 * 4096
    resolve(Card.from_dict(card))
    flat = params(tmp_path, yarn={**yarn, "apply_scale": False})
    assert first(flat)["rope"] == {**rope, "attention_factor": 1.0}


def test_params_of_the_first_mixtral_release(tmp_path: Path) -> None:
    values = {key: value for key, value in CONFIG.items() if key not in ("model_type", "architectures")}
    values |= {"num_local_experts": 3, "num_experts_per_tok": 2, "rope_theta": 1e6}
    card = infer_card(folder_with(tmp_path, "params.json", values))
    assert card["model"]["layers"][0]["ffn"]["kind"] == "moe"
    assert card["family"] == "mistral"


@pytest.mark.parametrize(
    ("change", "beside", "context", "assumed"),
    [
        ({}, None, 32768, True),
        ({}, {"max_position_embeddings": 8192}, 8192, False),
        ({"max_position_embeddings": 4096}, {"max_position_embeddings": 8192}, 4096, False),
        ({"max_position_embeddings": 4096, "max_seq_len": 1024}, None, 1024, False),
    ],
)
def test_context_length(
    tmp_path: Path, change: dict[str, Any], beside: dict[str, Any] | None, context: int, assumed: bool
) -> None:
    if beside:
        folder_with(tmp_path, "config.json", beside)
    card = params(tmp_path, **change)
    assert card["context_length"] == context
    assert ("context_length is not stated there and 32768 is assumed" in card["summary"]) == assumed
    assert card["summary"].startswith("Inferred from params.json")


def test_a_tie_is_believed_only_without_a_head(
    tmp_path: Path, save: Write, plan_of: Plans, native_names: Names
) -> None:
    shapes = native_names(plan_of(tied_embeddings=True))
    save(tmp_path / "consolidated.safetensors", shapes)
    assert params(tmp_path, n_layers=2, tied_embeddings=True)["model"]["tied_embeddings"] is True
    save(tmp_path / "consolidated.safetensors", {**shapes, "output.weight": (509, 64)})
    assert params(tmp_path, n_layers=2, tied_embeddings=True)["model"]["tied_embeddings"] is False


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bfloat16"), (torch.float16, "float16")])
def test_type_by_the_weights(
    tmp_path: Path, save: Write, plan_of: Plans, native_names: Names, dtype: torch.dtype, name: str
) -> None:
    file = save(tmp_path / "w.safetensors", native_names(plan_of()), dtype)
    assert params(tmp_path, n_layers=2)["source"]["dtype"] == name
    assert infer_card(file) == params(tmp_path, n_layers=2)
    assert params(tmp_path, n_layers=2, dtype="float32")["source"]["dtype"] == "float32"


def test_mistral_params_over_tensors_named_by_hugging_face(tmp_path: Path, saved: Path) -> None:
    values = json.loads((saved / "mistral" / "config.json").read_text())
    ours = {
        "dim": 48,
        "n_layers": 4,
        "head_dim": 12,
        "hidden_dim": 40,
        "n_heads": 6,
        "n_kv_heads": 1,
        "norm_eps": values["rms_norm_eps"],
        "vocab_size": 509,
    }
    folder_with(tmp_path, "params.json", ours)
    (tmp_path / "consolidated.safetensors").write_bytes((saved / "mistral" / "model.safetensors").read_bytes())
    plan = resolve(Card.from_dict(infer_card(tmp_path)))
    files = locate(tmp_path)
    assert files.layout == "huggingface"
    assert compare(plan.model, layout_named(files.layout), files.headers).problems == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layers": ...}, "params.json: the key 'n_layers' is missing"),
        ({"n_kv_heads": ...}, "the key 'n_kv_heads' is missing. Did you mean 'n_heads'?"),
        ({"head_dim": ...}, "the key 'head_dim' is missing"),
        ({"dim": "64"}, 'dim has a value that zoo does not read; found "64"; expected a positive whole number'),
        ({"n_heads": 0}, "n_heads has a value that zoo does not read; found 0"),
        ({"n_heads": True}, "n_heads has a value that zoo does not read; found true"),
        ({"norm_eps": "small"}, 'norm_eps has a value that zoo does not read; found "small"; expected a number'),
        ({"tied_embeddings": 1}, "tied_embeddings has a value that zoo does not read; found 1; expected true or false"),
        (
            {"sliding_window": 0},
            "sliding_window has a value that zoo does not read; found 0; expected a positive number",
        ),
        ({"sliding_window": [0]}, "sliding_window has a value that zoo does not read; found 0"),
        ({"sliding_window": []}, "found []; expected a list whose length divides 4 layers"),
        ({"sliding_window": "wide"}, 'found "wide"'),
        ({"sliding_window": 8, "_sliding_window": 16}, "keys of one meaning disagree; found sliding_window: 8, _slid"),
        ({"use_biases": True}, "use_biases has a value that zoo does not read; found true; expected false"),
        ({"causal": False}, "causal has a value that zoo does not read; found false; expected true"),
        ({"activation": "relu"}, 'activation has a value that zoo does not read; found "relu"; expected one of silu'),
        ({"dtype": "int8"}, 'dtype has a value that zoo does not read; found "int8"; expected float32'),
        ({"rope_tetha": 3}, "1 key that zoo does not know; found rope_tetha: 3. Did you mean 'rope_theta'?"),
        ({"yarn": {"factor": 2}}, "the key 'yarn.original_max_position_embeddings' is missing"),
        ({"moe": {"num_experts": 8}}, "the key 'moe.num_experts_per_tok' is missing"),
        (
            {"moe": {"num_experts": 8, "num_experts_per_tok": 2, "route_every_n": 2}},
            "moe.route_every_n has a value that zoo does not read; found 2; expected 1",
        ),
        (
            {"vision_encoder": {"hidden_size": 8}},
            "the key 'vision_encoder.image_token_id' is missing",
        ),
        (
            {"quantization": {"qformat_weight": "int8"}},
            "weights quantised by 'int8' are not read yet; found the key 'quantization'; expected one of fp8_e4m3, fp8",
        ),
        (
            {"quantization": {"bits": 4, "group_size": 64}},
            "weights quantised by an unnamed method are not read yet; found the key 'quantization'",
        ),
        (
            {"quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "CHANNEL"}},
            'quantization.qscheme_act has a value that zoo does not read; found "CHANNEL"; expected "TENSOR" or "NO_SC',
        ),
        (
            {"quantization": {"qformat_weight": "fp8_e4m3", "rotation": "hadamard"}},
            "1 key that zoo does not know; found quantization.rotation",
        ),
        ({"kv_lora_rank": 512}, "the key 'qk_nope_head_dim' is missing"),
        ({"model_type": "rwkv"}, "architecture 'rwkv' is not supported yet; expected model_type transformer"),
    ],
)
def test_params_that_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    assert message in refused(params, tmp_path, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistrall"}, "architecture 'mistrall' is not supported yet; expected model_type mistral, mix"),
        ({"model_type": "gemma"}, "architecture 'gemma' is not supported yet"),
        ({"model_type": ...}, "config.json: the key 'model_type' is missing; expected one of mistral, mixtral"),
        ({"num_attention_heads": 5}, "num_attention_heads has a value that zoo does not read; found 5; expected a div"),
        ({"attention_bias": True}, "attention_bias has a value that zoo does not read; found true; expected false"),
        ({"hidden_act": "relu"}, 'hidden_act has a value that zoo does not read; found "relu"'),
        ({"layer_types": ["full_attention"] * 4}, "1 key that zoo does not know; found layer_types: ["),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "weights quantised by 'gptq' are not read yet; found the key 'quantization_config'; expected one of",
        ),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
            "quantization_config.weight_block_size has a value that zoo does not read; found [64, 64]; expected [128",
        ),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
            'quantization_config.format has a value that zoo does not read; found "pack-quantized"; expected "float',
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_scaling.rope_type has a value that zoo does not re",
        ),
        ({"rope_scaling": {"type": "linear"}}, "the key 'rope_scaling.factor' is missing"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
            "1 key that zoo does not know; found rope_param",
        ),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e5}}, "rope_theta has a value that zoo does not read"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "fctor": 3}},
            "found rope_parameters.fctor: 3. Did",
        ),
        (
            {"model_type": "ministral", "layer_types": ["full_attention"] * 3},
            "layer_types has a value that zoo does not read; found [",
        ),
        (
            {"model_type": "ministral", "layer_types": ["sliding_attention"] * 4},
            'layer_types has a value that zoo does not read; found "sliding_attention"; expected full_attention, or',
        ),
        (
            {"model_type": "ministral", "layer_types": ["full_attention"] * 3 + ["linear_attention"]},
            'layer_types has a value that zoo does not read; found "linear_attention"',
        ),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    assert message in refused(config, tmp_path, **change)


def test_nearest_architecture(tmp_path: Path) -> None:
    assert "Did you mean 'mistral'" in refused(config, tmp_path, model_type="mistrall")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"dim": 64,\n "n_layers": }', "params.json:2: not valid JSON; found Expecting value"),
        ("", "params.json: the file is empty"),
        ("[]", "params.json: not a JSON object; found a list"),
    ],
)
def test_broken_params(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CardError) as caught:
        infer_card(folder_with(tmp_path, "params.json", text))
    assert message in str(caught.value)


def test_binary_params(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CardError, match=r"params\.json: not a JSON file"):
        infer_card(tmp_path)


def test_folders_without_settings(tmp_path: Path, save: Write) -> None:
    with pytest.raises(
        CardError, match=r"no settings to infer a card from; found an empty folder; expected params\.json"
    ):
        infer_card(tmp_path)
    save(tmp_path / "consolidated.safetensors", {"norm.weight": (4,)})
    with pytest.raises(
        CardError, match=r"found consolidated\.safetensors; expected params\.json or config\.json\. Or name"
    ):
        infer_card(tmp_path)
    with pytest.raises(WeightsError, match="no such folder or file"):
        infer_card(tmp_path / "nowhere")


def test_broken_weights_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "consolidated.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\nsize 5\n")
    with pytest.raises(WeightsError, match="Git-LFS pointer"):
        params(tmp_path)


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({}, {"features": []}),
        ({"tekken.json": "{}"}, {"tokenizer": {"kind": "mistral"}, "chat": "mistral", "features": ["chat"]}),
        ({"tokenizer.model.v3": ""}, {"tokenizer": {"kind": "mistral"}, "chat": "mistral", "features": ["chat"]}),
        ({"tokenizer.model": ""}, {"tokenizer": {"kind": "mistral"}, "chat": "mistral", "features": ["chat"]}),
        (
            {"tekken.json": "{}", "tokenizer_config.json": "{}"},
            {"tokenizer": {"kind": "mistral"}, "chat": "none", "features": []},
        ),
        ({"tokenizer.json": "{}"}, {"tokenizer": {"kind": "huggingface"}, "chat": "none", "features": []}),
        (
            {"tokenizer.json": "{}", "tokenizer_config.json": '{"chat_template": "{{ messages }}"}'},
            {"tokenizer": {"kind": "huggingface"}, "chat": "template", "features": ["chat"]},
        ),
        (
            {"tokenizer.json": "{}", "chat_template.jinja": ""},
            {"tokenizer": {"kind": "huggingface"}, "chat": "template", "features": ["chat"]},
        ),
    ],
)
def test_text_by_the_files_that_are_there(tmp_path: Path, files: dict[str, str], text: dict[str, Any]) -> None:
    for name, content in files.items():
        folder_with(tmp_path, name, content)
    card = params(tmp_path)
    assert card["text"] == text
    resolve(Card.from_dict(card))


def test_llamas_sentencepiece_file_is_not_taken_for_a_mistral_one(tmp_path: Path) -> None:
    folder_with(tmp_path, "tokenizer.model", "")
    assert config(tmp_path, model_type="llama", sliding_window=...)["text"] == {"features": []}


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("Mistral-7B-Instruct-v0.3", "mistral-7b-instruct-v0.3"),
        ("my model (tuned)", "my-model-tuned"),
        ("模型", "model"),
        ("models--mistralai--Mistral-7B-v0.3/snapshots/caa1feb0e54d415e2df31207e5f4e273e33509b1", "mistral-7b-v0.3"),
    ],
)
def test_names(tmp_path: Path, folder: str, name: str) -> None:
    (tmp_path / folder).mkdir(parents=True)
    assert params(tmp_path / folder)["name"] == name


def test_a_card_survives_printing(tmp_path: Path) -> None:
    card = Card.from_dict(params(tmp_path, sliding_window=[None, 8]))
    file = tmp_path / f"{card.name}.yaml"
    file.write_text(card.to_yaml(), encoding="utf-8")
    from zoo.registry.card import load_card

    assert resolve(load_card(file)).model == resolve(card).model


def test_runs() -> None:
    a, b, c = {"x": 1}, {"x": 2}, {"x": 3}
    assert runs([a, a, a]) == [{"repeat": 3, "x": 1}]
    assert runs([a, b, a, b]) == [{"repeat": 2, "pattern": [a, b]}]
    assert runs([a, b, b, c]) == [{"repeat": 1, "x": 1}, {"repeat": 2, "x": 2}, {"repeat": 1, "x": 3}]
    assert runs([a]) == [{"repeat": 1, "x": 1}]


def test_torch_is_not_imported(tmp_path: Path, save: Write, plan_of: Plans, native_names: Names) -> None:
    save(tmp_path / "w.safetensors", native_names(plan_of()))
    folder_with(tmp_path, "params.json", {**PARAMS, "n_layers": 2})
    code = f"import sys; from zoo.loading.infer import infer_card; infer_card({str(tmp_path)!r})"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


STATIC = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None, "dequantize": False}
GROUPS = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "config_groups": GROUPS,
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "version": "0.12",
}


@pytest.mark.parametrize(
    ("write", "change"),
    [
        ("params", {"quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}}),
        ("params", {"quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "NO_SCALES"}}),
        ("params", {"quantization": COMPRESSED}),
        ("params", {"quantization_config": {**COMPRESSED, "format": "nvfp4-pack-quantized"}}),
        ("config", {"quantization_config": {**STATIC, "modules_to_not_convert": ["lm_head"]}}),
        ("config", {"quantization_config": COMPRESSED}),
        ("config", {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}),
    ],
)
def test_quantised_settings_change_nothing_but_the_files(tmp_path: Path, write: str, change: dict[str, Any]) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "coded").mkdir()
    writer = {"params": params, "config": config}[write]
    plain, coded = (writer(tmp_path / name, **extra) for name, extra in (("plain", {}), ("coded", change)))
    assert {**coded, "name": "plain"} == plain
    assert coded["source"]["dtype"] == "bfloat16"


ENCODER = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 2,
    "head_dim": 16,
    "hidden_dim": 128,
    "vocab_size": 51866,
    "max_source_positions": 1500,
    "audio_encoding_args": {"sampling_rate": 16000, "num_mel_bins": 128, "hop_length": 160, "window_size": 400},
}
SOUND = {
    "model_type": "voxtral_encoder",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "num_mel_bins": 128,
    "max_source_positions": 1500,
}
AUDIO = {"kind": "whisper", "token": 24, "dim": 32, "num_layers": 2, "num_heads": 2, "hidden_dim": 128}
AUDIO |= {"num_mel_bins": 128, "positions": 1500, "stack": 4, "norm": {"kind": "layer", "eps": 1e-5}}


def hearing(folder: Path, **changes: Any) -> dict[str, Any]:
    arguments = {"encoder_args": ENCODER | changes, "downsample_args": {"downsample_factor": 4}}
    return params(folder, multimodal={"whisper_model_args": arguments})


def listening(folder: Path, **changes: Any) -> dict[str, Any]:
    inner = {key: value for key, value in CONFIG.items() if key not in ("architectures", "sliding_window")}
    values = {"model_type": "voxtral", "audio_token_id": 24, "text_config": inner | {"model_type": "llama"}}
    return infer_card(folder_with(folder, "config.json", values | {"audio_config": SOUND | changes}))


@pytest.mark.parametrize("infer", [hearing, listening])
def test_encoders_of_sound(infer: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    model = infer(tmp_path)["model"]
    assert model["audio"] == AUDIO
    assert (model["dim"], model["vocab_size"], len(model["layers"])) == (64, 509, 1)
    assert resolve(Card.from_dict(infer(tmp_path))).model.audio is not None  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("infer", "changes", "message"),
    [
        (hearing, {"head_dim": 8}, "n_heads has a value that zoo does not read; found 2; expected heads that make up"),
        (hearing, {"n_layers": ...}, "the key 'multimodal.whisper_model_args.encoder_args.n_layers' is missing"),
        (
            hearing,
            {"causal": True},
            "1 key that zoo does not know; found multimodal.whisper_model_args.encoder_args.ca",
        ),
        (
            hearing,
            {"audio_encoding_args": ENCODER["audio_encoding_args"] | {"hop_length": 80}},  # type: ignore[operator]
            "audio_encoding_args.hop_length has a value that zoo does not read; found 80; expected 160",
        ),
        (listening, {"scale_embedding": True}, "audio_config.scale_embedding has a value that zoo does not read"),
        (listening, {"intermediate_size": 100}, "audio_config.intermediate_size has a value that zoo does not read"),
        (listening, {"model_type": "whisper"}, 'audio_config.model_type has a value that zoo does not read; found "w'),
        (listening, {"window": 750}, "1 key that zoo does not know; found audio_config.window: 750"),
    ],
)
def test_encoders_that_zoo_does_not_read(
    infer: Callable[..., dict[str, Any]], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    given = {key: (None if value is ... else value) for key, value in changes.items()}
    assert message in refused(infer, tmp_path, **given)


def test_a_language_model_inside_that_zoo_does_not_know(tmp_path: Path) -> None:
    values = {"model_type": "voxtral", "text_config": {"model_type": "rwkv"}, "audio_config": SOUND}
    with pytest.raises(CardError, match=r"config\.json: text_config: architecture 'rwkv' is not supported yet"):
        infer_card(folder_with(tmp_path, "config.json", values))
