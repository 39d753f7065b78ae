"""Every built-in card against figures that do not come from the cards."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import yaml

import zoo
from zoo.registry.card import Card, load_card
from zoo.registry.plan import Plan
from zoo.registry.resolve import resolve

CARDS = Path(__file__).parent.parent / "cards"
EVERY_FILE = sorted(CARDS.rglob("*.yaml"))
FILES = [file for file in EVERY_FILE if load_card(file.stem).unsupported is None]

# family -> card -> parameters, or these and the ones that a token uses: the counts of the published checkpoints.
COUNTS: dict[str, dict[str, int | list[int]]] = yaml.safe_load(
    (Path(__file__).parent / "parameters.yaml").read_text(encoding="utf-8")
)
EVERY_COUNT = {name: count for counts in COUNTS.values() for name, count in counts.items()}
MISTRAL = COUNTS["mistral"]

# Vocabulary size -> the tokenizer versions that have it.
VERSIONS = {32000: {"v1"}, 32768: {"v2", "v3", "v7"}, 131072: {"v3", "v7", "v11", "v13", "v15"}, 204800: {"v15"}}
LICENSES = {"apache-2.0", "mnpl-0.1", "mrl-0.1", "llama2", "qwen", "qwen-research"}
LICENSES |= {"jamba-open-model-license", "nvidia-open-model-license"}
LICENSES |= {"nvidia-internal-scientific-research-and-development-model-license"}
LICENSES |= {"cc-by-nc-4.0", "falcon-mamba-7b-license", "llama3", "llama3.1", "llama3.2", "llama3.3", "mit", "gemma"}
LICENSES |= {"deepseek", "modified-mit", "other"}


@cache
def plan(name: str) -> Plan:
    return resolve(load_card(name))


def mistral() -> list[Card]:
    return [load_card(file.stem) for file in FILES if file.parent.name == "mistral"]


@pytest.mark.parametrize("family", COUNTS)
def test_every_card_is_counted(family: str) -> None:
    assert {file.stem for file in FILES if file.parent.name == family} == set(COUNTS[family])


def test_every_family_is_counted() -> None:
    assert {file.parent.name for file in FILES} - {"tiny"} == set(COUNTS)


@pytest.mark.parametrize("name", EVERY_COUNT)
def test_parameters_are_exactly_the_published_ones(name: str) -> None:
    expected = EVERY_COUNT[name]
    total, active = expected if isinstance(expected, list) else (expected, expected)
    inspection = zoo.inspect(name)
    assert (inspection.parameters, inspection.active_parameters) == (total, active)


@pytest.mark.parametrize("file", EVERY_FILE, ids=lambda file: file.stem)
def test_card_says_what_it_is(file: Path) -> None:
    card = load_card(file.stem)
    assert card.name == file.stem
    assert re.fullmatch(r"[A-Z].{20,120}\.", card.summary)
    assert card.license in LICENSES
    assert ("chat" in card.text.features) == (card.text.chat != "none")


def test_published_checkpoints_have_their_day_and_place() -> None:
    for card in mistral():
        assert card.family == "mistral"
        assert card.released is not None
        assert card.released.year in (2023, 2024, 2025, 2026)
        assert re.fullmatch(r"mistral(ai|-community)/[\w.-]+", card.source.hub or ""), card.name


@pytest.mark.parametrize("name", MISTRAL)
def test_tokenizer_version_fits_the_vocabulary(name: str) -> None:
    card = load_card(name)
    assert isinstance(card.text.tokenizer, dict)
    assert card.text.tokenizer["version"] in VERSIONS[card.model["vocab_size"]]


def test_features_follow_the_tokenizer() -> None:
    """Tools have tokens from v2 on, fill-in-the-middle from v3 on."""
    for card in mistral():
        assert isinstance(card.text.tokenizer, dict)
        if card.text.tokenizer["version"] == "v1":
            assert not {"tools", "fim"} & set(card.text.features), card.name


def test_families_have_their_day_and_place() -> None:
    """A family's cards stand in its folder, say where their weights are, and no two mean the same."""
    for file in EVERY_FILE:
        card = load_card(file.stem)
        if file.parent.name != "tiny":
            assert card.family == file.parent.name
            assert card.released is not None and card.source.hub is not None
    cards = [load_card(name) for name in EVERY_COUNT]
    for values in ([card.summary for card in cards], [card.source.hub for card in cards]):
        assert [value for value, count in Counter(values).items() if count > 1] == []


def test_windows() -> None:
    """Only Mistral 7B v0.1 has a window in every layer, and Ministral 8B in three of four."""
    attention = [name for name in MISTRAL if plan(name).model.layers[0].mixer.kind == "attention"]  # type: ignore[attr-defined]
    windows = {name: [layer.mixer.window for layer in plan(name).model.layers] for name in attention}  # type: ignore[attr-defined]
    assert windows.pop("mistral-7b-v0.1") == windows.pop("mistral-7b-instruct-v0.1") == [4096] * 32
    assert windows.pop("ministral-8b-instruct") == [None, 32768, 32768, 32768] * 9
    assert {window for layers in windows.values() for window in layers} == {None}


@pytest.mark.parametrize("name", EVERY_COUNT)
def test_card_survives_being_printed(name: str, tmp_path: Path) -> None:
    file = tmp_path / f"{name}.yaml"
    file.write_text(load_card(name).to_yaml(), encoding="utf-8")
    assert resolve(load_card(file)).model == plan(name).model
