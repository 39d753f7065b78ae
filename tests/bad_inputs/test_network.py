"""The hub, the network, the cache and the disk as users meet them, from a card to a model that answers or a message."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from zoo.registry.errors import FetchError

if TYPE_CHECKING:
    from tests.bad_inputs.conftest import Desk
    from tests.loading.hub_server import Hub
    from zoo.model import Model

WEIGHTS = "consolidated.safetensors"
IDS = [1, 5, 9, 200]

Act = Callable[["Hub", "Desk"], Any]


@pytest.fixture
def card(hub: Hub, desk: Desk) -> Path:
    """A card whose weights lie on the local hub as ann/model."""
    hub.add("ann/model", {file.name: file.read_bytes() for file in desk.folder.iterdir()})
    with desk.load() as model:
        text = model.card.to_yaml()
    assert "source: {" in text
    shutil.rmtree(desk.folder)
    return write(desk.folder.parent / "ann.yaml", text, "hub: ann/model")


def write(file: Path, text: str, source: str) -> Path:
    file.write_text(text.replace("source: {", f"source: {{{source}, "))
    return file


def repository(name: str = "ann/model", revision: str | None = None) -> Act:
    """The card names another repository or revision."""

    def act(hub: Hub, desk: Desk) -> None:
        file = desk.folder.parent / "ann.yaml"
        text = file.read_text().replace(
            "hub: ann/model", f"hub: {name}" + (f", revision: {revision}" if revision else "")
        )
        file.write_text(text)

    return act


def fault(target: str, kind: str, **how: Any) -> Act:
    return lambda hub, desk: hub.fault(target, kind, **how)


def gated(token: str = "", *, known: bool = False) -> Act:
    def act(hub: Hub, desk: Desk) -> None:
        hub.repos["ann/model"].gated = True
        hub.tokens |= {token} if known else set()
        if token:
            desk.patch.setenv("HF_TOKEN", token)

    return act


def token(value: str) -> Act:
    return lambda hub, desk: desk.patch.setenv("HF_TOKEN", value)


def variable(name: str, value: str) -> Act:
    return lambda hub, desk: desk.patch.setenv(name, value)


def impatient(target: str) -> Act:
    """The server never answers, and the client does not wait long."""

    def act(hub: Hub, desk: Desk) -> None:
        from huggingface_hub import constants

        desk.patch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
        desk.patch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
        hub.fault(target, "silent")

    return act


def small_disk(hub: Hub, desk: Desk) -> None:
    desk.patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000))


def full_disk(hub: Hub, desk: Desk) -> None:
    """The disk fills up while the weights arrive."""
    usual = Path.open

    def opened(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.suffix != ".incomplete" or len(self.stem) != 64:  # the hash of a file in large-file storage
            return usual(self, *arguments, **options)
        self.touch()
        return usual(Path("/dev/full"), *arguments, **options)

    desk.patch.setattr(Path, "open", opened)


def read_only(hub: Hub, desk: Desk) -> None:
    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    desk.patch.setattr(Path, "mkdir", refuse)


def cache_is_a_file(hub: Hub, desk: Desk) -> None:
    desk.patch.setenv("HF_HUB_CACHE", str(desk.folder.parent / "ann.yaml"))


def without(*names: str) -> Act:
    """The repository without some files."""

    def act(hub: Hub, desk: Desk) -> None:
        [files] = hub.repos["ann/model"].commits.values()
        hub.add("ann/model", {name: data for name, data in files.items() if name not in names})

    return act


def half_fetched_offline(hub: Hub, desk: Desk) -> None:
    hub.fault(WEIGHTS, "status", at=404)
    desk.command("pull", "ann.yaml")
    desk.patch.setenv("HF_HUB_OFFLINE", "1")


def nobody(hub: Hub, desk: Desk) -> None:
    """An address where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        desk.patch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")


LOG_IN = "set HF_TOKEN or run `hf auth login`"
FILE = f"ann/model/{WEIGHTS}: "

FAULTS: dict[str, tuple[Act, list[str]]] = {
    # Who may
    "no token": (
        gated(),
        ["ann/model/params.json: the repository is gated and no token was sent", "Accept its terms at", LOG_IN],
    ),
    "a token without a grant": (
        gated("hf_other", known=True),
        ["the repository is gated and this token has no access to it", "Ask for access at"],
    ),
    "a token that is refused": (
        token("hf_stale"),
        ["the hub refuses the token: it is wrong, expired or revoked", "HF_TOKEN"],
    ),
    "a token that is none": (token("hf_…"), ["the token has characters that no token has"]),
    # What is not there
    "a repository misspelt": (
        repository("ann/modle"),
        ["ann/modle: no such repository, or a private one", "Check the spelling"],
    ),
    "a name that is no repository": (repository("ann/the/model"), ["'ann/the/model'"]),
    "a revision that is gone": (
        repository(revision="v9"),
        ["no revision 'v9' in the repository", "/ann/model/commits/main"],
    ),
    "a file that is listed and not served": (
        fault(WEIGHTS, "gone"),
        [f"{FILE}the hub lists the file and does not serve it"],
    ),
    "a repository without weights": (without(WEIGHTS), ["ann/model", "no weights", "params.json"]),
    # The way
    "nobody listens": (nobody, ["cannot be reached", "HTTPS_PROXY and HF_ENDPOINT"]),
    "an address that is none": (
        variable("HF_ENDPOINT", "huggingface.co"),
        ["HF_ENDPOINT is not an address; found 'huggingface.co'; expected https://"],
    ),
    "no answer": (impatient("api"), ["does not answer in time", "HF_HUB_ETAG_TIMEOUT"]),
    "no answer for a file": (impatient(WEIGHTS), [FILE, "does not answer in time", "HF_HUB_DOWNLOAD_TIMEOUT"]),
    "a hub in trouble": (fault("api", "status", at=503), ["answers with status 503", "try again later"]),
    "too many requests": (fault("api", "status", at=429), ["answers with status 429", "Wait some minutes"]),
    "a connection that always drops": (
        fault(WEIGHTS, "drop", at=200_000),
        [f"{FILE}the connection breaks off again and again", "What was received is kept"],
    ),
    # What comes is not what was asked for
    "a web page for the list": (
        fault("api", "html"),
        ["ann/model: the answer is a web page", "'<!DOCTYPE html>", "a proxy, a firewall"],
    ),
    "a web page for a file": (fault(WEIGHTS, "html"), [f"{FILE}the answer is a web page and not the file"]),
    "a web page of the file's size": (
        fault(WEIGHTS, "page_of_size"),
        [f"{FILE}the answer is a web page and not the file"],
    ),
    "a Git-LFS pointer": (fault(WEIGHTS, "pointer"), [f"{FILE}the answer is a Git LFS pointer", "check HF_ENDPOINT"]),
    "an empty list": (fault("api", "empty"), ["answers with an empty body"]),
    "an empty file with status 200": (
        fault(WEIGHTS, "empty"),
        [f"{FILE}the server does not send the file that the hub lists; found an empty body; expected 448128 bytes"],
    ),
    "a list from another server": (fault("api", "json"), ["does not answer as a hub does", "Check HF_ENDPOINT"]),
    "one wrong byte": (
        fault(WEIGHTS, "corrupt"),
        [
            f"{FILE}the bytes received do not hash to what the hub names; they were thrown away",
            "run the command again".capitalize(),
        ],
    ),
    # The disk
    "a disk without room": (
        small_disk,
        ["not enough room on the disk", "4.9 KiB free; expected", "`zoo rm`", "HF_HOME"],
    ),
    "a disk that fills up": (full_disk, [f"{FILE}the disk is full", "No space left on device", "`zoo rm`"]),
    "a cache that cannot be written": (
        read_only,
        ["the cache cannot be written", "found Read-only file system", "HF_HOME"],
    ),
    "a cache that is a file": (cache_is_a_file, ["the cache cannot be used", "found Not a directory"]),
    # Offline
    "offline with an empty cache": (
        variable("HF_HUB_OFFLINE", "1"),
        ["revision 'main' is not in the cache", "HF_HUB_OFFLINE=1 forbids the network", "Unset the variable"],
    ),
    "offline with half a model": (
        half_fetched_offline,
        [f"not in the cache: {WEIGHTS}; HF_HUB_OFFLINE=1 forbids the network", "to fetch them"],
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_refused(name: str, hub: Hub, desk: Desk, card: Path) -> None:
    act, words = FAULTS[name]
    if act is full_disk and not Path("/dev/full").exists():
        pytest.skip("a disk that is always full is Linux's")
    act(hub, desk)
    desk.refused(FetchError, words, lambda: desk.load(card), "pull", "ann.yaml")


def test_run_says_what_pull_says(hub: Hub, desk: Desk, card: Path) -> None:
    hub.repos["ann/model"].gated = True
    desk.refused(FetchError, ["no token was sent"], lambda: desk.load(card), "run", "ann.yaml", "--prompt", "x")


def test_a_card_without_a_repository(desk: Desk) -> None:
    found = desk.command("pull", str(desk.folder))
    assert (found.code, found.out) == (2, "")
    assert "the card names no repository on the hub; expected source.hub in the card" in found.err


# --- strange, and right -----------------------------------------------------------------------------------------------


def steps(*acts: Act) -> Act:
    """One after the other."""

    def act(hub: Hub, desk: Desk) -> None:
        for each in acts:
            each(hub, desk)

    return act


def in_cache(hub: Hub, desk: Desk) -> None:
    """The whole model was fetched before."""
    assert desk.command("pull", "ann.yaml").code == 0


def no_sockets(hub: Hub, desk: Desk) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket while offline")

    desk.patch.setattr(socket, "socket", refuse)
    desk.patch.setattr(socket, "create_connection", refuse)


def no_links(hub: Hub, desk: Desk) -> None:
    """Windows without the right to make links."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(1314, "A required privilege is not held by the client")

    desk.patch.setattr(Path, "symlink_to", refuse)


def broken_off(hub: Hub, desk: Desk) -> None:
    """A run that ended in the middle, and left its part and its lock."""
    hub.fault(WEIGHTS, "cut", at=300_000)
    assert desk.command("pull", "ann.yaml").code == 2
    hub.faults.clear()


def both_sets(hub: Hub, desk: Desk) -> None:
    [files] = hub.repos["ann/model"].commits.values()
    hub.add("ann/model", {**files, "model.safetensors": files[WEIGHTS], "config.json": b"{}"})


def redirected(hub: Hub, desk: Desk) -> None:
    hub.redirect = True


def granted(hub: Hub, desk: Desk) -> None:
    gated("hf_ann", known=True)(hub, desk)
    hub.granted |= {"hf_ann"}


WORKS: dict[str, Act] = {
    "nothing wrong": lambda hub, desk: None,
    "a token with a grant": granted,
    "large files on a second host": redirected,
    "a connection that drops at half": fault(WEIGHTS, "drop", at=224_000, times=1),
    "a connection that drops at the end": fault(WEIGHTS, "drop", at=445_000, times=1),
    "a body that ends early": fault(WEIGHTS, "cut", at=224_000, times=1),
    "a server that ignores ranges": steps(
        fault(WEIGHTS, "drop", at=224_000, times=1),
        fault(WEIGHTS, "no_ranges"),
    ),
    "trouble that passes": fault("api", "status", at=503, times=2),
    "a run that broke off before": broken_off,
    "one wrong byte, once": steps(
        fault(WEIGHTS, "corrupt", times=1),
        lambda hub, desk: desk.command("pull", "ann.yaml"),
    ),
    "no right to make links": no_links,
    "both weight sets": both_sets,
    "offline with all": steps(in_cache, variable("HF_HUB_OFFLINE", "1"), no_sockets),
    "nobody listens, all in the cache": steps(in_cache, nobody),
    "a gate closed since": steps(in_cache, gated()),
    "a cache that cannot be written, all in it": steps(in_cache, read_only),
}


@pytest.mark.parametrize("name", WORKS)
def test_right(name: str, hub: Hub, desk: Desk, card: Path, opened: Callable[[str], Model]) -> None:
    WORKS[name](hub, desk)
    with desk.load(card) as model:
        assert torch.equal(model.logits(IDS), opened("").logits(IDS))
    assert hub.gets("model.safetensors") == []


def test_a_connection_that_drops_goes_on_where_it_stopped(hub: Hub, desk: Desk, card: Path) -> None:
    fault(WEIGHTS, "cut", at=224_000, times=1)(hub, desk)
    assert desk.command("pull", "ann.yaml").code == 0
    assert [ask.range for ask in hub.gets(WEIGHTS)] == [None, "bytes=224000-"]


def test_two_processes_at_once(hub: Hub, desk: Desk, card: Path) -> None:
    """Each file is sent once; both end well and name the same folder."""
    code = "from zoo.cli import main; main(['pull', 'ann.yaml'])"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ}
        )
        for _ in range(2)
    ]
    outs = [run.communicate(timeout=60) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outs
    assert outs[0][0] == outs[1][0]
    assert len(hub.gets(WEIGHTS)) == 1
