"""Saving a loaded model and reading it back. transformers opens every card's in parity/test_every_card.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import zoo
from zoo.assemble import assemble
from zoo.cli import main
from zoo.components import matrix, native
from zoo.components.native import panels
from zoo.loading.infer.families import families
from zoo.loading.layouts import layout_named, read_layouts
from zoo.loading.load import random_weights
from zoo.registry.card import Card
from zoo.registry.catalog import Resource
from zoo.registry.errors import CapacityError, RequestError, WeightsError
from zoo.registry.resolve import resolve
from zoo.registry.spec import Param, Part, Rotary, Spec
from zoo.saving.names import file_tensors
from zoo.saving.settings import settings_of
from zoo.saving.values import Own, pieces
from zoo.testing import relative_error

HAS_PANELS = native.missing() is None

TOKENS = [3, 17, 5, 99, 23, 42, 7, 64, 11, 58, 2, 77, 31]
MIXER: dict[str, Any] = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "rope": {"theta": 1e4}}
GATED: dict[str, Any] = {"kind": "gated", "hidden_dim": 56}
MOE = {"kind": "moe", "num_experts": 3, "experts_per_token": 2, "expert": GATED}
MAMBA = {"kind": "mamba2", "num_heads": 8, "head_dim": 10, "num_groups": 1, "state_size": 6, "conv_size": 4}
WINDOWS = [{"mixer": MIXER, "ffn": GATED}, {"mixer": MIXER | {"window": 5}, "ffn": GATED}]

LAYERS: dict[str, list[dict[str, Any]]] = {
    "dense": [{"repeat": 2, "mixer": MIXER, "ffn": GATED}],
    "mixture": [{"repeat": 2, "mixer": MIXER, "ffn": MOE}],
    "windows": [{"repeat": 2, "pattern": WINDOWS}],
    "mamba": [{"repeat": 2, "mixer": MAMBA | {"norm_eps": 1e-5}, "ffn": None}],
}


def with_layers(layers: list[dict[str, Any]]) -> dict[str, Any]:
    sizes = {"dim": 40, "vocab_size": 101, "norm": {"kind": "rms", "eps": 1e-5}}
    return {"name": "little", "context_length": 64, "model": sizes | {"layers": layers}}


@pytest.fixture
def little() -> Iterator[Callable[..., zoo.Model]]:
    """A model with random weights of such layers, or from elsewhere."""
    opened: list[zoo.Model] = []

    def make(ref: Any = "dense", **options: Any) -> zoo.Model:
        known = isinstance(ref, str) and ref in LAYERS
        weights = {"weights": "random"} if known else {}
        opened.append(
            zoo.load(
                with_layers(LAYERS[ref]) if known else ref, **{"device": "cpu", "dtype": "float32"} | weights | options
            )
        )
        return opened[-1]

    yield make
    for model in opened:
        model.close()


Little = Callable[..., zoo.Model]


@pytest.mark.parametrize("layers", LAYERS)
def test_there_and_back(layers: str, little: Little, tmp_path: Path) -> None:
    """Through both makers' names and zoo's own: the first and the last files are the same."""
    model = little(layers)
    expected = model.logits(TOKENS)
    for before, after in (("", "mistral"), ("mistral", "huggingface"), ("huggingface", "zoo"), ("zoo", "mistral")):
        target = tmp_path / f"{after}-from-{before}"
        model = little(tmp_path / before, dtype="auto") if before else model
        saved = model.save(target, layout=after)
        assert (saved.folder, saved.layout) == (target, after)
        assert saved.settings == {"mistral": "params.json", "huggingface": "config.json", "zoo": None}[after]
        assert saved.bytes == sum((target / file).stat().st_size for file in saved.files)
        if (tmp_path / after).exists():
            assert same_files(target, tmp_path / after)
        else:
            shutil.copytree(target, tmp_path / after)
        again = little(target, dtype="auto")
        assert again.plan.model == model.plan.model
        assert torch.equal(again.logits(TOKENS), expected)


def same_files(one: Path, other: Path) -> bool:
    names = {file.name for file in one.iterdir()}
    return names == {file.name for file in other.iterdir()} and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


@pytest.mark.parametrize("layers", ["dense", "mixture", "windows"])
def test_mistral_inference_opens_it(layers: str, little: Little, tmp_path: Path, mistral_inference: ModuleType) -> None:
    model = little(layers)
    model.save(tmp_path / "native", layout="mistral")
    (theirs_TV,) = mistral_inference.logits(mistral_inference.open_folder(tmp_path / "native"), [TOKENS])
    assert relative_error(model.logits(TOKENS), theirs_TV) < 1e-4


@pytest.mark.parametrize("layout", ["mistral", "huggingface"])
def test_other_programs_settings_are_enough(layout: str, little: Little, tmp_path: Path) -> None:
    model = little("mixture")
    saved = model.save(tmp_path / "it", layout=layout)
    (tmp_path / "it" / "card.yaml").unlink()
    assert saved.settings is not None
    assert torch.equal(little(tmp_path / "it").logits(TOKENS), model.logits(TOKENS))


def test_a_weight_file_means_its_folders_card(little: Little, tmp_path: Path) -> None:
    model = little("windows")
    model.save(tmp_path / "it", layout="zoo")
    assert torch.equal(little(tmp_path / "it" / "model.safetensors").logits(TOKENS), model.logits(TOKENS))


def test_shards(little: Little, tmp_path: Path) -> None:
    """Each within the limit unless it is one tensor, all named by the index, and read by transformers too."""
    model = little("mixture")
    saved = model.save(tmp_path / "it", layout="huggingface", file_bytes=30_000)
    index = json.loads((tmp_path / "it" / "model.safetensors.index.json").read_text())
    assert len(saved.files) > 3
    assert sorted(set(index["weight_map"].values())) == sorted(saved.files)
    for name in saved.files:
        tensors = load_file(tmp_path / "it" / name)
        assert {index["weight_map"][tensor] for tensor in tensors} == {name}
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 30_000
    assert index["metadata"]["total_size"] == model.memory.weights
    assert torch.equal(little(tmp_path / "it").logits(TOKENS), model.logits(TOKENS))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "it")
    with torch.inference_mode():
        assert relative_error(model.logits(TOKENS), theirs(torch.tensor([TOKENS])).logits[0]) < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_type_is_kept(dtype: str, little: Little, tmp_path: Path) -> None:
    """But for what is never rounded."""
    model = little("mamba", dtype=dtype)
    model.save(tmp_path / "it")
    again = little(tmp_path / "it", dtype=dtype)
    assert again.card.source.dtype == dtype
    for (name, old), (_, new) in zip(model.module.named_parameters(), again.module.named_parameters(), strict=True):
        assert old.dtype == new.dtype
        assert torch.equal(matrix.values(model.module, name), matrix.values(again.module, name)), name


@pytest.mark.skipif(not HAS_PANELS, reason="no native kernels")
@pytest.mark.parametrize("layers", ["dense", "mixture"])
def test_packed_weights_are_unpacked(
    layers: str, little: Little, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(panels, "pays", lambda _: False)
    plain = little(layers, dtype="bfloat16")
    plain.save(tmp_path / "plain")
    monkeypatch.undo()
    packed = little(tmp_path / "plain", dtype="bfloat16")
    assert any(parameter.is_meta for parameter in packed.module.parameters())
    packed.save(tmp_path / "packed")
    assert same_files(tmp_path / "plain", tmp_path / "packed")


@pytest.mark.parametrize("layout", ["mistral", "huggingface"])
def test_merged_adapters_are_part_of_it(layout: str, little: Little, tmp_path: Path) -> None:
    little().save(tmp_path / "base", layout="huggingface")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(str(tmp_path / "adapter"))
    model = little(tmp_path / "base", adapters=[tmp_path / "adapter"])
    expected, plain = model.logits(TOKENS), model.logits(TOKENS, adapter=None)
    assert relative_error(plain, expected) > 0.01
    with pytest.raises(RequestError, match=r"not part of the weights; found adapter\. Merge them or unload them first"):
        model.save(tmp_path / "merged", layout=layout)
    assert not (tmp_path / "merged").exists()
    model.merge_adapter("adapter")
    model.save(tmp_path / "merged", layout=layout)
    assert relative_error(little(tmp_path / "merged").logits(TOKENS), expected) < 1e-4


def test_quantised_weights_are_saved_plain(little: Little, tmp_path: Path) -> None:
    little().save(tmp_path / "plain", layout="mistral")
    file = tmp_path / "plain" / "consolidated.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if ".w" in name.removesuffix(".weight")]:
        tensors[name.replace("weight", "qscale_weight")] = torch.tensor(2.0**-12)
        tensors[name] = (tensors[name] * 2.0**12).to(torch.float8_e4m3fn)
    save_file(tensors, file)
    model = little(tmp_path / "plain")
    model.save(tmp_path / "again")
    saved = load_file(tmp_path / "again" / "consolidated.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert len(saved) < len(tensors)
    assert torch.equal(little(tmp_path / "again").logits(TOKENS), model.logits(TOKENS))


def test_tokenizer_and_card_come_along(tmp_path: Path) -> None:
    with zoo.load("tiny", device="cpu") as model:
        before = model.chat([{"role": "user", "content": "What is a card?"}], max_tokens=12, temperature=0.0)
        model.save(tmp_path / "it")
    with zoo.load(tmp_path / "it", device="cpu") as again:
        after = again.chat([{"role": "user", "content": "What is a card?"}], max_tokens=12, temperature=0.0)
        assert again.card.text == model.card.text
        assert (again.card.name, again.card.license) == (model.card.name, model.card.license)
    assert after.text == before.text
    assert zoo.inspect(str(tmp_path / "it")).folder == tmp_path / "it"


class Turned(Spec):
    """A stack of pairs, heads whose lanes are turned in part, and a number."""

    module = "none:None"
    kind: str = "turned"

    def parameters(self) -> dict[str, Param]:
        parts = {f"pair.{e}.{n}": Part((e, (0, 2) if n == "a" else (2, 6))) for e in range(2) for n in "ab"}
        return {
            "pairs": Param((2, 6, 5), parts=parts),
            "scale": Param(()),
            "heads": Param((16, 3), rotary=Rotary(8, 4, 2)),
        }


@pytest.mark.parametrize("transforms", ["[stack, split]", "[stack, transpose, split]"])
def test_every_transform_is_undone(transforms: str, tmp_path: Path) -> None:
    (tmp_path / "turned.yaml").write_text(
        "tensors: {s: scale, h: {to: heads, transform: interleaved_rope}, "
        f"p: {{to: ['pair.{{e}}.a', 'pair.{{e}}.b'], transform: {transforms}}}}}"
    )
    layout = read_layouts({"turned": Resource("turned", tmp_path / "turned.yaml", "test")})["turned"]
    pairs, heads = torch.arange(60.0).view(2, 6, 5), torch.arange(48.0).view(16, 3)
    module = torch.nn.Module()
    for name, value in {"pairs": pairs, "heads": heads, "scale": torch.ones(())}.items():
        module.register_parameter(name, torch.nn.Parameter(value))
    made = {
        tensor.name: torch.cat([piece.flatten() for piece in pieces(Own(module), tensor)]).view(tensor.shape)
        for tensor in file_tensors(Turned(), layout)
    }
    order = [lane + head for head in (0, 8) for lane in (0, 1, 2, 4, 3, 5, 6, 7)]
    assert torch.equal(made["p"], pairs.transpose(1, 2) if "transpose" in transforms else pairs)
    assert torch.equal(made["h"], heads[order])
    assert made["s"].item() == 1


def test_a_folder_that_is_taken(little: Little, tmp_path: Path) -> None:
    first, second = little(), little("mixture")
    first.save(tmp_path / "it", layout="huggingface", file_bytes=30_000)
    (tmp_path / "it" / "notes.txt").write_text("mine")
    before = {file.name: file.read_bytes() for file in (tmp_path / "it").iterdir()}
    with pytest.raises(RequestError, match=r"a model in this folder already; found card\.yaml, config\.json, model-0"):
        second.save(tmp_path / "it")
    assert {file.name: file.read_bytes() for file in (tmp_path / "it").iterdir()} == before
    second.save(tmp_path / "it", layout="mistral", overwrite=True)
    names = sorted(file.name for file in (tmp_path / "it").iterdir())
    assert names == ["card.yaml", "consolidated.safetensors", "notes.txt", "params.json"]
    assert torch.equal(little(tmp_path / "it").logits(TOKENS), second.logits(TOKENS))


def test_into_the_folder_that_it_came_from(little: Little, tmp_path: Path) -> None:
    little().save(tmp_path / "it")
    model = little(tmp_path / "it")
    expected = model.logits(TOKENS)
    model.save(tmp_path / "it", layout="mistral", overwrite=True)
    assert torch.equal(little(tmp_path / "it").logits(TOKENS), expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("taken", [False, True])
def test_an_interrupted_save_leaves_nothing(
    error: Any, taken: bool, little: Little, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = little()
    if taken:
        little("mixture").save(tmp_path / "it", layout="huggingface")
    before = {str(file): file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    count = 0

    def cut(*arguments: Any) -> Iterator[torch.Tensor]:
        nonlocal count
        count += 1
        if count == 9:
            raise error
        return pieces(*arguments)

    monkeypatch.setattr("zoo.saving.write.pieces", cut)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else WeightsError):
        model.save(tmp_path / "it", layout="huggingface", overwrite=True)
    after = {str(file): file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    assert after == before


def test_a_disk_that_is_too_full(little: Little, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(CapacityError, match=r"the disk is too full for the weights; found 1000 bytes free; expected 1"):
        little().save(tmp_path / "it")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_saved(little: Little, tmp_path: Path) -> None:
    model = little()
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="file: not a folder"):
        model.save(tmp_path / "file")
    with pytest.raises(WeightsError, match=r"unknown weight layout 'mistrall'.*Did you mean 'mistral'"):
        model.save(tmp_path / "it", layout="mistrall")
    wrong: Any
    for wrong in (0, "5GB", 1e9):
        with pytest.raises(RequestError, match=f"file_bytes: out of range; found {wrong!r}; expected a whole number"):
            model.save(tmp_path / "it", file_bytes=wrong)
    with pytest.raises(RequestError, match="overwrite: out of range; found 'no'; expected True or False"):
        model.save(tmp_path / "it", overwrite=cast(Any, "no"))
    for wrong in (None, ""):
        with pytest.raises(WeightsError, match=f"not a path; found {wrong!r}"):
            model.save(wrong)
    normed = [{"repeat": 2, "mixer": MIXER | {"qk_norm": {"kind": "rms", "eps": 1e-5}}, "ffn": GATED}]
    model = little(with_layers(normed), weights="random")
    with pytest.raises(WeightsError, match=r"the layout 'mistral' has no name for layers\.0\.mixer\.q_norm\.weight"):
        model.save(tmp_path / "it", layout="mistral")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file"]


def test_the_command_tells_what_cannot_be_saved_before_it_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zoo.api.load", lambda *_, **__: pytest.fail("it loads"))
    (tmp_path / "file").touch()
    for place, flags, words in (
        ("it", ("--layout", "mistrall"), "unknown weight layout 'mistrall'"),
        ("file/deep/it", (), f"{tmp_path / 'file'}: no folder can be made here; found a file"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["save", "tiny", str(tmp_path / place), *flags])
        assert (ended.value.code, words in capsys.readouterr().err) == (2, True)


def test_a_model_that_no_settings_file_can_say(little: Little, tmp_path: Path) -> None:
    """It is saved with its card, and the note says who can read it."""
    uneven = [{"mixer": MIXER, "ffn": GATED}, {"mixer": MIXER, "ffn": GATED | {"hidden_dim": 24}}]
    model = little(with_layers(uneven), weights="random")
    saved = model.save(tmp_path / "it", layout="mistral")
    assert saved.settings is None
    assert saved.note.endswith(
        "neither config.json nor params.json can say this model, so that only zoo reads the folder"
    )
    assert not (tmp_path / "it" / "params.json").exists()
    assert torch.equal(little(tmp_path / "it").logits(TOKENS), model.logits(TOKENS))


SAID = {"falcon_mamba", "gemma2", "gemma3_text", "glm4", "granite", "granitemoehybrid", "llama", "mamba", "mamba2"}
SAID |= {"jamba", "nemotron_h"}
SAID |= {"ministral", "mistral", "mixtral", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3"}


def test_architectures_whose_settings_are_written() -> None:
    """At least these; a new one needs its words in zoo/saving/words.py."""
    plans = [resolve(card) for card in zoo.list() if card.unsupported is None]
    found = [settings_of(plan, "huggingface", "bfloat16", None) for plan in plans]
    assert {settings.values["model_type"] for settings in found if settings} >= SAID
    native = [settings_of(plan, "mistral", "bfloat16", None) for plan in plans if plan.card.family == "mistral"]
    assert {settings.values.get("model_type") for settings in native if settings} >= {None, "mamba"}


def test_classes_are_those_of_transformers() -> None:
    known = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    named = families()["classes"]
    assert named == {name: known[name] for name in named}
    assert named.keys() >= SAID


def test_one_piece_at_a_time() -> None:
    """What is written is made when it is asked for, expert by expert."""
    plan = resolve(Card.from_dict(with_layers(LAYERS["mixture"])))
    module = assemble(plan, torch.float32)
    random_weights(module, plan)
    seen: list[str] = []

    def watched(module: torch.nn.Module, name: str, index: tuple[int | slice, ...]) -> torch.Tensor:
        seen.append(name)
        return matrix.values(module, name, index)

    stacked = "model.layers.0.mlp.experts.down_proj"
    tensors = {t.name: t for t in file_tensors(plan.model, layout_named("huggingface"), [stacked])}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zoo.saving.values.values", watched)
        parts = pieces(Own(module), tensors[stacked])
        assert seen == []
        next(parts)
        assert len(seen) == 1
        assert len(list(parts)) == 2


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["save", "tiny", str(tmp_path / "it"), "--layout", "huggingface", "--dtype", "float32"])
    printed = capsys.readouterr()
    assert ended.value.code == 0
    assert printed.out == f"{tmp_path / 'it'}\n"
    assert "in layout huggingface to" in printed.err
    with pytest.raises(SystemExit) as ended:
        main(["save", "tiny", str(tmp_path / "it")])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "Choose another folder, or say overwrite=True (`--overwrite`)" in told
    assert "weights:" not in told, "a model was loaded for nothing"
    with zoo.load(tmp_path / "it") as model:
        assert model.placement.dtype_name == "float32"


def test_settings_and_names_of_the_source_are_kept(little: Little, tmp_path: Path) -> None:
    """Keys that zoo passes over and prefixes of names included, but for the number format and the quantisation."""
    little().save(tmp_path / "it", layout="huggingface")
    (tmp_path / "it" / "card.yaml").unlink()
    file, config = tmp_path / "it" / "model.safetensors", tmp_path / "it" / "config.json"
    tensors = {name.replace("model.", "model.language_model."): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    said = json.loads(config.read_text()) | {"eos_token_id": 7, "quantization_config": {"quant_method": "fp8"}}
    config.write_text(json.dumps(said))
    model = little(tmp_path / "it", dtype="bfloat16")
    model.save(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == tensors.keys()
    del said["quantization_config"]
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == said | {"dtype": "bfloat16"}
