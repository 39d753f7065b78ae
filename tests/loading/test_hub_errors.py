"""Every fault of the hub, the network, the cache and the disk is one message that says what to do."""

from __future__ import annotations

import errno
import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from zoo.loading.hub import cache_dir, cached, fetch, list_files, plan_fetch, remove
from zoo.registry.card import Source
from zoo.registry.errors import FetchError

if TYPE_CHECKING:
    from tests.loading.hub_server import Hub

NAME = "consolidated.safetensors"
PROXY = "Open the address in a browser: a proxy, a firewall or a login page stands between; see HTTPS_PROXY."
MIRROR = "Try again; if it stays so, a proxy or mirror changes the answer: check HTTPS_PROXY and HF_ENDPOINT."
KEPT = "What was received is kept: run the command again to go on from there."


def refusal(source: Any = "ann/model", **options: Any) -> str:
    with pytest.raises(FetchError) as caught:
        fetch(source, **options)
    return str(caught.value)


@pytest.fixture
def model(hub: Hub, weights: Any) -> dict[str, bytes]:
    """The repository ann/model: params.json and one weight file."""
    files = {"params.json": b'{"dim": 64}', NAME: weights(200_000)}
    hub.add("ann/model", files)
    return files


def blobs() -> dict[str, int]:
    """Every file in the cache that is or may become contents, with its size."""
    folder = cache_dir() / "models--ann--model/blobs"
    return {path.name: path.stat().st_size for path in folder.iterdir()} if folder.exists() else {}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# Access


def test_gated_without_a_token(hub: Hub, model: dict[str, bytes]) -> None:
    hub.repos["ann/model"].gated = True
    assert refusal() == (
        "ann/model/params.json: the repository is gated and no token was sent. "
        f"Accept its terms at {hub.url}/ann/model, then set HF_TOKEN or run `hf auth login`."
    )


def test_gated_without_a_grant(hub: Hub, model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["ann/model"].gated = True
    hub.tokens |= {"hf_other"}
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert refusal() == (
        "ann/model/params.json: the repository is gated and this token has no access to it. "
        f"Ask for access at {hub.url}/ann/model with the token's account, or give another account's token in HF_TOKEN."
    )


def test_refused_token(hub: Hub, model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_stale")
    assert refusal() == (
        "ann/model: the hub refuses the token: it is wrong, expired or revoked. "
        "Put a valid one into HF_TOKEN or run `hf auth login`; a public repository needs none."
    )


def test_token_that_is_none(hub: Hub, model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_\u2026")
    assert refusal() == (
        "ann/model: the token has characters that no token has. Copy it anew into HF_TOKEN, letters and digits."
    )


def test_no_such_repository(hub: Hub, model: dict[str, bytes]) -> None:
    assert refusal("ann/modle") == (
        "ann/modle: no such repository, or a private one. "
        "Check the spelling; if it is private, set HF_TOKEN or run `hf auth login`."
    )


def test_no_such_repository_with_a_token(hub: Hub, model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    hub.tokens |= {"hf_other"}
    hub.repos["ann/model"].private = True
    for name in ("ann/modle", "ann/model"):
        assert refusal(name) == (
            f"{name}: no such repository, or a private one that this token may not see. "
            "Check the spelling and the token's account."
        )


def test_no_such_revision(hub: Hub, model: dict[str, bytes]) -> None:
    for revision in ("v9", "0" * 40):
        assert refusal(Source(hub="ann/model", revision=revision)) == (
            f"ann/model: no revision '{revision}' in the repository. "
            f"See {hub.url}/ann/model/commits/main, or leave the revision out for the newest."
        )


def test_file_that_is_listed_and_not_served(hub: Hub, model: dict[str, bytes]) -> None:
    hub.fault("params.json", "gone")
    assert refusal() == (
        "ann/model/params.json: the hub lists the file and does not serve it. Try again, or name another revision."
    )


# Names


@pytest.mark.parametrize(
    "name", ["", "a/b/c", "ann/mo del", "https://huggingface.co/ann/model", "../model", "ann/..", "ann/a--b"]
)
def test_not_a_repository(hub: Hub, name: str) -> None:
    assert refusal(name) == (
        f"not the name of a repository; found {name!r}; expected owner/name, as in mistralai/Mistral-7B-v0.3."
    )
    for call in (list_files, cached, remove):
        with pytest.raises(FetchError, match="not the name of a repository"):
            call(name)
    assert hub.asked == []


@pytest.mark.parametrize("revision", ["../../../etc", "a b", "-x", "/etc/hostname"])
def test_not_a_revision(hub: Hub, revision: str) -> None:
    assert refusal(f"ann/model@{revision}") == (
        f"ann/model: not the name of a revision; found {revision!r}; expected a branch, a tag or a commit's sha."
    )


def test_card_without_a_repository(hub: Hub) -> None:
    assert refusal(Source()) == "the card names no repository on the hub. Give a folder with its weights."


# The network


def test_refused_connection(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9/")
    assert refusal() == (
        "ann/model: http://127.0.0.1:9 cannot be reached; found [Errno 111] Connection refused. Check the network, "
        "HTTPS_PROXY and HF_ENDPOINT; what is in the cache works with HF_HUB_OFFLINE=1."
    )


def test_endpoint_that_is_no_address(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "huggingface.co")
    assert refusal() == (
        "ann/model: HF_ENDPOINT is not an address; found 'huggingface.co'; expected https://huggingface.co, say."
    )


def test_no_answer(hub: Hub, model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    hub.fault("api", "silent")
    assert refusal() == (
        f"ann/model: {hub.url} does not answer in time. Check the network and HTTPS_PROXY; HF_HUB_ETAG_TIMEOUT and "
        "HF_HUB_DOWNLOAD_TIMEOUT wait longer."
    )


def test_no_answer_for_a_file(hub: Hub, model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.fault(NAME, "silent")
    assert refusal().startswith(f"ann/model/{NAME}: {hub.url} does not answer in time.")


@pytest.mark.parametrize(("target", "where"), [("api", "ann/model"), (NAME, f"ann/model/{NAME}")])
def test_trouble_of_the_hub(hub: Hub, model: dict[str, bytes], target: str, where: str) -> None:
    hub.fault(target, "status", at=503)
    assert refusal() == (
        f"{where}: {hub.url} answers with status 503; found Service trouble. "
        "The hub is in trouble: try again later (https://status.huggingface.co)."
    )
    assert len([ask for ask in hub.asked if ("api" if target == "api" else NAME) in ask.path]) == 3


def test_too_many_requests(hub: Hub, model: dict[str, bytes]) -> None:
    hub.fault("api", "status", at=429)
    assert refusal() == (
        f"ann/model: {hub.url} answers with status 429; found Service trouble. Wait some minutes; "
        "without a token the hub allows fewer requests: set HF_TOKEN or run `hf auth login`."
    )


def test_connection_that_always_drops(hub: Hub, model: dict[str, bytes]) -> None:
    hub.fault(NAME, "drop", at=100_000)
    message = refusal()
    assert message.startswith(f"ann/model/{NAME}: the connection breaks off again and again; found ")
    assert message.endswith(KEPT)
    assert blobs()[digest(model[NAME]) + ".incomplete"] == 100_000
    hub.faults.clear()
    hub.asked.clear()
    assert (fetch("ann/model") / NAME).read_bytes() == model[NAME]
    assert [ask.range for ask in hub.gets()] == ["bytes=100000-"]


def test_body_that_always_ends_early(hub: Hub, model: dict[str, bytes]) -> None:
    hub.fault(NAME, "cut", at=100_000)
    assert refusal() == (
        f"ann/model/{NAME}: the body ends early again and again; found 100000 bytes; "
        f"expected {len(model[NAME])} bytes. {KEPT}"
    )
    assert blobs()[digest(model[NAME]) + ".incomplete"] == 100_000


# Bodies that are something else


def nothing_wrong_is_kept(model: dict[str, bytes]) -> None:
    assert digest(model[NAME]) not in blobs()
    assert digest(model[NAME]) + ".incomplete" not in blobs()
    assert [file.path for file in plan_fetch("ann/model").missing] == [NAME]


def test_proxy_page_for_the_listing(hub: Hub, model: dict[str, bytes]) -> None:
    hub.fault("api", "html")
    assert refusal() == (
        "ann/model: the answer is a web page and not the file; found '<!DOCTYPE html><html><head><title>Please'. "
        + PROXY
    )


def test_proxy_page_for_a_file(hub: Hub, model: dict[str, bytes]) -> None:
    hub.fault(NAME, "html")
    assert refusal() == (
        f"ann/model/{NAME}: the answer is a web page and not the file; "
        f"found '<!DOCTYPE html><html><head><title>Please'. {PROXY}"
    )
    nothing_wrong_is_kept(model)


def test_page_in_the_clothes_of_a_file(hub: Hub, model: dict[str, bytes]) -> None:
    hub.fault(NAME, "page_of_size")
    assert refusal().startswith(f"ann/model/{NAME}: the answer is a web page and not the file;")
    nothing_wrong_is_kept(model)


def test_large_file_pointer(hub: Hub, model: dict[str, bytes]) -> None:
    hub.fault(NAME, "pointer")
    assert refusal() == (
        f"ann/model/{NAME}: the answer is a Git LFS pointer and not the file. "
        f"The server at {hub.url} does not serve large files; check HF_ENDPOINT."
    )
    nothing_wrong_is_kept(model)


def test_empty_listing(hub: Hub, model: dict[str, bytes]) -> None:
    hub.fault("api", "empty")
    assert refusal() == f"ann/model: {hub.url} answers with an empty body. {PROXY}"


def test_listing_of_another_server(hub: Hub, model: dict[str, bytes]) -> None:
    hub.fault("api", "json")
    message = refusal()
    assert message.startswith(f"ann/model: {hub.url} does not answer as a hub does; found JSON without ")
    assert message.endswith("Check HF_ENDPOINT.")


def test_names_from_a_hostile_server_stay_out_of_the_cache(hub: Hub, model: dict[str, bytes]) -> None:
    hub.lie = {"sha": "../../../../etc"}
    message = f"ann/model: {hub.url} does not answer as a hub does; found the commit '../../../../etc'. "
    assert refusal() == message + "Check HF_ENDPOINT."
    for digest in ("../../../x", "AB" * 20, None):
        hub.lie = {"siblings": [{"rfilename": "params.json", "size": 2, "blobId": digest}]}
        assert "found no size or hash of 'params.json'" in refusal()
    hub.lie = {"siblings": [{"rfilename": "params.json", "size": None, "blobId": "ab" * 20}]}
    assert "found no size or hash of 'params.json'" in refusal()
    assert not cache_dir().exists()


def test_empty_file(hub: Hub, model: dict[str, bytes]) -> None:
    hub.fault(NAME, "empty")
    assert refusal() == (
        f"ann/model/{NAME}: the server does not send the file that the hub lists; found an empty body; "
        f"expected {len(model[NAME])} bytes. {MIRROR}"
    )
    nothing_wrong_is_kept(model)


def test_longer_file(hub: Hub, model: dict[str, bytes]) -> None:
    hub.fault(NAME, "longer")
    assert refusal() == (
        f"ann/model/{NAME}: the server does not send the file that the hub lists; found a longer body; "
        f"expected {len(model[NAME])} bytes. {MIRROR}"
    )
    nothing_wrong_is_kept(model)


@pytest.mark.parametrize("name", [NAME, "params.json"])
def test_wrong_contents_of_the_right_size(hub: Hub, model: dict[str, bytes], name: str) -> None:
    hub.fault(name, "corrupt")
    message = refusal()
    assert message.startswith(
        f"ann/model/{name}: the bytes received do not hash to what the hub names; they were thrown away; found "
    )
    assert message.endswith("Run the command again; if it happens again, a proxy or the disk changes the data.")
    assert name in [file.path for file in plan_fetch("ann/model").missing]
    assert not [blob for blob in blobs() if blob.endswith(".incomplete")]


def test_page_while_resuming_keeps_the_part(hub: Hub, model: dict[str, bytes]) -> None:
    hub.fault(NAME, "cut", at=100_000)
    refusal()
    hub.faults.clear()
    hub.fault(NAME, "html")
    assert "the answer is a web page" in refusal()
    hub.faults.clear()
    hub.asked.clear()
    fetch("ann/model")
    assert [ask.range for ask in hub.gets()] == ["bytes=100000-"]


# The cache and the disk


def test_room_is_checked_before_anything_is_fetched(
    hub: Hub, model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000))
    assert refusal() == (
        f"ann/model@{hub.repos['ann/model'].refs['main'][:12]}: not enough room on the disk of {cache_dir()}; "
        "found 4.9 KiB free; expected 195.4 KiB. Free some space (`zoo rm`), or put the cache on another disk "
        "with HF_HOME."
    )
    assert hub.gets() == []
    assert blobs() == {}


def test_only_the_missing_bytes_need_room(hub: Hub, model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.fault(NAME, "cut", at=199_000)
    refusal()
    hub.faults.clear()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000))
    assert fetch("ann/model").is_dir()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full is Linux's")
def test_disk_full_in_the_middle(hub: Hub, model: dict[str, bytes]) -> None:
    partial = cache_dir() / "models--ann--model/blobs" / (digest(model[NAME]) + ".incomplete")
    partial.parent.mkdir(parents=True)
    partial.symlink_to("/dev/full")
    assert refusal() == (
        f"ann/model/{NAME}: the disk is full: {cache_dir()}; found No space left on device. "
        "Free some space (`zoo rm`), or put the cache on another disk with HF_HOME; the part received is kept."
    )


def test_cache_that_is_a_file(
    hub: Hub, model: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("not a folder")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "taken"))
    assert refusal() == (
        f"ann/model: the cache cannot be used: {cache_dir()}/models--ann--model/zoo; found Not a directory. "
        "HF_HOME names the folder."
    )


@pytest.mark.parametrize(
    ("number", "words"), [(errno.EROFS, "Read-only file system"), (errno.EACCES, "Permission denied")]
)
def test_cache_that_cannot_be_written(
    hub: Hub, model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(number, words, str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert refusal() == (
        f"ann/model: the cache cannot be written: {cache_dir()}/models--ann--model/zoo; found {words}. "
        "Mend the folder's rights, or put the cache elsewhere with HF_HOME."
    )


def test_read_only_cache_with_all_files_serves(
    hub: Hub, model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    fetch("ann/model")
    (cache_dir() / "models--ann--model/refs/main").unlink()
    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(Path, "write_text", refuse)
    assert (fetch("ann/model") / NAME).is_file()


# The hub in trouble, the model in the cache


def test_whole_copy_serves_when_the_hub_does_not(
    hub: Hub, model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch("ann/model")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    notes: list[str] = []
    assert fetch("ann/model", note=notes.append) == folder
    assert notes[0].startswith("ann/model: http://127.0.0.1:9 cannot be reached; ")
    assert notes[0].endswith(" The copy in the cache is used")
    assert notes[1] == f"ann/model at revision {folder.name}: in the cache"


def test_part_of_a_copy_does_not(hub: Hub, model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch("ann/model")
    (folder / NAME).unlink()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in refusal()


def test_a_fault_of_the_program_is_not_dressed_up(hub: Hub, model: dict[str, bytes]) -> None:
    def note(line: str) -> None:
        raise RuntimeError("a bug")

    hub.fault(NAME, "drop", at=100, times=1)
    with pytest.raises(RuntimeError, match="a bug"):
        fetch("ann/model", note=note)
