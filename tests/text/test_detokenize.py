"""Streamed text equals whole text at every cut, and the whole text equals that of the tokenizers' own libraries."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zoo.registry.errors import RequestError
from zoo.text.detokenize import REPLACEMENT, Detokenizer, StopStrings
from zoo.text.tokenizer import Tokenizer

Open = Callable[[str], Tokenizer]
VERSIONS = ("v1", "v3", "v7", "v3-tekken", "v7-tekken")
TEXT = "Grüße, 世界! 안녕하세요 🦒👩‍👩‍👧🏽 naïve\n\n  two  spaces\t«ωμέγα» ﷽ 🇫🇷 end"
quick = settings(
    max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def chunks(ids: list[int], cuts: list[int]) -> list[list[int]]:
    edges = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    return [ids[a:b] for a, b in pairwise(edges)]


def streamed(tokenizer: Tokenizer, parts: list[list[int]], **options: Any) -> list[str]:
    stream = Detokenizer(tokenizer, **options)
    return [*[stream.push(part) for part in parts], stream.finish()]


@pytest.mark.parametrize("version", VERSIONS)
@quick
@given(data=st.data())
def test_random_ids_joined_equal_whole(version: str, mistral: Open, mistral_common: Any, data: st.DataObject) -> None:
    tokenizer = mistral(version)
    bytes_at = 1000 if "tekken" in version else 3 if version == "v1" else 771
    one = st.integers(bytes_at, bytes_at + 255) | st.integers(0, 40) | st.integers(0, tokenizer.vocab_size - 1)
    ids = data.draw(st.lists(one, max_size=40))
    cuts = data.draw(st.lists(st.integers(0, 40), max_size=6))
    whole = tokenizer.decode(ids)
    assert whole == mistral_common(version).decode(ids)
    for options in ({}, {"special": True}, {"continues": True}):
        assert "".join(streamed(tokenizer, chunks(ids, cuts), **options)) == tokenizer.decode(ids, **options)


@pytest.mark.parametrize("version", VERSIONS)
@quick
@given(text=st.text(max_size=30) | st.text("a 你🦒é\n", max_size=30))
def test_text_comes_back(version: str, mistral: Open, text: str) -> None:
    tokenizer = mistral(version)
    text = text.replace("\u2581", "")  # the sign that SentencePiece writes for a space
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("version", VERSIONS)
def test_token_by_token_never_splits_a_character(version: str, mistral: Open) -> None:
    tokenizer = mistral(version)
    ids = tokenizer.encode(TEXT)
    parts = streamed(tokenizer, [[i] for i in ids])
    assert "".join(parts) == TEXT
    assert REPLACEMENT not in "".join(parts)
    assert sum(not part for part in parts) > 5, "the text should hold characters of several tokens"


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_first_space_of_sentencepiece(version: str, mistral: Open) -> None:
    tokenizer = mistral(version)
    ids = tokenizer.encode("Hello world", bos=False)
    assert tokenizer.decode(ids) == "Hello world"
    assert tokenizer.decode(ids, continues=True) == " Hello world"
    assert streamed(tokenizer, [[i] for i in ids])[:2] == ["Hello", " world"]
    prompt, rest = tokenizer.encode("The capital of France is"), tokenizer.encode("Paris", bos=False)
    assert tokenizer.decode(prompt) + tokenizer.decode(rest, continues=True) == tokenizer.decode(prompt + rest)


@pytest.mark.parametrize("version", VERSIONS)
def test_special_ids_are_left_out_or_written(version: str, mistral: Open) -> None:
    tokenizer = mistral(version)
    ids = [*tokenizer.encode("Hi"), 2]
    assert tokenizer.decode(ids) == "Hi"
    assert tokenizer.decode(ids, special=True).replace(" ", "") == "<s>Hi</s>"


@pytest.mark.parametrize(("version", "lost"), [("v3", 2), ("v3-tekken", 1)])
def test_an_unfinished_character_at_the_end(version: str, lost: int, mistral: Open) -> None:
    tokenizer = mistral(version)
    first = 1000 if "tekken" in version else 771
    ids = [*tokenizer.encode("a"), first + 0xF0, first + 0x9F]
    stream = Detokenizer(tokenizer)
    assert stream.push(ids) == "a"
    assert stream.finish() == REPLACEMENT * lost
    assert stream.finish() == ""


@pytest.mark.parametrize("version", VERSIONS)
def test_a_control_id_ends_a_character(version: str, mistral: Open, mistral_common: Any) -> None:
    first = {"v1": 3, "v3": 771, "v7": 771}.get(version, 1000)
    ids = [first + 0xE4, 2, first + 0xBD, first + 0xA0]
    lost = 1 + 2
    assert mistral(version).decode(ids) == REPLACEMENT * lost == mistral_common(version).decode(ids)


@pytest.mark.parametrize("version", VERSIONS)
def test_ids_outside_the_vocabulary_are_control_ids(version: str, mistral: Open) -> None:
    tokenizer = mistral(version)
    outside = tokenizer.vocab_size
    assert tokenizer.decode([*tokenizer.encode("a"), outside]) == "a"
    assert tokenizer.piece(outside) == f"<id {outside}>"


def test_pieces_are_readable(mistral: Open) -> None:
    tokenizer = mistral("v3-tekken")
    assert [tokenizer.piece(i) for i in (1, 3, *tokenizer.encode("Hi there\n🦒", bos=False)[:5])] == [
        "<s>",
        "[INST]",
        "Hi",
        "▁there",
        "\\n",
        "<0xF0>",
        "<0x9F>",
    ]


class Counting:
    """A vocabulary of single bytes that counts how often it is asked."""

    size, control_ends_run, each_byte, asked = 256, True, True, 0

    @property
    def vocabulary(self) -> Counting:
        return self

    def control(self, token: int) -> str | None:
        return None

    def surface(self, token: int, first: bool) -> bytes:
        self.asked += 1
        return bytes([token])


def test_each_id_is_looked_up_once() -> None:
    counting = Counting()
    stream = Detokenizer(counting)
    for byte in TEXT.encode() * 20:
        stream.push([byte])
    assert counting.asked == len(TEXT.encode()) * 20


# ---------------------------------------------------------------------------------------------- stop strings


def stopped(stops: list[str], parts: list[str]) -> tuple[str, str | None]:
    matcher = StopStrings(stops)
    text = "".join(matcher.push(part) for part in parts)
    return text + matcher.finish(), matcher.found


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        (["END"], "abc END def", ("abc ", "END")),
        (["END"], "END", ("", "END")),
        (["END"], "abEN", ("abEN", None)),
        (["END"], "ENENDx", ("EN", "END")),
        (["aab"], "aaaab", ("aa", "aab")),
        (["\n\nUser:", "</s>"], "hi\n\nUse\n\nUser: x", ("hi\n\nUse", "\n\nUser:")),
        (["abc", "b"], "xabcx", ("xa", "b")),
        (["c", "abc"], "xabcx", ("x", "abc")),
        (["🦒"], "a🦒b", ("a", "🦒")),
        ([], "abc", ("abc", None)),
        (["never"], "abc", ("abc", None)),
    ],
)
def test_stop_strings_at_every_cut(stops: list[str], text: str, expected: tuple[str, str | None]) -> None:
    assert stopped(stops, [text]) == expected
    assert stopped(stops, list(text)) == expected
    for cut in range(len(text)):
        assert stopped(stops, [text[:cut], text[cut:]]) == expected


@quick
@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    text=st.text("abc", max_size=25),
    seed=st.integers(0, 1000),
)
def test_stop_strings_do_not_depend_on_the_cuts(stops: list[str], text: str, seed: int) -> None:
    whole, found = stopped(stops, [text])
    assert (found is None) == all(stop not in text for stop in stops)
    assert text.startswith(whole + (found or ""))
    assert all(stop not in whole for stop in stops)
    cuts = sorted(random.Random(seed).choices(range(len(text) + 1), k=4))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert stopped(stops, parts) == (whole, found)


def test_no_more_is_held_back_than_may_begin_a_stop_string() -> None:
    matcher = StopStrings(["\nUser"])
    assert matcher.push("hello\n") == "hello"
    assert matcher.push("Us") == ""
    assert matcher.push("x") == "\nUsx"
    assert matcher.push("\nUser and more") == ""
    assert (matcher.push("more"), matcher.finish(), matcher.found) == ("", "", "\nUser")


def test_faulty_stop_strings_are_refused() -> None:
    with pytest.raises(RequestError, match="a stop string may not be empty"):
        StopStrings(["a", ""])
    with pytest.raises(RequestError, match="must be a list of texts"):
        StopStrings("abc")
