"""Which tokenizer file is used, in which version, and what is said when none fits."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from zoo.registry.errors import TextError
from zoo.text.mistral_files import choose_file
from zoo.text.spec import MistralChatSpec, MistralTokenizerSpec, NoChatSpec
from zoo.text.tokenizer import Tokenizer, open_tokenizer

Folder = Callable[[str], Path]
Open = Callable[[str], Tokenizer]


@pytest.fixture
def put(mistral_folder: Folder, tmp_path: Path) -> Callable[[str, str], Path]:
    """Copies a tokenizer file into the test's folder under another name."""

    def copy(version: str, name: str) -> Path:
        (source,) = mistral_folder(version).iterdir()
        shutil.copy(source, tmp_path / name)
        return tmp_path

    return copy


def chosen(folder: Path, version: str | None = None) -> tuple[str, str, str | None]:
    file, note = choose_file(folder, version)
    return file.path.name, file.version, note


@pytest.mark.parametrize("version", ["v1", "v2", "v3", "v7"])
def test_bare_file_is_read_as_what_it_holds(version: str, put: Callable[[str, str], Path]) -> None:
    name, held, note = chosen(put(version, "tokenizer.model"))
    assert (name, held) == ("tokenizer.model", version)
    assert note == f"tokenizer: tokenizer.model ({version}), the version read from its control pieces"


@pytest.mark.parametrize("version", ["v1", "v2", "v3", "v7"])
def test_bare_file_renders_as_the_named_one(version: str, put: Callable[[str, str], Path], mistral: Open) -> None:
    folder = put(version, "tokenizer.model")
    bare = open_tokenizer(MistralTokenizerSpec.model_validate({"version": version}), MistralChatSpec(), folder)
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hello"}]
    assert bare.version == version
    assert bare.notes == ()
    assert bare.render(messages).ids == mistral(version).render(messages).ids


def test_the_card_decides_for_a_bare_file(put: Callable[[str, str], Path], mistral: Open) -> None:
    folder = put("v7", "tokenizer.model")
    older = open_tokenizer(MistralTokenizerSpec(version="v3"), MistralChatSpec(), folder)
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hello"}]
    assert older.version == "v3"
    assert older.render(messages).ids == mistral("v3").render(messages).ids


@pytest.mark.parametrize(
    ("version", "name", "asked"),
    [
        ("v3", "tokenizer.model", "v7"),
        ("v3", "tokenizer.model", "v1"),
        ("v1", "tokenizer.model", "v3"),
        ("v7", "tokenizer.model.v7", "v3"),
        ("v3-tekken", "tekken.json", "v7"),
        ("v3-tekken", "tekken.json", "v1"),
    ],
)
def test_another_version_is_refused(version: str, name: str, asked: str, put: Callable[[str, str], Path]) -> None:
    with pytest.raises(TextError) as caught:
        choose_file(put(version, name), asked)
    assert "not of the card's version" in str(caught.value)
    assert f"{name} ({version.partition('-')[0]})" in str(caught.value)
    assert f"version {asked}" in str(caught.value)


def test_of_several_files_the_cards_version_is_used(put: Callable[[str, str], Path]) -> None:
    put("v1", "tokenizer.model.v1")
    put("v3-tekken", "tekken.json")
    put("v7", "tokenizer.model.v7m1")
    folder = put("v2", "tokenizer.model.v2")
    assert chosen(folder, "v2") == (
        "tokenizer.model.v2",
        "v2",
        "tokenizer: tokenizer.model.v2 (v2), not tekken.json (v3), tokenizer.model.v1 (v1), tokenizer.model.v7m1 (v7):"
        " its version is the card's",
    )
    assert chosen(folder, "v7")[0] == "tokenizer.model.v7m1"
    assert chosen(folder)[:2] == ("tekken.json", "v3")
    (folder / "tekken.json").unlink()
    assert chosen(folder)[:2] == ("tokenizer.model.v7m1", "v7")


def test_the_named_file_is_preferred_to_the_bare_one(put: Callable[[str, str], Path]) -> None:
    put("v3", "tokenizer.model")
    folder = put("v3", "tokenizer.model.v3")
    assert chosen(folder, "v3")[0] == "tokenizer.model.v3"
    assert chosen(folder)[0] == "tokenizer.model.v3"


def test_no_file(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(TextError) as caught:
        choose_file(tmp_path, "v3")
    assert str(caught.value) == (
        f"{tmp_path}: no Mistral tokenizer; expected tekken.json, tokenizer.model or tokenizer.model.v*. "
        "Add the checkpoint's tokenizer file, or give token ids instead of text."
    )


def test_a_name_that_promises_more_than_the_file_holds(put: Callable[[str, str], Path]) -> None:
    with pytest.raises(TextError, match="the file's name and content disagree; found the pieces of v1"):
        choose_file(put("v1", "tokenizer.model.v3"), None)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 14801223\n"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "tekken.json",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 14801223\n",
            "Git-LFS pointer",
        ),
        ("tekken.json", b"<html>not found</html>", "not a tekken tokenizer"),
        ("tekken.json", b"", "the file is empty"),
        ("tekken.json", b'{"config": {}}', "not a tekken tokenizer"),
        ("tekken.json", b'{"config": {"version": "v99"}}', "unknown tokenizer version; found v99"),
        ("tekken.json", b'{"config": {"version": "v3"}, "vocab": [', "not a tokenizer of version v3"),
        ("tekken.json", b'{"config": {"version": "v3"}}', "not a tokenizer of version v3"),
        (
            "tokenizer.model.v3",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n",
            "Git-LFS pointer",
        ),
        ("tokenizer.model", b"<html>", "not a SentencePiece model"),
        ("tokenizer.model.v99", b"x", "not a SentencePiece model"),
    ],
)
def test_damaged_files(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=said) as caught:
        open_tokenizer(MistralTokenizerSpec(), NoChatSpec(), tmp_path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_larger_than_the_model(mistral_folder: Folder) -> None:
    spec, folder = MistralTokenizerSpec(), mistral_folder("v3")
    assert open_tokenizer(spec, None, folder, vocab_size=32768).vocab_size == 32768
    assert open_tokenizer(spec, None, folder, vocab_size=40000).vocab_size == 32768
    with pytest.raises(TextError, match="found 32768 token ids for a vocabulary of 32000"):
        open_tokenizer(spec, None, folder, vocab_size=32000)


def test_a_base_model_takes_no_messages(mistral_folder: Folder) -> None:
    for chat in (None, NoChatSpec()):
        tokenizer = open_tokenizer(MistralTokenizerSpec(), chat, mistral_folder("v3"))
        with pytest.raises(TextError, match="this is a base model without a chat format"):
            tokenizer.render([{"role": "user", "content": "x"}])
        assert tokenizer.encode("Hello") == [1, 23325]


def test_fill_in_the_middle(mistral: Open) -> None:
    assert mistral("v3").fill("def add(", "return s") == [1, 13, 1575, 1036, 11, 1569, 1735, 29500]
    assert mistral("v7").fill("def add(", "return s") == [1, 13, 1575, 1036, 11, 1569, 1735, 29500]
    assert mistral("v3-tekken").fill("def add(", "return s") == [1, 16, 3004, 1265, 14, 3149, 2229, 1040]
    assert mistral("v3").fill("def add(", "") == [1, 13, 11, 1569, 1735, 29500]
    assert mistral("v3").fill("", "") == [1, 13, 11]
    for version in ("v1", "v2"):
        with pytest.raises(TextError, match=f"tokenizer {version} has no fill-in-the-middle"):
            mistral(version).fill("a", "b")
