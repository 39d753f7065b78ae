"""`tokenizer.json` folders: ids and text as the tokenizers library and transformers have them."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, processors
from transformers import PreTrainedTokenizerFast

from zoo.registry.errors import TextError
from zoo.text.detokenize import REPLACEMENT, Detokenizer
from zoo.text.spec import HuggingFaceTokenizerSpec, MistralChatSpec, MistralTokenizerSpec, NoChatSpec, TemplateChatSpec
from zoo.text.tokenizer import Tokenizer, open_tokenizer

Make = Callable[..., Path]
KINDS = ("byte level", "byte fallback", "metaspace")
PLAIN = st.characters(codec="utf-8", exclude_characters="▁<[")  # no sign for a space, no control token
TEXT = "Hello  wörld, 世界 🦒👩‍👩‍👧\n\n\tnaïve café  "
quick = settings(
    max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def opened(folder: Path, vocab_size: int | None = None) -> Tokenizer:
    return open_tokenizer(HuggingFaceTokenizerSpec(), TemplateChatSpec(), folder, vocab_size=vocab_size)


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(data=st.data())
def test_random_ids_joined_equal_whole(kind: str, hugging_face: Make, data: st.DataObject) -> None:
    tokenizer = opened(hugging_face(kind))
    library = Library.from_file(str(hugging_face(kind) / "tokenizer.json"))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30))
    cuts = sorted(data.draw(st.lists(st.integers(0, 30), max_size=5)))
    for options in ({}, {"special": True}, {"continues": True}):
        stream = Detokenizer(tokenizer, **options)
        parts = [stream.push(ids[a:b]) for a, b in pairwise([0, *cuts, len(ids)])]
        assert "".join([*parts, stream.finish()]) == tokenizer.decode(ids, **options)
    if kind != "byte fallback":  # there the library gives up a whole run of bytes for one that is broken
        assert tokenizer.decode(ids) == library.decode(ids)


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
@quick
@given(text=st.text(PLAIN, max_size=30) | st.text(" é世🦒a", max_size=30))
def test_text_comes_back(kind: str, hugging_face: Make, text: str) -> None:
    tokenizer = opened(hugging_face(kind))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    stream = Detokenizer(tokenizer)
    parts = [stream.push([i]) for i in ids]
    assert not any(REPLACEMENT in part for part in parts) or REPLACEMENT in text
    assert "".join(parts) == text
    assert Library.from_file(str(hugging_face(kind) / "tokenizer.json")).decode(ids) == text


@pytest.mark.parametrize(("kind", "lost"), [("byte level", 1), ("byte fallback", 2)])
def test_an_unfinished_character_at_the_end(kind: str, lost: int, hugging_face: Make) -> None:
    tokenizer = opened(hugging_face(kind))
    ids = tokenizer.encode("Hello🦒")[:-2]
    assert tokenizer.decode(ids) == "Hello" + REPLACEMENT * lost


def test_first_space(hugging_face: Make) -> None:
    tokenizer = opened(hugging_face("byte fallback"))
    ids = tokenizer.encode("hello", bos=False)
    assert tokenizer.decode(ids) == "hello"
    assert tokenizer.decode(ids, continues=True) == " hello"


def test_a_tokenizer_without_a_decoder_joins_with_spaces(hugging_face: Make) -> None:
    folder = hugging_face("byte level")
    data = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(data | {"decoder": None}))
    ids = opened(folder).encode("hello", bos=False)
    assert opened(folder).decode(ids) == Library.from_file(str(folder / "tokenizer.json")).decode(ids)


@pytest.mark.parametrize("decoder", [decoders.WordPiece(), decoders.Strip(" ", 0, 1), decoders.BPEDecoder()])
def test_decoders_that_cannot_stream_are_refused(decoder: Any, hugging_face: Make) -> None:
    folder = hugging_face("byte level")
    data = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(data | {"decoder": json.loads(decoder.__getstate__())}))
    with pytest.raises(TextError, match="text cannot be streamed with this decoder"):
        opened(folder)


def test_a_decoder_that_was_misread_is_found(hugging_face: Make) -> None:
    folder = hugging_face("byte fallback")
    data = json.loads((folder / "tokenizer.json").read_text())
    data["decoder"]["decoders"] = [step for step in data["decoder"]["decoders"] if step["type"] != "Fuse"]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(TextError, match="text cannot be streamed with this tokenizer"):
        opened(folder)


# ------------------------------------------------------------------------------------------ encoding and ends


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "config",
    [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}],
    ids=["unset", "bos", "no bos", "bos and eos"],
)
def test_encode_equals_transformers(kind: str, config: dict[str, bool], hugging_face: Make) -> None:
    folder = hugging_face(kind, **config)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    ours = opened(folder)
    for text in ("", "Hello world", TEXT):
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.encode(text, bos=False) == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_bos_is_doubled(kind: str, hugging_face: Make) -> None:
    folder = hugging_face(kind)
    library = Library.from_file(str(folder / "tokenizer.json"))
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    library.save(str(folder / "tokenizer.json"))
    tokenizer = opened(folder)
    assert tokenizer.bos_id == 1
    assert tokenizer.encode("<s>") == [1]
    assert tokenizer.encode("<s>Hello").count(1) == 1
    assert tokenizer.encode("Hello").count(1) == 1
    assert tokenizer.encode("Hello", bos=False).count(1) == 0


def test_a_stored_length_does_not_cut_prompts(hugging_face: Make) -> None:
    folder = hugging_face("byte level")
    library = Library.from_file(str(folder / "tokenizer.json"))
    library.enable_truncation(4)
    library.enable_padding(length=64)
    library.save(str(folder / "tokenizer.json"))
    ids = opened(folder).encode("Hello world, how are you today? Hello world.", bos=False)
    assert 4 < len(ids) < 64


def test_special_tokens_that_only_the_configuration_names(hugging_face: Make) -> None:
    folder = hugging_face("byte level")
    size = opened(folder).vocab_size
    entries = {
        str(size): {"content": "<|extra|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False},
        str(size + 1): {"content": "<plain>", "special": False},
    }
    hugging_face("byte level", added_tokens_decoder=entries, pad_token="<|never trained|>", eos_token="<tool_call>")
    tokenizer = opened(folder)
    assert tokenizer.encode("a<|extra|><plain>", bos=False)[1:] == [size, size + 1]
    assert tokenizer.decode([size, size + 1]) == "<plain>"
    assert tokenizer.vocab_size == size + 2
    (stop,) = tokenizer.stop_ids
    assert tokenizer.encode("<tool_call>", bos=False) == [stop]
    assert tokenizer.decode([stop]) == "", "what is named as the end is special"


def test_added_tokens_are_written_as_they_are(hugging_face: Make) -> None:
    folder = hugging_face("byte level")
    size = opened(folder).vocab_size
    hugging_face("byte level", added_tokens_decoder={str(size): {"content": "<straße>", "special": False}})
    assert opened(folder).decode([size]) == "<straße>"


def test_ids_that_contradict_are_refused(hugging_face: Make) -> None:
    folder = hugging_face("byte level", added_tokens_decoder={"9000": {"content": "<|extra|>", "special": True}})
    with pytest.raises(TextError, match=r"the token '<\|extra\|>' has different ids; found 9000 here"):
        opened(folder)


def test_a_tokenizer_larger_than_the_model(hugging_face: Make) -> None:
    folder = hugging_face("byte level")
    size = Library.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    assert opened(folder, vocab_size=size).vocab_size == size
    with pytest.raises(TextError, match=f"found {size} token ids for a vocabulary of {size - 1}"):
        opened(folder, vocab_size=size - 1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n", "Git-LFS pointer"),
        (b"<html>", "not a tokenizer"),
        (b'{"version": "1.0"}', "not a tokenizer"),
        (None, "no tokenizer.json. Add the checkpoint's tokenizer.json"),
    ],
)
def test_damaged_files(content: bytes | None, said: str, hugging_face: Make) -> None:
    folder = hugging_face()
    (folder / "tokenizer.json").unlink()
    if content is not None:
        (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(TextError, match=said) as caught:
        opened(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_middle_to_fill(hugging_face: Make) -> None:
    with pytest.raises(TextError, match="does not say how to ask for the middle of a text"):
        opened(hugging_face()).fill("a", "b")


def test_chat_formats_of_another_kind_are_refused(hugging_face: Make, mistral_folder: Callable[[str], Path]) -> None:
    with pytest.raises(TextError, match="the chat format 'mistral' needs a tokenizer of kind 'mistral'"):
        open_tokenizer(HuggingFaceTokenizerSpec(), MistralChatSpec(), hugging_face())
    with pytest.raises(TextError, match="the chat format 'template' needs a tokenizer of kind 'huggingface'"):
        open_tokenizer(MistralTokenizerSpec(), TemplateChatSpec(), mistral_folder("v3"))


# -------------------------------------------------------------------------------------------------- stop ids


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {2}),
        ({"generation_config.json": {"eos_token_id": 7}}, {2, 7}),
        ({"generation_config.json": {"eos_token_id": [6, 7]}}, {2, 6, 7}),
        ({"config.json": {"eos_token_id": 9}}, {2, 9}),
        ({"config.json": {"eos_token_id": None, "text_config": {"eos_token_id": 11}}}, {2, 11}),
        ({"config.json": {"eos_token_id": 9}, "generation_config.json": {"eos_token_id": [7]}}, {2, 7, 9}),
    ],
)
def test_stop_ids_are_the_union_of_the_sources(files: dict[str, Any], expected: set[int], hugging_face: Make) -> None:
    folder = hugging_face()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    assert open_tokenizer(HuggingFaceTokenizerSpec(), NoChatSpec(), folder).stop_ids == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}", {2, 6}),
        ("{% for m in messages %}{{ m.content|trim }}\n<|eot_id|>{% endfor %}", {2, 7}),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", {2}),
        ("<|im_start|>{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", {2}),
        ("{% for m in messages %}{{ m.content }}<s>{% endfor %}", {2}),
        ("{{ raise_exception('never') }}", {2}),
        ("{% for %}", {2}),
    ],
)
def test_the_token_that_ends_a_turn_stops(template: str, expected: set[int], hugging_face: Make) -> None:
    assert opened(hugging_face(chat_template=template)).stop_ids == expected


@pytest.mark.parametrize("value", ["</s>", [True], -1, 1.5, {"a": 1}])
def test_a_faulty_eos_is_refused(value: Any, hugging_face: Make) -> None:
    folder = hugging_face()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(TextError, match=r"generation_config.json: eos_token_id is no token id"):
        opened(folder)


@pytest.mark.parametrize(("content", "said"), [("{", "not valid JSON"), ("[]", "not a JSON object; found a list")])
def test_faulty_configuration_files_are_refused(content: str, said: str, hugging_face: Make) -> None:
    folder = hugging_face()
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(TextError, match=said):
        opened(folder)
