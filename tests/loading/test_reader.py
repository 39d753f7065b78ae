"""Safetensors headers: what is read, and what each kind of broken file says."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from zoo.loading.reader import BITS, read_header, read_headers
from zoo.registry.errors import WeightsError

Write = Callable[..., Path]

TWO = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def fails(file: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        read_headers(file)
    assert str(file) in str(caught.value)
    return str(caught.value)


def test_header_equals_the_library(tmp_path: Path, save: Write) -> None:
    file = save(tmp_path / "w.safetensors", {"x": (3, 5), "y": (7,), "z": (2, 0), "one": ()})
    found = read_headers(file)
    with safe_open(file, "pt") as theirs:
        assert set(found) == set(theirs.keys())
        for name, info in found.items():
            assert info.shape == tuple(theirs.get_slice(name).get_shape())
            assert info.dtype == theirs.get_slice(name).get_dtype() == "F32"
            assert file.read_bytes()[info.start : info.stop] == theirs.get_tensor(name).numpy().tobytes()


def test_metadata_is_no_tensor(tmp_path: Path, raw: Write) -> None:
    file = raw(tmp_path / "w", {"__metadata__": {"format": "pt"}, **TWO}, bytes(32))
    found = read_headers(file)
    assert list(found) == ["a", "b"]
    assert found["b"].shape == (4,)
    assert found["b"].nbytes == 8


def test_every_type_of_the_format_is_known(tmp_path: Path, raw: Write) -> None:
    header, at = {}, 0
    for name, bits in BITS.items():
        header[name] = {"dtype": name, "shape": [8], "data_offsets": [at, at + bits]}
        at += bits
    assert {info.dtype for info in read_headers(raw(tmp_path / "w", header, bytes(at))).values()} == set(BITS)


def test_header_from_ranges_reads_the_header_only(tmp_path: Path, raw: Write) -> None:
    file = raw(tmp_path / "w", TWO, bytes(32))
    data, asked = file.read_bytes(), []

    def read(start: int, stop: int) -> bytes:
        asked.append((start, stop))
        return data[start:stop]

    assert read_header(file, len(data), read) == read_headers(file)
    assert max(stop for _, stop in asked) <= max(512, len(data) - 32)


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"")
    assert "the file is empty; found 0 bytes. Fetch it again" in fails(tmp_path / "w")


@pytest.mark.parametrize("first", [b"<", b"\x80", b" ", b"P"])
def test_a_length_that_looks_like_another_format(tmp_path: Path, raw: Write, first: bytes) -> None:
    text = json.dumps(TWO).encode()
    text += b" " * ((first[0] - len(text)) % 256)
    file = raw(tmp_path / "w", text, bytes(32))
    assert file.read_bytes().startswith(first)
    assert list(read_headers(file)) == ["a", "b"]


def test_git_lfs_pointer(tmp_path: Path) -> None:
    text = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 14483498224\n"
    (tmp_path / "w").write_bytes(text)
    message = fails(tmp_path / "w")
    assert "Git-LFS pointer" in message
    assert f"{len(text)} bytes that stand for 14483498224" in message
    assert "git lfs pull" in message


def test_web_page(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"\n<!DOCTYPE html><html>Please log in</html>")
    assert "a web page stands where the weights should be; found '<!DOCTYPE html>" in fails(tmp_path / "w")


def test_gguf_and_bare_pickle(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"GGUF" + bytes(40))
    assert "GGUF files are not read yet" in fails(tmp_path / "w")
    (tmp_path / "w").write_bytes(b"\x80\x02}q\x00.")
    assert "a bare pickle" in fails(tmp_path / "w")


@pytest.mark.parametrize("size", [1, 7])
def test_cut_before_the_header(tmp_path: Path, size: int) -> None:
    (tmp_path / "w").write_bytes(bytes(size))
    assert f"cut off inside its header; found {size} bytes; expected at least 8" in fails(tmp_path / "w")


def test_cut_inside_the_header(tmp_path: Path, raw: Write) -> None:
    file = raw(tmp_path / "w", TWO, bytes(32))
    whole = file.read_bytes()
    file.write_bytes(whole[:60])
    assert f"cut off inside its header; found 60 bytes; expected at least {len(whole) - 32}" in fails(file)


def test_cut_inside_the_last_tensor(tmp_path: Path, raw: Write) -> None:
    file = raw(tmp_path / "w", TWO, bytes(32))
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    message = fails(file)
    assert f"cut off inside tensor 'b'; found {len(whole) - 3} bytes; expected {len(whole)}" in message
    assert "the download did not finish" in message.lower()


def test_header_too_large(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(struct.pack("<Q", 1 << 40) + bytes(100))
    assert f"found a header of {1 << 40} bytes" in fails(tmp_path / "w")


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe{}", b"[1]", b'"x"', b"[" * 5000])
def test_header_is_not_json(tmp_path: Path, raw: Write, text: bytes) -> None:
    assert "its header is not" in fails(raw(tmp_path / "w", text))


def test_name_twice_in_one_header(tmp_path: Path, raw: Write) -> None:
    entry = b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    assert "the header names 'a' twice" in fails(raw(tmp_path / "w", b'{"a":%s,"a":%s}' % (entry, entry), b"x"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "F128"}, "tensor 'b' has a type that is not known; found 'F128'"),
        ({"dtype": ["F32"]}, "tensor 'b' has a type that is not known; found ['F32']"),
        ({"shape": [5]}, "tensor 'b' does not fill its place; found 8 bytes; expected 10 for [5] BF16"),
        ({"shape": [-4]}, "gives 'b' the shape [-4]"),
        ({"shape": "4"}, "gives 'b' the shape 4"),
        ({"shape": [True, 4]}, "gives 'b' the shape [True, 4]"),
        ({"data_offsets": [24]}, "lacks the dtype, shape or offsets of 'b'"),
        ({"data_offsets": [16, 24]}, "tensor 'b' overlaps the tensor before it"),
        ({"data_offsets": [26, 34]}, "tensor 'b' follows a gap"),
    ],
)
def test_broken_entries(tmp_path: Path, raw: Write, change: dict[str, Any], message: str) -> None:
    header = {**TWO, "b": {**TWO["b"], **change}}
    assert message in fails(raw(tmp_path / "w", header, bytes(34)))


def test_an_entry_that_is_no_object(tmp_path: Path, raw: Write) -> None:
    assert "lacks the dtype, shape or offsets of 'c'" in fails(raw(tmp_path / "w", {**TWO, "c": 3}, bytes(32)))


def test_bytes_after_the_last_tensor(tmp_path: Path, raw: Write) -> None:
    assert "5 bytes follow its last tensor" in fails(raw(tmp_path / "w", TWO, bytes(37)))


def test_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "w").symlink_to(tmp_path / "blobs" / "gone")
    assert re.search(r"a link to a file that is gone; found -> .*blobs/gone", fails(tmp_path / "w"))


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    assert "cannot read the weights; found Is a directory" in fails(tmp_path)
