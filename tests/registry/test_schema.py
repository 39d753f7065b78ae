"""The JSON Schema accepts every card that resolves and refuses what cards may not say."""

from collections.abc import Callable
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from zoo.registry.card import Card, list_cards
from zoo.registry.catalog import Catalog, Entry
from zoo.registry.manager import Manager, manager
from zoo.registry.reader import read
from zoo.registry.schema import schema

Change = Callable[[str, str], Card]


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    found = schema()
    Draft202012Validator.check_schema(found)
    return Draft202012Validator(found)


def test_every_card_is_valid_as_written_and_flat(validator: Draft202012Validator) -> None:
    for card in list_cards():
        validator.validate(card.to_dict())
        text = manager().catalog.find_card(card.name).file.read_text()
        validator.validate(read(text, "card").plain())


FFN = "ffn: {kind: gated, hidden_dim: 24}"
MIXER = "mixer: {kind: attention,"

VALID = {
    "bare kind": ("name: small", "name: small\ntext: {tokenizer: huggingface, chat: none}"),
    "no positions": ("rope: {theta: 1.0e4}", "rope: null"),
    "another rope": ("rope: {theta: 1.0e4}", "rope: {kind: linear, theta: 1.0e4, factor: 2.0}"),
    "cache": ("head_dim: 4,", "head_dim: 4, window: 8, cache: {kind: full},"),
    "cache by name": ("head_dim: 4,", "head_dim: 4, cache: full,"),
    "inherited norm": ("      ffn", "      norm: {kind: rms, eps: 1.0e-6}\n      ffn"),
    "block kind": ("repeat: 2", "repeat: 2\n      kind: prenorm"),
    "pattern": ("    - repeat: 2\n", f"    - repeat: 2\n      pattern: [{{mixer: {{kind: attention, num_heads: 1, "
        f"num_kv_heads: 1, head_dim: 2, rope: null}}, {FFN}}}]\n    - repeat: 1\n"),
    "mixture": (FFN, "ffn: {kind: moe, num_experts: 2, experts_per_token: 1, expert: {kind: gated, hidden_dim: 3}}"),
    "settings": ("head_dim: 4,", "head_dim: 4, query_scaling: {beta: 0.1, original_context: 9},"),
}  # fmt: skip

INVALID = {
    "unknown key": ("vocab_size", "vocab_sizes"),
    "unknown kind": ("kind: gated", "kind: gatd"),
    "missing kind": ("kind: gated, ", ""),
    "missing key": (", hidden_dim: 24", ""),
    "bare kind that needs more": (FFN, "ffn: gated"),
    "inherited key": ("hidden_dim: 24", "hidden_dim: 24, dim: 16"),
    "type": ("dim: 16", "dim: '16'"),
    "repeat": ("repeat: 2", "repeat: 0"),
    "repeat in a slot": ("hidden_dim: 24", "hidden_dim: 24, repeat: 2"),
    "pattern and mixer": ("repeat: 2", f"pattern: [{{mixer: {{kind: attention, num_heads: 1, num_kv_heads: 1, "
        f"head_dim: 2, rope: null}}, {FFN}}}]"),
    "empty pattern": ("    - repeat: 2\n", "    - pattern: []\n    - repeat: 2\n"),
    "no positions unsaid": (", rope: {theta: 1.0e4}", ""),
    "settings": ("head_dim: 4,", "head_dim: 4, query_scaling: {beta: 0.1},"),
    "top": ("context_length: 64", "context_length: 64\nlicence: x"),
    "name": ("name: small", "name: a b"),
    "source": ("name: small", "name: small\nsource: {dtype: int8}"),
    "layout": ("name: small", "name: small\nsource: {layout: mistrl}"),
    "chat": ("name: small", "name: small\ntext: {chat: mistrl}"),
    "model of what is not supported": ("name: small", "name: small\nunsupported: speech"),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new"), VALID.values(), ids=VALID)
def test_valid_cards(old: str, new: str, validator: Draft202012Validator, changed: Change) -> None:
    from zoo.registry.resolve import resolve

    card = changed(old, new)
    resolve(card)
    validator.validate(card.to_dict())


@pytest.mark.parametrize(("old", "new"), INVALID.values(), ids=INVALID)
def test_invalid_cards(old: str, new: str, validator: Draft202012Validator, card_text: str) -> None:
    assert old in card_text
    plain = read(card_text.replace(old, new, 1), "card").plain()
    assert not validator.is_valid(plain)


def test_a_card_with_a_parent_may_leave_anything_out(validator: Draft202012Validator) -> None:
    validator.validate({"name": "a", "extends": "b", "text": {"tokenizer": {"version": "v3"}}, "model": {"dim": 3}})
    assert not validator.is_valid({"name": "a", "extends": "b", "modle": {}})


def test_fields_carry_their_descriptions() -> None:
    found: dict[str, Any] = schema()
    block = found["$defs"]["block.prenorm.run"]["properties"]
    assert block["mixer"]["description"] and block["repeat"]["minimum"] == 1
    assert "dim" not in found["$defs"]["mixer.attention"]["properties"]
    assert found["$defs"]["mixer.attention"]["description"].startswith("Attention whose query heads")


def test_a_component_that_cannot_be_imported_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    found = Manager(installed=False).catalog
    entry = Entry("ffn", "a", "zoo_test_none:Spec", "someone")
    broken = Catalog({**found.components, ("ffn", "a"): entry}, layouts=found.layouts)
    assert schema(broken) == schema(found)
    assert len(caplog.messages) == 1 and "ffn 'a' is left out of the schema" in caplog.text
