"""Which files of a repository are fetched: file lists as real repositories have them."""

from __future__ import annotations

import pytest

from zoo.loading.hub import Chosen, RemoteFile, choose
from zoo.registry.errors import FetchError

SMALL = ("README.md", ".gitattributes", "config.json", "generation_config.json", "special_tokens_map.json")
SIZES = {".safetensors": 5_000_000_000, ".pt": 5_000_000_000, ".pth": 5_000_000_000, ".bin": 5_000_000_000}


def listing(*names: str) -> list[RemoteFile]:
    return [RemoteFile(name, SIZES.get("." + name.rsplit(".", 1)[-1], 1000), "0" * 40) for name in names]


def shards(prefix: str, count: int, suffix: str = "safetensors", digits: int = 5) -> list[str]:
    return [f"{prefix}-{n:0{digits}d}-of-{count:0{digits}d}.{suffix}" for n in range(1, count + 1)]


def weights_of(chosen: Chosen) -> list[str]:
    return [file.path for file in chosen.files if file.size > 1000]


def small_of(chosen: Chosen) -> set[str]:
    return {file.path for file in chosen.files if file.size <= 1000}


def test_both_sets_take_the_native_one_and_say_so() -> None:
    names = [
        *SMALL,
        "params.json",
        "consolidated.safetensors",
        *shards("model", 3),
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer.model.v3",
        "tokenizer_config.json",
    ]
    chosen = choose(listing(*names))
    assert weights_of(chosen) == ["consolidated.safetensors"]
    assert small_of(chosen) == {
        "config.json",
        "generation_config.json",
        "params.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer.model.v3",
        "tokenizer_config.json",
    }
    assert chosen.total_bytes == 5_000_000_000 + 8 * 1000
    assert chosen.note == (
        "weights: consolidated.safetensors (4.7 GiB); left out: 3 files of model safetensors (14.0 GiB)"
    )


def test_the_layout_of_the_card_decides() -> None:
    names = [
        "params.json",
        "config.json",
        "consolidated.safetensors",
        *shards("model", 2),
        "model.safetensors.index.json",
    ]
    chosen = choose(listing(*names), "huggingface")
    assert weights_of(chosen) == shards("model", 2)
    assert small_of(chosen) == {"params.json", "config.json", "model.safetensors.index.json"}


def test_a_layout_of_a_plugin_takes_what_auto_takes() -> None:
    assert weights_of(choose(listing("params.json", "consolidated.safetensors"), "acme")) == [
        "consolidated.safetensors"
    ]


def test_small_files_come_first() -> None:
    files = [RemoteFile("consolidated.safetensors", 50, "0" * 64), RemoteFile("tekken.json", 70, "0" * 64)]
    assert [file.path for file in choose(files).files] == ["tekken.json", "consolidated.safetensors"]


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (["tekken.json", "params.json", "consolidated.safetensors"], ["consolidated.safetensors"]),
        (["tekken.json", "consolidated.safetensors"], ["consolidated.safetensors"]),
        (["config.json", "consolidated.safetensors", "model.safetensors"], ["model.safetensors"]),
        (["params.json", *shards("consolidated", 7)], shards("consolidated", 7)),
        (["config.json", *shards("model", 19), "consolidated.00.pt"], shards("model", 19)),
        (["config.json", "model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["consolidated.00.pth", "consolidated.01.pth"], ["consolidated.00.pth", "consolidated.01.pth"]),
        (["config.json", "pytorch_model.bin"], ["pytorch_model.bin"]),
        (shards("pytorch_model", 2, "bin"), shards("pytorch_model", 2, "bin")),
        (["params.json", "my-finetune.safetensors"], ["my-finetune.safetensors"]),
        (["model.safetensors", "extra.safetensors"], ["model.safetensors"]),
    ],
)
def test_one_set(names: list[str], weights: list[str]) -> None:
    assert weights_of(choose(listing(*names))) == weights


def test_index_of_the_chosen_set_only() -> None:
    names = [*shards("consolidated", 2), *shards("model", 2)]
    indexes = ["consolidated.safetensors.index.json", "model.safetensors.index.json"]
    chosen = choose(listing("params.json", "config.json", *names, *indexes))
    assert small_of(chosen) == {"params.json", "config.json", indexes[0]}


def test_names_of_other_tokenizers_and_prompts() -> None:
    wanted = {
        "tekken.json",
        "tokenizer.model.v7",
        "tokenizer.model.v7m1",
        "chat_template.jinja",
        "chat_template.json",
        "SYSTEM_PROMPT.txt",
    }
    assert (
        small_of(choose(listing("consolidated.safetensors", *wanted, "tokenizer.model.bak.txt", "LICENSE"))) == wanted
    )


def test_nothing_from_folders_or_outside() -> None:
    names = [
        "original/params.json",
        "original/consolidated.00.pth",
        "../config.json",
        "..\\config.json",
        "model.safetensors",
    ]
    assert [file.path for file in choose(listing(*names)).files] == ["model.safetensors"]


def test_a_set_in_the_cache_is_used_rather_than_fetching_the_other() -> None:
    names = ["params.json", "config.json", "consolidated.safetensors", *shards("model", 2)]
    assert weights_of(choose(listing(*names), cached=set(shards("model", 2)))) == shards("model", 2)
    assert weights_of(choose(listing(*names), cached=set(shards("model", 2)[:1]))) == ["consolidated.safetensors"]


def test_an_incomplete_set_is_left_out_when_another_is_whole() -> None:
    chosen = choose(listing("params.json", *shards("consolidated", 3)[:2], "model.safetensors"))
    assert weights_of(chosen) == ["model.safetensors"]
    assert chosen.note.endswith("left out: 2 files of consolidated safetensors (9.3 GiB), incomplete")


def test_shards_of_two_countings() -> None:
    names = [*shards("model", 3)[:2], *shards("model", 2)]
    assert weights_of(choose(listing(*names))) == shards("model", 2)


def refused(*names: str, layout: str = "auto") -> str:
    with pytest.raises(FetchError) as caught:
        choose(listing(*names), layout, where="ann/model")
    return str(caught.value)


def test_missing_shards_are_named() -> None:
    assert refused("config.json", *shards("model", 4)[1:3]) == (
        "ann/model: 2 of the 4 files of model safetensors missing; "
        "found no model-00001-of-00004.safetensors, model-00004-of-00004.safetensors."
    )
    many = refused(shards("model", 8)[0])
    assert "7 of the 8 files of model safetensors missing" in many
    assert many.endswith("model-00006-of-00008.safetensors, ...")


def test_a_missing_numbered_pickle_is_named() -> None:
    assert "found no consolidated.01.pth" in refused("consolidated.00.pth", "consolidated.02.pth")


def test_layout_that_the_repository_lacks() -> None:
    assert refused("model.safetensors", layout="mistral") == (
        "ann/model: no weights in the layout 'mistral'; found model.safetensors (4.7 GiB). "
        "Write `layout: auto` in the card's source."
    )


def test_no_weights_at_all() -> None:
    assert refused("model-q4.gguf", "config.json") == (
        "ann/model: no weights that zoo can read; found model-q4.gguf, config.json; "
        "expected consolidated*.safetensors, model*.safetensors, consolidated.*.pth or pytorch_model*.bin."
    )
    assert "found no file at all" in refused()


def test_several_unknown_safetensors_are_not_guessed_between() -> None:
    assert "no weights that zoo can read" in refused("a.safetensors", "b.safetensors")
