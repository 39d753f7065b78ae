"""Offline: no socket is opened, a whole cache serves, anything less says what is missing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from zoo.loading.hub import cache_dir, fetch, list_files, offline, plan_fetch, ranged_headers, read_file
from zoo.registry.errors import FetchError

if TYPE_CHECKING:
    from tests.loading.hub_server import Hub

SWITCHES = ["HF_HUB_OFFLINE", "ZOO_OFFLINE", "TRANSFORMERS_OFFLINE"]


@pytest.fixture
def model(hub: Hub, weights: Any) -> dict[str, bytes]:
    files = {
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "model-00001-of-00002.safetensors": weights(900, 1),
        "model-00002-of-00002.safetensors": weights(900, 2),
        "model.safetensors.index.json": b"{}",
        "pytorch_model.bin": b"other",
    }
    hub.add("ann/model", files)
    return files


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the first socket or name look-up fails the test."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket while offline")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("switch", SWITCHES)
def test_whole_cache_serves(
    hub: Hub,
    model: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    switch: str,
) -> None:
    """The variable is set after the client was imported and used."""
    folder = fetch("ann/model")
    request.getfixturevalue("no_sockets")
    monkeypatch.setenv(switch, "1")
    notes: list[str] = []
    assert fetch("ann/model", note=notes.append) == folder
    assert fetch(f"ann/model@{folder.name}") == folder
    assert fetch("ann/model", weights=False) == folder
    assert notes[0] == f"ann/model at revision {folder.name}: in the cache"
    assert len(list_files("ann/model").files) == len(model)
    assert ranged_headers(list_files("ann/model"), "model-00001-of-00002.safetensors")[8:9] == b"{"


@pytest.mark.parametrize("value", ["", "0", "no"])
def test_values_that_leave_the_network_on(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    for switch in SWITCHES:
        monkeypatch.setenv(switch, value)
    assert offline() is None
    monkeypatch.setenv("HF_HUB_OFFLINE", "True")
    assert offline() == "HF_HUB_OFFLINE=True"


@pytest.mark.usefixtures("no_sockets")
def test_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FetchError) as caught:
        fetch("ann/model")
    assert str(caught.value) == (
        f"ann/model: revision 'main' is not in the cache {tmp_path}/hub, and HF_HUB_OFFLINE=1 forbids the network. "
        "Unset the variable and run the command again to fetch it."
    )


def test_interrupted_fetch_names_what_is_missing(
    hub: Hub, model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    hub.fault("model-00001-of-00002.safetensors", "status", at=404)
    with pytest.raises(FetchError, match="status 404"):
        fetch("ann/model")
    request.getfixturevalue("no_sockets")
    monkeypatch.setenv("ZOO_OFFLINE", "1")
    with pytest.raises(FetchError) as caught:
        fetch("ann/model")
    assert str(caught.value) == (
        f"ann/model@{hub.repos['ann/model'].refs['main'][:12]}: not in the cache: model-00001-of-00002.safetensors, "
        "model-00002-of-00002.safetensors; ZOO_OFFLINE=1 forbids the network. "
        "Unset the variable and run the command again to fetch them."
    )
    assert len(plan_fetch("ann/model").missing) == 2


def test_file_cut_short_in_the_cache_is_missing(
    hub: Hub, model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch("ann/model")
    (folder / "model-00002-of-00002.safetensors").resolve().write_bytes(b"cut")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FetchError, match=r"not in the cache: model-00002-of-00002\.safetensors; HF_HUB_OFFLINE=1"):
        fetch("ann/model")


def test_cache_filled_by_another_program(
    hub: Hub, model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    from huggingface_hub import snapshot_download

    theirs = snapshot_download("ann/model", endpoint=hub.url, cache_dir=cache_dir(), ignore_patterns=["*.bin"])
    request.getfixturevalue("no_sockets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch("ann/model") == Path(theirs)
    (Path(theirs) / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FetchError) as caught:
        fetch("ann/model")
    assert str(caught.value) == (
        f"ann/model@{Path(theirs).name[:12]}: 1 of the 2 files of model safetensors missing; "
        "found no model-00002-of-00002.safetensors."
    )


def test_an_interrupted_update_leaves_the_old_commit(
    hub: Hub, model: dict[str, bytes], weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = fetch("ann/model")
    hub.add("ann/model", {**model, "model-00002-of-00002.safetensors": weights(900, 3)})
    hub.fault("model-00002-of-00002.safetensors", "status", at=404)
    with pytest.raises(FetchError, match="status 404"):
        fetch("ann/model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch("ann/model") == old


def test_a_branch_that_came_to_mean_a_cached_commit(
    hub: Hub, model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = fetch(f"ann/model@{hub.repos['ann/model'].refs['main']}")
    asked = len(hub.gets())
    fetch("ann/model")
    assert len(hub.gets()) == asked
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch("ann/model") == pinned


def test_heads_and_files_that_are_not_cached(
    hub: Hub, model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = list_files("ann/model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = (
        f"{remote}/config.json: not in the cache, and HF_HUB_OFFLINE=1 forbids the network. "
        "Unset the variable, or fetch the model with `zoo pull` first."
    )
    with pytest.raises(FetchError) as caught:
        read_file(remote, "config.json")
    assert str(caught.value) == message


def test_offline_needs_no_client(hub: Hub, model: dict[str, bytes]) -> None:
    folder = fetch("ann/model")
    code = "import sys\nfrom zoo.loading.hub import fetch\nprint(fetch('ann/model'), 'huggingface_hub' in sys.modules)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout == f"{folder} False\n"


def test_client_imported_while_offline_says_so(
    hub: Hub, model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FetchError) as caught:
        fetch("ann/model")
    assert str(caught.value) == (
        "ann/model: the hub's client was imported while HF_HUB_OFFLINE was set and refuses the network. "
        "Start the program again without the variable."
    )
