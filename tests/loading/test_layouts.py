"""Tables of weight names: reading, finding, recognising, and the messages for a table's author."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from zoo.loading.layouts import Layout, detect, layout_named, layouts, match, read_layouts, skeleton
from zoo.registry.catalog import Resource
from zoo.registry.errors import PluginError, WeightsError


def table(folder: Path, **texts: str) -> dict[str, Layout]:
    resources = {}
    for name, text in texts.items():
        file = folder / f"{name}.yaml"
        file.write_text(text, encoding="utf-8")
        resources[name] = Resource(name, file, "test")
    return read_layouts(resources)


def refused(folder: Path, text: str, **others: str) -> str:
    with pytest.raises(PluginError) as caught:
        table(folder, mine=text, **others)
    assert "mine.yaml" in str(caught.value)
    return str(caught.value)


def test_built_in_layouts() -> None:
    assert list(layouts()) == [
        "mistral",
        "huggingface",
        "huggingface_glm4",
        "huggingface_gpt_oss",
        "huggingface_latent",
        "huggingface_postnorm",
        "zoo",
    ]


def test_tables_are_read_once_and_again_when_there_are_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def reading(resources: Mapping[str, Resource]) -> dict[str, Layout]:
        read.extend(resources)
        return read_layouts(resources)

    monkeypatch.setattr("zoo.loading.layouts.read_layouts", reading)
    known: dict[str, Resource] = {}
    monkeypatch.setattr("zoo.loading.layouts.manager", lambda: SimpleNamespace(layouts=lambda: known))
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text("tensors: {a.weight: b.weight}", encoding="utf-8")
        known[name] = Resource(name, tmp_path / f"{name}.yaml", "test")
        layouts().clear()
        assert list(layouts()) == list(known)
    assert read == ["one", "one", "two"]


@pytest.mark.parametrize(
    ("layout", "name", "targets"),
    [
        ("mistral", "layers.12.attention.wq.bias", ["layers.{i}.mixer.q.bias"]),
        ("mistral", "layers.3.feed_forward.experts.11.w2.weight", ["layers.{i}.ffn.experts.{e}.down.weight"]),
        ("huggingface", "model.layers.0.self_attn.o_proj.weight", ["layers.{i}.mixer.o.weight"]),
        (
            "huggingface",
            "model.layers.0.mlp.gate_up_proj.weight",
            ["layers.{i}.ffn.gate.weight", "layers.{i}.ffn.up.weight"],
        ),
        ("zoo", "anything.at.all", ["anything.at.all"]),
    ],
)
def test_find(layout: str, name: str, targets: list[str]) -> None:
    found = layouts()[layout].find(name)
    assert found is not None
    assert list(found[0].targets) == targets


def test_find_fills_the_holes_in_order() -> None:
    found = layouts()["mistral"].find("layers.3.feed_forward.experts.11.w2.weight")
    assert found is not None
    assert found[1] == {"i": "3", "e": "11"}


@pytest.mark.parametrize("name", ["layers.x.attention.wq.weight", "layers.0.attention.wq", "layers.²", "head", ""])
def test_names_outside_a_table(name: str) -> None:
    assert layouts()["mistral"].find(name) is None


def test_ignored_on_purpose() -> None:
    assert layouts()["huggingface"].ignores("model.layers.31.self_attn.rotary_emb.inv_freq")
    assert not layouts()["huggingface"].ignores("model.rotary_emb.inv_freq")


def test_file_names_of_a_tensor() -> None:
    known = layouts()
    assert list(known["mistral"].file_names("layers.2.mixer.k.weight")) == ["layers.2.attention.wk.weight"]
    assert list(known["mistral"].file_names("layers.2.ffn.experts.1.up.weight")) == [
        "layers.2.feed_forward.experts.1.w3.weight",
        "layers.2.experts.1.w3.weight",
        "layers.2.block_sparse_moe.w3",
    ]
    assert list(known["zoo"].file_names("a.b")) == ["a.b"]


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        (["tok_embeddings.weight", "norm.weight", "layers.0.attention.wq.weight"], "mistral"),
        (["model.embed_tokens.weight", "lm_head.weight", "something.else"], "huggingface"),
        (["embed.weight", "layers.0.mixer_norm.weight", "layers.0.mixer.my_part.weight", "norm.weight"], "zoo"),
    ],
)
def test_detect_by_content(names: list[str], layout: str) -> None:
    assert detect(names, layouts().values(), "here").name == layout


def test_detect_refuses_foreign_names() -> None:
    with pytest.raises(WeightsError, match=r"here: tensor names of no known layout; found transformer\.wte\.weight;"):
        detect(["transformer.wte.weight"], layouts().values(), "here")
    with pytest.raises(WeightsError, match="found no tensor at all"):
        detect([], layouts().values(), "here")


def test_detect_says_that_an_adapter_is_none() -> None:
    names = ["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    with pytest.raises(WeightsError, match=r"a LoRA adapter, not a model; .* Point at the model that it adapts"):
        detect(names, layouts().values(), "here")


def test_unknown_layout_by_name() -> None:
    with pytest.raises(WeightsError, match=r"unknown weight layout 'mistrall'.*Did you mean 'mistral'"):
        layout_named("mistrall")


def test_literal_numbers_in_patterns(tmp_path: Path) -> None:
    text = "tensors: {projection.0.weight: one.weight, projection.2.weight: two.weight}"
    layout = table(tmp_path, mine=text)["mine"]
    assert [layout.find(f"projection.{n}.weight") and n for n in (0, 1, 2)] == [0, None, 2]
    found = layout.find("projection.2.weight")
    assert found is not None
    assert found[0].targets == ("two.weight",)
    assert match("a.{i}.{j}", "a.4.5") == {"i": "4", "j": "5"}
    assert skeleton("a.4.{i}.x4") == "a.#.#.x4"


def test_extends_takes_over_and_overrides(tmp_path: Path) -> None:
    parent = "tensors: {embed.w: embed.weight, norm.w: norm.weight, p.0.w: zero.weight}\nignore: {junk: no use}"
    child = (
        "extends: base\ntensors: {norm.w: other.weight, p.2.w: two.weight, 'layers.{i}.mine': 'layers.{i}.mixer.mine'}"
    )
    layout = table(tmp_path, base=parent, mine=child)["mine"]
    for name, target in {"embed.w": "embed", "norm.w": "other", "p.0.w": "zero", "p.2.w": "two"}.items():
        found = layout.find(name)
        assert found is not None
        assert found[0].targets == (f"{target}.weight",)
    assert layout.ignores("junk")
    assert layout.score(["embed.w", "layers.0.mine", "junk"]) == 2


def test_a_name_means_what_the_model_has(tmp_path: Path) -> None:
    names = "to: 'layers.{i}.a.{weight|bias}', or: 'layers.{i}.b.{weight|bias}'"
    text = f"tensors: {{'layers.{{i}}.norm.{{weight|bias}}': {{{names}}}}}"
    layout = table(tmp_path, mine=text)["mine"]
    meant = [(row.targets, holes) for row, holes in layout.meanings("layers.3.norm.bias")]
    assert meant == [(("layers.{i}.a.bias",), {"i": "3"}), (("layers.{i}.b.bias",), {"i": "3"})]
    found = layout.find("layers.3.norm.bias")
    assert found is not None
    assert found[0].targets == ("layers.{i}.a.bias",)
    assert list(layout.file_names("layers.3.b.weight")) == ["layers.3.norm.weight"]
    child = "extends: mine\ntensors: {'layers.{j}.norm.weight': 'layers.{j}.c.weight'}"
    changed = table(tmp_path, mine=text, other=child)["other"]
    assert [row.targets for row, _ in changed.meanings("layers.0.norm.weight")] == [("layers.{j}.c.weight",)]
    assert len(changed.meanings("layers.0.norm.bias")) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "a table of weight names is a mapping"),
        ("tensor: {a: b}", "unknown key 'tensor'; expected one of summary, extends, prefixes, tensors"),
        ("summary: nothing", "without rows"),
        ("tensors: {a: 3}", "row 'a'; expected a name, or `to`, `or` and `transform`"),
        ("tensors: {a: {to: b, transfrom: split}}", "row 'a'; expected a name, or `to`, `or` and `transform`"),
        (
            "tensors: {a: {to: b, transform: transposed}}",
            "unknown transform 'transposed' of 'a'; expected one of stack, split, transpose, interleaved_rope",
        ),
        ("tensors: {a: {to: [b, c]}}", "expected `split` exactly when `to` lists several names"),
        ("tensors: {a: {to: b, transform: split}}", "expected `split` exactly when `to` lists several names"),
        ("tensors: {a: 'b.{e}'}", "expected `stack` exactly when `to` has a number that the file's name lacks"),
        ("tensors: {a: {to: 'b.{e}.{f}', transform: stack}}", "expected `stack` exactly when"),
        ("tensors:\n  a.{i}.x: b\n  a.{j}.x: c", "mine.yaml:3: 'a.{j}.x' is named twice"),
        ("extends: hugginface\ntensors: {a: b}", "extends 'hugginface'; expected no `extends`"),
        ("extends: mine\ntensors: {a: b}", "extends 'mine'; expected no `extends`: there is no other table"),
    ],
)
def test_messages_for_the_author(tmp_path: Path, text: str, message: str) -> None:
    assert message in refused(tmp_path, text)


def test_tables_that_extend_each_other(tmp_path: Path) -> None:
    other = "extends: mine\ntensors: {a: b}"
    with pytest.raises(PluginError, match=r"other\.yaml:1: the table 'other' extends 'mine'"):
        table(tmp_path, mine="extends: other\ntensors: {c: d}", other=other)
