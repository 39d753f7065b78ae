"""The card's own fields, inheritance, overrides, printing, and the built-in cards."""

from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from zoo.registry.card import Card, Source, Text, list_cards, load_card
from zoo.registry.catalog import Catalog, Resource
from zoo.registry.errors import CardError
from zoo.registry.manager import Manager, manager
from zoo.registry.node import Node

Change = Callable[[str, str], Card]
Write = Callable[..., Card]

HEAD = "context_length: 64"
KEYS = "name, extends, family, summary, license, released, context_length, source, text, unsupported, model"

MISTAKES = {
    "no name": ("name: small\n", "", "1: the key 'name' is missing. It gives: Name of the checkpoint."),
    "no context": (HEAD, "", "1: the key 'context_length' is missing. It gives: The longest sequence in tokens."),
    "name": (
        "name: small",
        "name: a/b",
        "1: name: wrong value; found the text 'a/b'; expected letters, digits, dots, dashes and underscores.",
    ),
    "name is a number": (
        "name: small",
        "name: 7",
        "1: name: wrong value; found 7; expected letters, digits, dots, dashes and underscores.",
    ),
    "unknown key": (
        HEAD,
        HEAD + "\nlicence: mit",
        f"3: licence: unknown key 'licence'; expected one of {KEYS}. Did you mean 'license'?",
    ),
    "negative": (
        HEAD,
        "context_length: -1",
        "2: context_length: wrong value; found -1; expected a value greater than 0.",
    ),
    "quoted": (
        HEAD,
        "context_length: '64'",
        "2: context_length: wrong value; found the text '64'; expected an integer.",
    ),
    "truth": (HEAD, "context_length: true", "2: context_length: wrong value; found true; expected an integer."),
    "year": (HEAD, HEAD + "\nreleased: 2023", "3: released: wrong value; found 2023; expected a day as YYYY-MM-DD."),
    "no such day": (
        HEAD,
        HEAD + "\nreleased: 2023-02-30",
        "3: released: wrong value; found the text '2023-02-30'; expected a day of the calendar.",
    ),
    "source": (HEAD, HEAD + "\nsource: x/y", "3: source: wrong value; found the text 'x/y'; expected a mapping."),
    "source key": (
        HEAD,
        HEAD + "\nsource:\n  dtype: float32\n  hubb: a/b",
        "5: source.hubb: unknown key 'hubb'; expected one of hub, path, revision, layout, dtype. Did you mean 'hub'?",
    ),
    "two sources": (
        HEAD,
        HEAD + "\nsource: {hub: a/b, path: c}",
        "3: source: `hub` and `path` both say where the weights are; expected one of them.",
    ),
    "revision alone": (
        HEAD,
        HEAD + "\nsource: {revision: main}",
        "3: source.revision: a revision belongs to a hub repository; expected `hub` beside it.",
    ),
    "dtype": (
        HEAD,
        HEAD + "\nsource: {dtype: bf16}",
        "3: source.dtype: wrong value; found 'bf16'; expected 'float32', 'bfloat16' or 'float16'. "
        "Did you mean 'bfloat16'?",
    ),
    "feature": (
        HEAD,
        HEAD + "\ntext: {features: [chat, tool]}",
        "3: text.features.1: wrong value; found 'tool'; expected 'chat', 'system', 'tools', 'fim', 'vision', 'audio' "
        "or 'thinking'. Did you mean 'tools'?",
    ),
    "features": (
        HEAD,
        HEAD + "\ntext: {features: chat}",
        "3: text.features: wrong value; found the text 'chat'; expected a list.",
    ),
    "tokenizer": (
        HEAD,
        HEAD + "\ntext: {tokenizer: [mistral]}",
        "3: text.tokenizer: wrong value; found a list of 1; expected a mapping with `kind`, or a kind's name.",
    ),
    "unknown parent": (
        HEAD,
        HEAD + "\nextends: mixtral-8x7",
        "3: extends: unknown card 'mixtral-8x7'. Did you mean 'mixtral-8x7b'?",
    ),
    "parent file": (HEAD, HEAD + "\nextends: ./no.yaml", "3: extends: there is no card file at no.yaml."),
    "parent type": (
        HEAD,
        HEAD + "\nextends: [a]",
        "3: extends: wrong value; found a list of 1; expected a card's name or path.",
    ),
    "own parent": (
        HEAD,
        HEAD + "\nextends: ./small.yaml",
        "3: extends: cards extend each other in a circle; found small extends small.",
    ),
}


@pytest.mark.parametrize(("old", "new", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_card_is_placed_and_explained(old: str, new: str, message: str, changed: Change) -> None:
    with pytest.raises(CardError) as caught:
        changed(old, new)
    assert str(caught.value) == f"small.yaml:{message}"


def test_model_must_be_a_mapping(write: Write) -> None:
    with pytest.raises(CardError) as caught:
        write("name: a\ncontext_length: 8\nmodel: [1]\n")
    assert str(caught.value) == "small.yaml:3: model: wrong value; found a list of 1; expected a mapping."


def test_where_gives_the_nearest_place(changed: Change) -> None:
    card = changed(HEAD, HEAD)
    assert card.where(("model", "layers", 0, "ffn")) == "small.yaml:10"
    assert card.where(("model", "layers", 0, "mixer", "window")) == "small.yaml:9"
    assert card.where(()) == card.where(("text",)) == "small.yaml:1"
    assert card.file == "small.yaml"


# -- files and names


def test_an_unknown_name_gets_near_ones() -> None:
    with pytest.raises(CardError, match=r"unknown card 'mixtral-8x7b-instrct'\. Did you mean 'mixtral-8x7b-instruct'"):
        load_card("mixtral-8x7b-instrct")
    with pytest.raises(CardError, match=r"^unknown card 'qqqqqq'\. See `zoo list`\.$"):
        load_card("qqqqqq")


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("./none.yaml", "there is no card file at none.yaml"),
        ("none.yml", "there is no card file at none.yml"),
        (Path("none"), "there is no card file at none"),
        ("x" * 5000 + ".yaml", f"not a path; found '{'x' * 60}': File name too long"),
        ("./folder", "folder is a folder; expected a card file"),
    ],
)
def test_a_path_that_is_no_card(ref: str | Path, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    with pytest.raises(CardError, match=message):
        load_card(ref)


def test_paths_may_have_spaces_and_other_scripts(write: Write, card_text: str, tmp_path: Path) -> None:
    assert write(card_text, "ma carte é.yaml").name == "small"
    assert load_card(tmp_path / "ma carte é.yaml").name == "small"


def test_a_registered_card_is_named_like_its_file(tmp_path: Path, card_text: str) -> None:
    (tmp_path / "other.yaml").write_text(card_text)
    catalog = Catalog(cards={"other": Resource("other", tmp_path / "other.yaml", "someone")})
    with pytest.raises(CardError, match=r"other\.yaml:1: name: a card's name is its file's; found 'small'; expected"):
        load_card("other", catalog)


def test_a_plugins_faulty_card_costs_a_warning(
    tmp_path: Path, card_text: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "small.yaml").write_text(card_text)
    (tmp_path / "bad.yaml").write_text("name: bad\ncontext_length: no\n")
    cards = {name: Resource(name, tmp_path / f"{name}.yaml", "someone") for name in ("bad", "small")}
    assert [card.name for card in list_cards(Catalog(cards=cards))] == ["small"]
    assert len(caplog.messages) == 1 and "card 'bad' of plugin 'someone' is left out" in caplog.text
    built_in = {"bad": Resource("bad", tmp_path / "bad.yaml", "zoo.cards")}
    with pytest.raises(CardError, match=r"bad\.yaml:2: context_length: wrong value"):
        list_cards(Catalog(cards=built_in))


# -- extends


@pytest.fixture
def family(tmp_path: Path, card_text: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Card]:
    """Writes a child of `small.yaml`, which has a source and text, and loads it."""
    monkeypatch.chdir(tmp_path)
    parent = card_text + "source: {hub: a/b, revision: r1, dtype: float16}\n"
    Path("small.yaml").write_text(parent + "text: {tokenizer: {kind: mistral, version: v3}, features: [chat]}\n")

    def family(text: str) -> Card:
        Path("child.yaml").write_text(f"name: child\nextends: ./small.yaml\n{text}")
        return load_card("./child.yaml")

    return family


def test_a_child_merges_mappings_and_replaces_the_rest(family: Callable[[str], Card]) -> None:
    card = family("model: {vocab_size: 99}\ntext: {tokenizer: {version: v7}, features: [fim, chat]}\n")
    assert (card.name, card.extends, card.context_length) == ("child", "./small.yaml", 64)
    assert (card.model["vocab_size"], card.model["dim"]) == (99, 16)
    assert card.text.tokenizer == {"kind": "mistral", "version": "v7"}
    assert card.text.features == ["fim", "chat"]
    assert card.where(("model", "vocab_size")) == "child.yaml:3"
    assert card.where(("model", "dim")) == "small.yaml:4"


def test_a_node_of_another_kind_replaces_its_parents(family: Callable[[str], Card]) -> None:
    assert family("text: {tokenizer: {kind: huggingface}}\n").text.tokenizer == {"kind": "huggingface"}


def test_a_list_replaces_its_parents(family: Callable[[str], Card]) -> None:
    assert family("model: {layers: [{repeat: 1}]}\n").model["layers"] == [{"repeat": 1}]


def test_another_place_of_weights_drops_the_parents_revision(family: Callable[[str], Card]) -> None:
    assert family("").source == Source(hub="a/b", revision="r1", dtype="float16")
    assert family("source: {hub: c/d}\n").source == Source(hub="c/d", dtype="float16")
    assert family("source: {path: here}\n").source == Source(path="here", dtype="float16")
    assert family("source: {revision: r2}\n").source == Source(hub="a/b", revision="r2", dtype="float16")


def test_a_child_needs_its_own_name(family: Callable[[str], Card], tmp_path: Path) -> None:
    family("")
    (tmp_path / "child.yaml").write_text("extends: ./small.yaml\n")
    with pytest.raises(CardError, match=r"child\.yaml:1: the key 'name' is missing"):
        load_card("./child.yaml")


def test_a_fault_of_the_parent_is_placed_in_the_parent(family: Callable[[str], Card], tmp_path: Path) -> None:
    text = (tmp_path / "small.yaml").read_text()
    (tmp_path / "small.yaml").write_text(text.replace("context_length: 64", "context_length: x"))
    with pytest.raises(CardError, match=r"^small\.yaml:2: context_length: wrong value"):
        family("")


def test_parents_are_found_beside_the_card_that_names_them(tmp_path: Path, card_text: str) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "small.yaml").write_text(card_text)
    (tmp_path / "deep/middle.yaml").write_text("name: middle\nextends: ../small.yaml\nfamily: m\n")
    (tmp_path / "child.yaml").write_text("name: child\nextends: deep/middle.yaml\n")
    card = load_card(tmp_path / "child.yaml")
    assert (card.name, card.family, card.context_length) == ("child", "m", 64)


def test_a_circle_of_parents_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, parent in ("ab", "bc", "cb"):
        Path(f"{name}.yaml").write_text(f"name: {name}\nextends: ./{parent}.yaml\n")
    with pytest.raises(CardError) as caught:
        load_card("./a.yaml")
    assert str(caught.value) == (
        "c.yaml:2: extends: cards extend each other in a circle; found a extends b extends c extends b."
    )


def test_a_circle_of_parents_that_each_spell_another_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d").mkdir()
    Path("d/a.yaml").write_text("name: a\nextends: ../d/b.yaml\n")
    Path("d/b.yaml").write_text("name: b\nextends: ../d/a.yaml\n")
    with pytest.raises(CardError, match="cards extend each other in a circle"):
        load_card("./d/a.yaml")


# -- overrides


def test_overrides_change_nested_values(changed: Change) -> None:
    card = changed(HEAD, HEAD)
    new = card.with_overrides({"model.layers.0.mixer.window": 8, "context_length": 32, "source.dtype": "float32"})
    assert new.model["layers"][0]["mixer"]["window"] == 8
    assert (new.context_length, new.source.dtype) == (32, "float32")
    assert new.where(("context_length",)) == "override"
    assert "window" not in card.model["layers"][0]["mixer"] and card.context_length == 64
    assert card.with_overrides({"model.norm": {"kind": "other"}}).model["norm"] == {"kind": "other"}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "context_length",
            "8",
            "override: context_length: wrong value; found the text '8'; expected an integer.",
        ),
        (
            "contxt",
            8,
            f"override: contxt: unknown key 'contxt'; expected one of {KEYS}. Did you mean 'text' or 'context_length'?",
        ),
        (
            "model.layers.1.ffn",
            8,
            "override: model.layers has no item 1; expected an index from 0 to 0.",
        ),
        (
            "model.layers.x.ffn",
            8,
            "override: model.layers has no item 'x'; expected an index from 0 to 0.",
        ),
        (
            "model.dim.x",
            8,
            "override: cannot set 'x' inside model.dim; found 16; expected a mapping.",
        ),
    ],
)
def test_an_override_that_fits_nowhere(key: str, value: Any, message: str, changed: Change) -> None:
    with pytest.raises(CardError) as caught:
        changed(HEAD, HEAD).with_overrides({key: value})
    assert str(caught.value) == message


# -- printing


def test_a_printed_card_reads_back(write: Write, changed: Change) -> None:
    card = changed(HEAD, HEAD + "\nreleased: 2023-12-11\nlicense: '1e6'\nfamily: 'no'\nsummary: '~'")
    text = card.to_yaml()
    again = write(text, "again.yaml")
    assert again.to_dict() == card.to_dict() and again.model_dump() == card.model_dump()
    assert "released: 2023-12-11\n" in text and "eps: 1.0e-05" in text and "license: '1e6'" in text
    assert again.released == date(2023, 12, 11) and again.family == "no"


@pytest.mark.parametrize("name", sorted(manager().cards()))
def test_every_built_in_card_is_complete_and_reads_back(name: str, write: Write) -> None:
    card = load_card(name)
    assert card.family and card.summary.endswith(".") and card.license
    assert card.released or card.family == "zoo"
    assert name == name.lower()
    again = write(card.to_yaml(), "again.yaml")
    assert again.extends is None
    assert again.model_dump(exclude={"extends"}) == card.model_dump(exclude={"extends"})


def test_a_card_from_plain_values(changed: Change) -> None:
    card = changed(HEAD, HEAD)
    assert Card.from_dict(card.to_dict()).model_dump() == card.model_dump()
    with pytest.raises(CardError, match=r"^params\.json: context_length: wrong value; found the text 'x'"):
        Card.from_dict({**card.to_dict(), "context_length": "x"}, origin="params.json")
    child = Card.from_dict({"name": "c", "extends": "mixtral-8x7b", "context_length": 8})
    assert child.family == "mistral" and child.context_length == 8


# -- every field is consumed

OBSERVED: dict[str, tuple[str, Callable[[Card], Any]]] = {
    "name": ("other", lambda card: card.name),
    "extends": ("mixtral-8x7b", lambda card: card.license),
    "family": ("f", lambda card: card.family),
    "summary": ("s", lambda card: card.summary),
    "license": ("l", lambda card: card.license),
    "released": ("2024-01-02", lambda card: card.released),
    "context_length": ("32", lambda card: _resolved(card).context_length),
    "source": ("{hub: x/y}", lambda card: card.source.hub),
    "text": ("{features: [fim]}", lambda card: card.text.features),
    "model": ("{dim: 3}", lambda card: card.model),
    "source.hub": ("x/y", lambda card: card.source.hub),
    "source.path": ("w", lambda card: card.local_path()),
    "source.revision": ("r", lambda card: card.source.revision),
    "source.layout": ("mistral", lambda card: card.source.layout),
    "source.dtype": ("float32", lambda card: card.source.dtype),
    "text.tokenizer": ("huggingface", lambda card: _plan(card).tokenizer),
    "text.chat": ("none", lambda card: _plan(card).chat),
    "text.features": ("[tools]", lambda card: card.text.features),
}


def _plan(card: Card) -> Any:
    from zoo.registry.resolve import resolve

    return resolve(card)


def _resolved(card: Card) -> Any:
    return _plan(card).model


@pytest.mark.parametrize("field", OBSERVED)
def test_every_field_of_a_card_has_an_effect(field: str, changed: Change) -> None:
    from zoo.registry.card import flatten
    from zoo.registry.node import put, undotted
    from zoo.registry.reader import read

    value, observe = OBSERVED[field]
    base = changed(HEAD, HEAD + "\nsource: {hub: a/b}") if field == "source.revision" else changed(HEAD, HEAD)
    tree: Node = flatten(put(base.tree, undotted(field), read(value, "value")), manager().catalog)
    assert observe(Card.from_node(tree)) != observe(base)


def test_the_table_above_names_every_field() -> None:
    nested: dict[str, type[BaseModel]] = {"source": Source, "text": Text}
    named = {*Card.model_fields, *(f"{key}.{field}" for key, part in nested.items() for field in part.model_fields)}
    assert named - {"unsupported"} == set(OBSERVED)


def test_a_card_has_a_model_or_says_what_is_not_supported(write: Write, changed: Change) -> None:
    card = write("name: voice\ncontext_length: 64\nunsupported: 'text-to-speech: no decoder'\n", "voice.yaml")
    with pytest.raises(CardError, match=r"voice\.yaml:3: unsupported: zoo cannot run voice yet: text-to-speech"):
        _plan(card)
    assert Card.from_dict(card.to_dict()).unsupported == card.unsupported
    with pytest.raises(CardError, match=r":1: the key 'model' is missing\. It gives: Tree of components"):
        write("name: voice\ncontext_length: 64\n", "voice.yaml")
    with pytest.raises(CardError, match=r":3: unsupported: a model that zoo cannot compute has no tree; expected no"):
        changed(HEAD, HEAD + "\nunsupported: speech")


def test_the_weights_folder_is_beside_the_file_that_names_it(tmp_path: Path, card_text: str) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/small.yaml").write_text(card_text + "source: {path: weights}\n")
    (tmp_path / "child.yaml").write_text("name: child\nextends: deep/small.yaml\n")
    assert load_card(tmp_path / "child.yaml").local_path() == tmp_path / "deep/weights"
    assert load_card("mixtral-8x7b").local_path() is None


def test_listing_knows_every_card() -> None:
    assert [card.name for card in list_cards()] == sorted(Manager(installed=False).cards())
