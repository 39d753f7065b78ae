"""YAML as cards use it: places, scalars, and every malformed file with the message it must give."""

from pathlib import Path

import pytest
import yaml

from zoo.registry import reader
from zoo.registry.errors import CardError
from zoo.registry.node import Node
from zoo.registry.reader import read, read_card

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcd", "bcde", strict=True)
)

MALFORMED: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "c.yaml: the card is empty; expected a mapping with `name`, `model`, ..."),
    "comments": ("# nothing\n", "c.yaml: the card is empty; expected a mapping with `name`, `model`, ..."),
    "list": ("[1, 2]\n", "c.yaml:1: a card is a mapping; found a list; expected `key: value` lines."),
    "word": (
        "\nhello\n",
        "c.yaml:2: a card is a mapping; found the single value 'hello'; expected `key: value` lines.",
    ),
    "binary": (b"\x89PNG\r\n\0\0", "c.yaml: not a text file; found binary data; expected a YAML card in UTF-8."),
    "utf-16": (
        "name: a".encode("utf-16"),
        "c.yaml: not a text file; found binary data; expected a YAML card in UTF-8.",
    ),
    "latin-1": (b"name: a\nx: caf\xe9\n", "c.yaml:2: not UTF-8 text; found byte 0xe9. Save the file as UTF-8."),
    "too large": (b"#" * 1048577, "c.yaml: too large for a card; found 1048577 bytes; expected at most 1048576."),
    "control": ("a: \x07\n", "c.yaml:1: not valid YAML; found the control character U+0007."),
    "tab": ("a:\n\tb: 1\n", "c.yaml:2: a tab stands in the indentation; expected spaces. YAML forbids tabs."),
    "tab after spaces": (
        "a:\n  b: 1\n  \tc: 1\n",
        "c.yaml:3: a tab stands in the indentation; expected spaces. YAML forbids tabs.",
    ),
    "quote": (
        "a: 'b\nc: d\n",
        'c.yaml:1: not valid YAML: unexpected end of stream (while scanning a quoted scalar); found "a: \'b".',
    ),
    "colon": (
        "a: b: c\n",
        "c.yaml:1: not valid YAML: mapping values are not allowed in this context; found 'a: b: c'.",
    ),
    "alias": ("a: *b\n", "c.yaml:1: not valid YAML: undefined alias; found 'a: *b'."),
    "documents": (
        "a: 1\n---\nb: 1\n",
        "c.yaml:2: not valid YAML: another document (expected a single document in the stream); found '---'.",
    ),
    "duplicate": ("a: 1\nb: 2\na: 3\n", "c.yaml:3: the key 'a' stands twice; found the first on line 1."),
    "number as key": ("1: a\n", "c.yaml:1: keys are text; found '1'."),
    "list as key": ("[a]: b\n", "c.yaml:1: keys are text; found a collection."),
    "python": (
        "a: !!python/object/apply:os.system ['true']\n",
        "c.yaml:1: tags are not allowed in a card; found '!!python/object/apply:os.system'; expected plain values.",
    ),
    "tag": ("a: !!int 3\n", "c.yaml:1: tags are not allowed in a card; found '!!int'; expected plain values."),
    "own tag": ("a: !mine {b: 1}\n", "c.yaml:1: tags are not allowed in a card; found '!mine'; expected plain values."),
    "merged number": (
        "a: {<<: 3}\n",
        "c.yaml:1: `<<` merges mappings; expected an alias of a mapping, or a list of them.",
    ),
}

ENDLESS = {
    "aliases": BOMB,
    "own alias": "a: &a [*a]\n",
    "own merge": "a: &a {<<: *a}\n",
    "deep": "a: " + "[" * 400 + "]" * 400 + "\n",
}


@pytest.fixture(params=["c", "python"])
def either_parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both parsers of PyYAML: the one in C, and the one for machines without it."""
    if request.param == "python":
        monkeypatch.setattr(reader, "_Loader", reader.PythonLoader)
    return str(request.param)


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_card_is_one_error(name: str, either_parser: str) -> None:
    data, message = MALFORMED[name]
    with pytest.raises(CardError) as caught:
        read_card(data.encode() if isinstance(data, str) else data, "c.yaml")
    if either_parser == "c" or name not in ("quote", "alias", "colon"):  # their wording differs between the parsers
        assert str(caught.value) == message
    assert str(caught.value).startswith(message.partition(" ")[0])


@pytest.mark.parametrize("text", ENDLESS.values(), ids=ENDLESS)
def test_aliases_and_depth_are_limited(text: str, either_parser: str) -> None:
    with pytest.raises(CardError, match="too many values; expected at most 20000 values, 50 levels deep"):
        read_card(text.encode(), "c.yaml")


def test_depth_that_exhausts_the_parser_is_an_error(either_parser: str) -> None:
    with pytest.raises(CardError, match=r"^c\.yaml"):
        read_card(b"a: " + b"[" * 20000 + b"]" * 20000, "c.yaml")


SCALARS = [
    ("8", 8), ("-3", -3), ("+4", 4), ("010", 10), ("1.5", 1.5), ("1e6", 1e6), ("1.0E-5", 1e-5), 
    (".5", 0.5), ("1.", 1.0),
    ("true", True), ("False", False), ("null", None), ("~", None), ("", None), ("no", "no"), ("on", "on"),
    ("tRUE", "tRUE"), ("32_768", "32_768"), ("0x10", "0x10"), (".nan", ".nan"), ("2023-12-11", "2023-12-11"),
    ("'8'", "8"), ('"true"', "true"), ("v1", "v1"), ("1" * 21, int("1" * 21)), ("1e9999", "1e9999"),
    ("[1, a]", [1, "a"]), ("{a: {b: 1}}", {"a": {"b": 1}}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_scalars(text: str, value: object) -> None:
    found = read(text, "value").plain()
    assert found == value and type(found) is type(value)


def test_every_value_knows_its_line(either_parser: str) -> None:
    node = read("a: 1\nb:\n  c: [x,\n      y]\n  d:\n    e: 2\n", "f")
    assert [node.deepest(p).line for p in [("a",), ("b",), ("b", "c"), ("b", "c", 1), ("b", "d"), ("b", "d", "e")]] == [
        1, 2, 3, 4, 5, 6,
    ]  # fmt: skip
    assert node.deepest(("b", "c", 7, "x")).line == 3


def test_anchors_and_merge_keys() -> None:
    node = read("x: &x {a: 1, b: 2}\ny: &y {b: 3, c: 4}\nz:\n  <<: [*x, *y]\n  a: 9\nw: {<<: *x}\nv: *x\n", "f")
    assert node.plain()["z"] == {"a": 9, "b": 2, "c": 4}
    assert node.plain()["w"] == node.plain()["v"] == {"a": 1, "b": 2}
    assert node.deepest(("z", "c")).line == 2


def test_a_byte_order_mark_and_windows_lines_are_read(either_parser: str) -> None:
    node = read_card(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n", "f")
    assert node.plain() == {"a": 1, "b": 2} and node.deepest(("b",)).line == 2


def test_both_parsers_read_the_built_in_cards_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.resources import files

    from zoo.registry.catalog import card_files

    cards = [Path(str(file)).read_text(encoding="utf-8") for _, file in card_files(files("zoo.cards"))][:6]
    fast = [read(text, "f") for text in cards]
    monkeypatch.setattr(reader, "_Loader", reader.PythonLoader)
    assert yaml.__with_libyaml__ and fast and fast == [read(text, "f") for text in cards]
    assert all(isinstance(node, Node) for node in fast)
