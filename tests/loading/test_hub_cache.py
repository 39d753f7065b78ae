"""What the cache holds, removing it, and reading heads of files that are not in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from zoo.loading.hub import (
    CachedRevision,
    Remote,
    RemoteFile,
    cache_dir,
    cached,
    fetch,
    list_files,
    ranged_headers,
    read_file,
    remove,
)
from zoo.loading.reader import read_headers
from zoo.registry.errors import FetchError

if TYPE_CHECKING:
    from tests.loading.hub_server import Hub

NAME = "consolidated.safetensors"


@pytest.fixture
def model(hub: Hub, weights: Any) -> dict[str, bytes]:
    files = {"params.json": b'{"dim": 64}', NAME: weights(3_000_000)}
    hub.add("ann/model", files)
    return files


# The folder's place


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/c", "HF_HOME": "/b"}, "/c"),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/d"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/d"}, "/d/huggingface/hub"),
        ({"HF_HOME": "$SOMEWHERE/x", "SOMEWHERE": "/e"}, "/e/x/hub"),
        ({}, "/me/.cache/huggingface/hub"),
    ],
)
def test_cache_folder_is_the_clients(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], folder: str) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/me")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(folder)


# cached and remove


def test_cached_lists_commits(hub: Hub, model: dict[str, bytes]) -> None:
    assert cached("ann/model") == []
    old = fetch("ann/model")
    hub.add("ann/model", {**model, "params.json": b'{"dim": 128}'})
    new = fetch("ann/model")
    size = sum(map(len, model.values()))
    found = {commit.revision: commit for commit in cached("ann/model")}
    assert found == {
        old.name: CachedRevision("ann/model", old.name, (), old, 2, size),
        new.name: CachedRevision("ann/model", new.name, ("main",), new, 2, size + 1),
    }
    assert [commit.revision for commit in cached(f"ann/model@{old.name}")] == [old.name]
    assert [commit.revision for commit in cached("ann/model@main")] == [new.name]
    assert cached("ann/model@v9") == []


def test_remove_takes_everything(hub: Hub, model: dict[str, bytes]) -> None:
    hub.add("ann/other", {"params.json": b"{}", NAME: b"x" * 100})
    hub.fault(NAME, "cut", at=50, times=3)
    with pytest.raises(FetchError):
        fetch("ann/other")
    folder = fetch("ann/model")
    freed = remove("ann/model")
    assert freed >= sum(map(len, model.values()))
    assert not folder.parent.parent.exists()
    assert cached("ann/model") == []
    assert cached("ann/other") != []


def test_remove_of_one_revision_leaves_what_the_other_shares(hub: Hub, model: dict[str, bytes]) -> None:
    old = fetch("ann/model")
    hub.add("ann/model", {**model, "params.json": b'{"dim": 128}'})
    new = fetch("ann/model")
    freed = remove(f"ann/model@{old.name}")
    assert 11 <= freed < 1000
    assert not old.exists()
    assert (new / NAME).read_bytes() == model[NAME]
    assert [path.stem for path in (new.parent.parent / "zoo").iterdir()] == [new.name]


def test_remove_of_an_interrupted_fetch(hub: Hub, model: dict[str, bytes]) -> None:
    hub.fault(NAME, "cut", at=1_000_000)
    with pytest.raises(FetchError, match="ends early"):
        fetch("ann/model")
    assert remove("ann/model") >= 1_000_000
    assert not (cache_dir() / "models--ann--model").exists()


def test_remove_of_parts_that_an_older_client_left(hub: Hub) -> None:
    part = cache_dir() / "models--ann--model/blobs/00.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(500))
    assert remove("ann/model") == 500
    assert not (cache_dir() / "models--ann--model").exists()


def test_remove_of_nothing(hub: Hub) -> None:
    with pytest.raises(FetchError) as caught:
        remove("ann/model")
    assert str(caught.value) == f"ann/model: nothing of it is in the cache; found {cache_dir()}."


# Ranged reads


def head(data: bytes) -> bytes:
    return data[: 8 + int.from_bytes(data[:8], "little")]


def test_head_without_the_weights(hub: Hub, model: dict[str, bytes]) -> None:
    remote = list_files("ann/model")
    assert ranged_headers(remote, NAME) == head(model[NAME])
    assert [ask.range for ask in hub.gets()] == ["bytes=0-131071"]
    assert not cache_dir().exists()


def test_head_is_what_the_reader_reads(hub: Hub, model: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(model[NAME])
    assert list(read_headers(tmp_path / NAME)) == ["t0"]
    assert b'"t0"' in ranged_headers(list_files("ann/model"), NAME)


def test_large_head_takes_a_second_read(hub: Hub) -> None:
    data = (300_000).to_bytes(8, "little") + b"{" + b" " * 299_998 + b"}" + bytes(100_000)
    hub.add("ann/model", {NAME: data})
    assert ranged_headers(list_files("ann/model"), NAME) == head(data)
    assert [ask.range for ask in hub.gets()] == ["bytes=0-131071", "bytes=0-300007"]


def test_server_without_ranges_is_cut_off(hub: Hub, weights: Any) -> None:
    data = weights(20_000_000)
    hub.add("ann/model", {NAME: data})
    hub.fault(NAME, "no_ranges")
    assert ranged_headers(list_files("ann/model"), NAME) == head(data)
    assert hub.sent < 10_000_000


def test_head_from_the_cache(hub: Hub, model: dict[str, bytes]) -> None:
    fetch("ann/model")
    hub.asked.clear()
    assert ranged_headers(list_files("ann/model"), NAME) == head(model[NAME])
    assert hub.gets() == []


def test_head_of_a_gated_file(hub: Hub, model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["ann/model"].gated = True
    remote = list_files("ann/model")
    with pytest.raises(FetchError, match=f"ann/model/{NAME}: the repository is gated and no token was sent"):
        ranged_headers(remote, NAME)
    hub.tokens |= {"hf_good"}
    hub.granted |= {"hf_good"}
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert ranged_headers(remote, NAME) == head(model[NAME])


def test_head_that_is_none(hub: Hub) -> None:
    hub.add("ann/model", {NAME: b"\xff" * 200, "model.safetensors": b"1234"})
    remote = list_files("ann/model")
    with pytest.raises(FetchError) as caught:
        ranged_headers(remote, NAME)
    assert str(caught.value) == (
        f"{remote}/{NAME}: not a safetensors file; found a header of {2**64 - 1} bytes in a file of 200."
    )
    with pytest.raises(FetchError, match="not a safetensors file"):
        ranged_headers(remote, "model.safetensors")


def test_page_in_place_of_a_head(hub: Hub, model: dict[str, bytes]) -> None:
    hub.fault(NAME, "html")
    with pytest.raises(FetchError, match="the answer is a web page and not the file"):
        ranged_headers(list_files("ann/model"), NAME)


def test_head_cut_short(hub: Hub, model: dict[str, bytes]) -> None:
    hub.fault(NAME, "cut", at=20)
    remote = list_files("ann/model")
    with pytest.raises(FetchError) as caught:
        ranged_headers(remote, NAME)
    assert str(caught.value) == f"{remote}/{NAME}: the body ends early; found 20 bytes; expected 131072 bytes."


def test_unknown_file(hub: Hub, model: dict[str, bytes]) -> None:
    remote = list_files("ann/model")
    with pytest.raises(FetchError) as caught:
        ranged_headers(remote, "model.safetensors")
    assert str(caught.value) == f"{remote}: no file 'model.safetensors' in the repository."


def test_small_file_is_read_and_not_stored(hub: Hub, model: dict[str, bytes]) -> None:
    assert read_file(list_files("ann/model"), "params.json") == b'{"dim": 64}'
    assert not cache_dir().exists()


def test_page_in_place_of_a_small_file(hub: Hub, weights: Any) -> None:
    hub.add("ann/model", {"config.json": b"{" + b" " * 500 + b"}"})
    hub.fault("config.json", "page_of_size")
    with pytest.raises(FetchError, match="the answer is a web page and not the file"):
        read_file(list_files("ann/model"), "config.json")


def test_weights_are_not_read_whole(hub: Hub) -> None:
    remote = Remote("ann/model", "0" * 40, (RemoteFile(NAME, 65_000_000, "0" * 64),))
    with pytest.raises(FetchError) as caught:
        read_file(remote, NAME)
    assert str(caught.value) == (
        f"{remote}/{NAME}: too large to be read without fetching it; found 62.0 MiB; expected at most 61.0 MiB."
    )
    assert hub.asked == []
