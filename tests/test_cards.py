"""Every built-in card against figures that do not come from the cards."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

import zoo
from zoo.registry.card import Card, load_card
from zoo.registry.plan import Plan
from zoo.registry.resolve import resolve

CARDS = Path(__file__).parent.parent / "cards"
FILES = sorted(CARDS.rglob("*.yaml"))

MISTRAL_7B, MISTRAL_7B_V3 = 7_241_732_096, 7_248_023_552
SMALL_22B, NEMO, LARGE, SMALL_24B = 22_247_282_688, 12_247_782_400, 122_610_069_504, 23_572_403_200

# Parameters, and those that one token uses where they are fewer: counts of the published checkpoints.
PARAMETERS: dict[str, int | tuple[int, int]] = {
    "mistral-7b-v0.1": MISTRAL_7B,
    "mistral-7b-instruct-v0.1": MISTRAL_7B,
    "mistral-7b-v0.2": MISTRAL_7B,
    "mistral-7b-instruct-v0.2": MISTRAL_7B,
    "mistral-7b-v0.3": MISTRAL_7B_V3,
    "mistral-7b-instruct-v0.3": MISTRAL_7B_V3,
    "mathstral-7b": MISTRAL_7B_V3,
    "mixtral-8x7b": (46_702_792_704, 12_879_925_248),
    "mixtral-8x7b-instruct": (46_702_792_704, 12_879_925_248),
    "mixtral-8x22b": (140_620_634_112, 39_152_031_744),
    "mixtral-8x22b-instruct": (140_630_071_296, 39_161_468_928),
    "codestral-22b": SMALL_22B,
    "mistral-nemo-base": NEMO,
    "mistral-nemo-instruct": NEMO,
    "mistral-large-2407": LARGE,
    "mistral-large-2411": LARGE,
    "mistral-small-2409": SMALL_22B,
    "mistral-small-base-2501": SMALL_24B,
    "mistral-small-instruct-2501": SMALL_24B,
    "ministral-8b-instruct": 8_019_808_256,
    "devstral-small-2505": SMALL_24B,
    "devstral-small-2507": SMALL_24B,
    "magistral-small-2506": SMALL_24B,
    "magistral-small-2507": SMALL_24B,
}

# Vocabulary size -> the tokenizer versions that have it.
VERSIONS = {32000: {"v1"}, 32768: {"v2", "v3", "v7"}, 131072: {"v3", "v7", "v11", "v13", "v15"}}
LICENSES = {"apache-2.0", "mnpl-0.1", "mrl-0.1"}


@cache
def plan(name: str) -> Plan:
    return resolve(load_card(name))


def mistral() -> list[Card]:
    return [load_card(file.stem) for file in FILES if file.parent.name == "mistral"]


def test_every_mistral_card_is_counted() -> None:
    assert {file.stem for file in FILES if file.parent.name == "mistral"} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_exactly_the_published_ones(name: str) -> None:
    expected = PARAMETERS[name]
    total, active = expected if isinstance(expected, tuple) else (expected, expected)
    inspection = zoo.inspect(name)
    assert (inspection.parameters, inspection.active_parameters) == (total, active)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
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
        assert card.released.year in (2023, 2024, 2025)
        assert re.fullmatch(r"mistral(ai|-community)/[\w.-]+", card.source.hub or ""), card.name


def test_no_two_cards_have_one_summary_or_one_repository() -> None:
    for values in ([card.summary for card in mistral()], [card.source.hub for card in mistral()]):
        assert [value for value, count in Counter(values).items() if count > 1] == []


@pytest.mark.parametrize("name", PARAMETERS)
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


def test_windows() -> None:
    """Only Mistral 7B v0.1 has a window in every layer, and Ministral 8B in three of four."""
    windows = {name: [layer.mixer.window for layer in plan(name).model.layers] for name in PARAMETERS}  # type: ignore[attr-defined]
    assert windows.pop("mistral-7b-v0.1") == windows.pop("mistral-7b-instruct-v0.1") == [4096] * 32
    assert windows.pop("ministral-8b-instruct") == [None, 32768, 32768, 32768] * 9
    assert {window for layers in windows.values() for window in layers} == {None}


@pytest.mark.parametrize("name", PARAMETERS)
def test_card_survives_being_printed(name: str, tmp_path: Path) -> None:
    file = tmp_path / f"{name}.yaml"
    file.write_text(load_card(name).to_yaml(), encoding="utf-8")
    assert resolve(load_card(file)).model == plan(name).model
