"""Fetching from a local hub through the real client's session into its cache."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from zoo.loading import hub as zoo_hub
from zoo.loading.hub import fetch, fetching, list_files, plan_fetch
from zoo.registry.card import Source
from zoo.registry.errors import FetchError
from zoo.units import human_bytes

if TYPE_CHECKING:
    from tests.loading.hub_server import Hub

CHILD = "import sys\nfrom zoo.loading.hub import fetch\nfetch('ann/model')\n"


@pytest.fixture
def files(weights: Any) -> dict[str, bytes]:
    """A small native repository with both weight sets."""
    return {
        "README.md": b"# A model\n",
        "config.json": b'{"model_type": "mistral"}',
        "params.json": b'{"dim": 64}',
        "tekken.json": b"{}" * 40,
        "consolidated.safetensors": weights(200_000),
        "model-00001-of-00002.safetensors": weights(900, 1),
        "model-00002-of-00002.safetensors": weights(900, 2),
        "model.safetensors.index.json": b"{}",
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_listing(hub: Hub, files: dict[str, bytes]) -> None:
    sha = hub.add("ann/model", files)
    remote = list_files("ann/model")
    assert (remote.repo, remote.revision) == ("ann/model", sha)
    assert {file.path: file.size for file in remote.files} == {name: len(data) for name, data in files.items()}
    digests = {file.path: len(file.digest or "") for file in remote.files}
    assert (digests["consolidated.safetensors"], digests["params.json"]) == (64, 40)


def test_only_the_chosen_set_is_fetched(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    sha = hub.add("ann/model", files)
    notes: list[str] = []
    folder = fetch("ann/model", note=notes.append)
    chosen = ["config.json", "params.json", "tekken.json", "consolidated.safetensors"]
    assert folder == tmp_path / "home/hub/models--ann--model/snapshots" / sha
    assert contents(folder) == {name: files[name] for name in chosen}
    assert [ask.path.split("/")[-1] for ask in hub.gets()] == ["params.json", "config.json", *chosen[2:]]
    assert all(f"/resolve/{sha}/" in ask.path for ask in hub.gets())
    assert {ask.encoding for ask in hub.gets()} == {"identity"}, "a compressed body has no length to check"
    assert notes == [
        f"ann/model at revision {sha}: 4 of 4 files to fetch, 195.5 KiB",
        "weights: consolidated.safetensors (195.4 KiB); left out: 2 files of model safetensors (1.9 KiB)",
        "fetching params.json, 11 bytes",
        "fetching config.json, 25 bytes",
        "fetching tekken.json, 80 bytes",
        "fetching consolidated.safetensors, 195.4 KiB",
    ]


def test_a_second_fetch_transfers_nothing(hub: Hub, files: dict[str, bytes]) -> None:
    sha = hub.add("ann/model", files)
    first = fetch("ann/model")
    hub.asked.clear()
    notes: list[str] = []
    assert fetch("ann/model", note=notes.append) == first
    assert hub.gets() == []
    assert notes[0] == f"ann/model at revision {sha}: in the cache"


def test_the_cards_source_section(hub: Hub, files: dict[str, bytes]) -> None:
    hub.add("ann/model", files)
    folder = fetch(Source(hub="ann/model", layout="huggingface"))
    assert "consolidated.safetensors" not in contents(folder)
    assert "model-00002-of-00002.safetensors" in contents(folder)


def test_pinned_revisions(hub: Hub, files: dict[str, bytes]) -> None:
    old = hub.add("ann/model", files)
    new = hub.add("ann/model", {**files, "params.json": b'{"dim": 128}'})
    pinned = fetch(Source(hub="ann/model", revision=old))
    newest = fetch("ann/model@main")
    assert (pinned.name, newest.name) == (old, new)
    assert (contents(pinned)["params.json"], contents(newest)["params.json"]) == (b'{"dim": 64}', b'{"dim": 128}')
    assert len(hub.gets("consolidated.safetensors")) == 1, "both commits have the same weights"
    asked = len(hub.asked)
    fetch(f"ann/model@{old}")
    assert len(hub.asked) == asked, "a commit never changes: nothing is to be asked"


def test_tokenizer_without_weights(hub: Hub, files: dict[str, bytes]) -> None:
    hub.add("ann/model", files)
    assert set(contents(fetch("ann/model", weights=False))) == {"config.json", "params.json", "tekken.json"}


def test_a_plan_writes_nothing(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    sha = hub.add("ann/model", files)
    plan = plan_fetch("ann/model")
    assert not (tmp_path / "home").exists()
    assert plan.folder == tmp_path / "home/hub/models--ann--model/snapshots" / sha
    assert [file.path for file in plan.missing] == [file.path for file in plan.chosen.files]
    assert plan.missing_bytes == plan.chosen.total_bytes == sum(len(files[file.path]) for file in plan.missing)
    assert plan.free_bytes > 0
    assert hub.gets() == []


def test_progress_counts_all_bytes_once(hub: Hub, files: dict[str, bytes]) -> None:
    hub.add("ann/model", files)
    hub.fault("consolidated.safetensors", "drop", at=100_000, times=1)
    seen: list[tuple[int, int]] = []
    notes: list[str] = []
    fetch("ann/model", progress=lambda done, total: seen.append((done, total)), note=notes.append)
    total = sum(len(files[name]) for name in ("config.json", "params.json", "tekken.json", "consolidated.safetensors"))
    assert {of for _, of in seen} == {total}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (total, total)
    assert len(seen) > 6
    assert not [note for note in notes if note.startswith("fetching")], "the bar says it"


def test_token_goes_to_the_hub_and_not_to_its_store(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("ann/model", files, gated=True)
    hub.redirect = True
    hub.tokens |= {"hf_good"}
    hub.granted |= {"hf_good"}
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert contents(fetch("ann/model"))["consolidated.safetensors"] == files["consolidated.safetensors"]
    tokens = {(ask.host == hub.store, ask.token) for ask in hub.asked}
    assert tokens == {(False, "hf_good"), (True, None)}


def test_dropped_connection_goes_on_in_the_same_run(hub: Hub, files: dict[str, bytes]) -> None:
    hub.add("ann/model", files)
    size = len(files["consolidated.safetensors"])
    for at in (size // 2, size * 99 // 100):
        hub.fault("consolidated.safetensors", "drop", at=at, times=1)
    folder = fetch("ann/model")
    assert contents(folder)["consolidated.safetensors"] == files["consolidated.safetensors"]
    ranges = [ask.range for ask in hub.gets("consolidated.safetensors")]
    assert ranges == [None, f"bytes={size // 2}-", f"bytes={size * 99 // 100}-"]


def test_attempts_are_counted_anew_when_bytes_arrive(hub: Hub, files: dict[str, bytes]) -> None:
    hub.add("ann/model", files)
    for at in range(20_000, 180_000, 20_000):
        hub.fault("consolidated.safetensors", "drop", at=at, times=1)
    folder = fetch("ann/model")
    assert contents(folder)["consolidated.safetensors"] == files["consolidated.safetensors"]


def test_body_cut_without_a_length_goes_on(hub: Hub, files: dict[str, bytes]) -> None:
    hub.add("ann/model", files)
    hub.fault("consolidated.safetensors", "cut", at=120_000, times=1)
    folder = fetch("ann/model")
    assert contents(folder)["consolidated.safetensors"] == files["consolidated.safetensors"]
    assert [ask.range for ask in hub.gets("consolidated.safetensors")] == [None, "bytes=120000-"]


@pytest.mark.parametrize("redirect", [False, True])
def test_a_killed_fetch_goes_on_in_the_next_process(hub: Hub, files: dict[str, bytes], redirect: bool) -> None:
    hub.add("ann/model", files)
    hub.redirect = redirect
    hub.fault("consolidated.safetensors", "hold", at=150_000, times=1)
    child = subprocess.Popen([sys.executable, "-c", CHILD])
    try:
        assert hub.held.wait(20)
        partial = hub_partial(files)
        wait_until(lambda: partial.exists() and partial.stat().st_size > 100_000)
    finally:
        child.kill()
        child.wait()
    kept = partial.stat().st_size
    hub.asked.clear()
    notes: list[str] = []
    folder = fetch("ann/model", note=notes.append)
    assert contents(folder)["consolidated.safetensors"] == files["consolidated.safetensors"]
    assert {ask.range for ask in hub.gets("consolidated.safetensors")} == {f"bytes={kept}-"}
    assert f"consolidated.safetensors: going on at byte {kept} of {len(files['consolidated.safetensors'])}" in notes
    assert notes[0].endswith(f"1 of 4 files to fetch, {human_bytes(len(files['consolidated.safetensors']) - kept)}")
    assert not partial.exists()


def test_the_client_alone_would_start_again(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    """The reason why zoo receives the bytes itself; when this fails, zoo's own resuming can go."""
    from huggingface_hub import hf_hub_download

    hub.add("ann/model", files)
    hub_partial(files).parent.mkdir(parents=True)
    hub_partial(files).write_bytes(files["consolidated.safetensors"][:150_000])
    hf_hub_download("ann/model", "consolidated.safetensors", endpoint=hub.url, cache_dir=tmp_path / "home/hub")
    assert [ask.range for ask in hub.gets("consolidated.safetensors")] == [None]


def test_a_bad_part_from_another_program_is_replaced(hub: Hub, files: dict[str, bytes]) -> None:
    hub.add("ann/model", files)
    hub_partial(files).parent.mkdir(parents=True)
    hub_partial(files).write_bytes(bytes(1000))
    notes: list[str] = []
    folder = fetch("ann/model", note=notes.append)
    assert contents(folder)["consolidated.safetensors"] == files["consolidated.safetensors"]
    assert "consolidated.safetensors: the part received earlier was bad; starting again" in notes


def test_a_part_longer_than_the_file_is_replaced(hub: Hub, files: dict[str, bytes]) -> None:
    hub.add("ann/model", files)
    hub_partial(files).parent.mkdir(parents=True)
    hub_partial(files).write_bytes(bytes(300_000))
    assert contents(fetch("ann/model"))["consolidated.safetensors"] == files["consolidated.safetensors"]


def test_server_without_ranges_starts_again(hub: Hub, files: dict[str, bytes]) -> None:
    hub.add("ann/model", files)
    hub.fault("consolidated.safetensors", "drop", at=100_000, times=1)
    hub.fault("consolidated.safetensors", "no_ranges")
    notes: list[str] = []
    folder = fetch("ann/model", note=notes.append)
    assert contents(folder)["consolidated.safetensors"] == files["consolidated.safetensors"]
    assert "consolidated.safetensors: the server cannot go on at byte 100000; starting again" in notes


def test_passing_trouble_of_the_hub_is_waited_out(hub: Hub, files: dict[str, bytes]) -> None:
    hub.add("ann/model", files)
    hub.fault("api", "status", at=503, times=2)
    hub.fault("consolidated.safetensors", "status", at=502, times=2)
    assert fetch("ann/model").is_dir()


def test_two_processes_fetch_each_file_once(hub: Hub, files: dict[str, bytes]) -> None:
    hub.add("ann/model", files)
    hub.fault("consolidated.safetensors", "hold", at=1000, times=1)
    child = subprocess.Popen([sys.executable, "-c", CHILD])
    try:
        assert hub.held.wait(20)
        notes: list[str] = []

        def note(line: str) -> None:
            notes.append(line)
            if line.startswith("another process"):
                hub.release.set()

        folder = fetch("ann/model", note=note)
        assert child.wait(20) == 0
    finally:
        child.kill()
    assert "another process is fetching consolidated.safetensors; waiting for it" in notes
    assert contents(folder)["consolidated.safetensors"] == files["consolidated.safetensors"]
    assert len(hub.gets("consolidated.safetensors")) == 1


def test_largest_files_go_through_the_client(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.add("ann/model", files)
    monkeypatch.setattr(fetching, "CLIENT_ABOVE", 100_000)
    folder = fetch("ann/model")
    assert contents(folder)["consolidated.safetensors"] == files["consolidated.safetensors"]
    asked = [ask.method for ask in hub.asked if ask.path.endswith("consolidated.safetensors")]
    assert asked == ["HEAD", "GET"]
    assert capfd.readouterr().err == ""


def test_largest_files_are_checked_too(hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("ann/model", files)
    hub.fault("consolidated.safetensors", "corrupt")
    monkeypatch.setattr(fetching, "CLIENT_ABOVE", 100_000)
    with pytest.raises(FetchError, match="do not hash to what the hub names"):
        fetch("ann/model")
    assert [file.path for file in plan_fetch("ann/model").missing] == ["consolidated.safetensors"]


def test_trouble_with_the_largest_files_is_told(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("ann/model", files)
    hub.fault("HEAD consolidated.safetensors", "status")
    monkeypatch.setattr(fetching, "CLIENT_ABOVE", 100_000)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(FetchError, match=r"ann/model/consolidated\.safetensors: .* answers with status 503"):
        fetch("ann/model")


def test_empty_files_are_files(hub: Hub, files: dict[str, bytes]) -> None:
    hub.add("ann/model", {**files, "SYSTEM_PROMPT.txt": b""})
    assert contents(fetch("ann/model"))["SYSTEM_PROMPT.txt"] == b""
    assert not plan_fetch("ann/model").missing


def test_hub_without_symbolic_links(hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows without the right to make links."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(1314, "A required privilege is not held by the client")

    hub.add("ann/model", files)
    monkeypatch.setattr(Path, "symlink_to", refuse)
    folder = fetch("ann/model")
    assert contents(folder)["consolidated.safetensors"] == files["consolidated.safetensors"]
    assert not any(path.is_symlink() for path in folder.iterdir())
    asked = len(hub.gets())
    fetch("ann/model")
    assert len(hub.gets()) == asked


def test_import_is_light() -> None:
    code = "import sys, zoo.loading.hub\nprint([m for m in ('torch', 'huggingface_hub', 'rich') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_client_reads_what_zoo_fetched(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    from huggingface_hub import hf_hub_download, scan_cache_dir, snapshot_download

    hub.add("ann/model", files)
    folder = fetch("ann/model")
    asked = len(hub.gets())
    cache = tmp_path / "home/hub"
    for name in contents(folder):
        found = hf_hub_download("ann/model", name, endpoint=hub.url, cache_dir=cache)
        assert Path(found) == folder / name
    patterns = ["*.json", "consolidated*"]
    whole = snapshot_download("ann/model", endpoint=hub.url, cache_dir=cache, allow_patterns=patterns[1:])
    assert Path(whole) == folder
    assert len(hub.gets()) == asked
    scan = scan_cache_dir(cache)
    assert (scan.warnings, [repo.repo_id for repo in scan.repos]) == ([], ["ann/model"])


def test_client_is_not_confused_by_an_interrupted_fetch(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    from huggingface_hub import scan_cache_dir

    hub.add("ann/model", files)
    hub.fault("params.json", "status", at=404)
    with pytest.raises(FetchError, match="status 404"):
        fetch("ann/model")
    assert scan_cache_dir(tmp_path / "home/hub").warnings == []


def test_zoo_reads_what_the_client_fetched(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    hub.add("ann/model", files)
    cache = tmp_path / "home/hub"
    theirs = snapshot_download("ann/model", endpoint=hub.url, cache_dir=cache, ignore_patterns=["consolidated*"])
    asked = len(hub.gets())
    notes: list[str] = []
    assert fetch("ann/model", note=notes.append) == Path(theirs)
    assert len(hub.gets()) == asked
    assert notes[1].startswith("weights: 2 files of model safetensors")


def test_a_file_that_another_program_left_short_is_fetched_again(hub: Hub, files: dict[str, bytes]) -> None:
    hub.add("ann/model", files)
    folder = fetch("ann/model")
    (folder / "consolidated.safetensors").resolve().write_bytes(b"cut")
    assert contents(fetch("ann/model"))["consolidated.safetensors"] == files["consolidated.safetensors"]


def test_the_index_is_fetched_with_shards(hub: Hub, weights: Any) -> None:
    index = json.dumps({"weight_map": {"t1": "model-00001-of-00001.safetensors"}}).encode()
    hub.add("ann/model", {"model-00001-of-00001.safetensors": weights(), "model.safetensors.index.json": index})
    assert contents(fetch("ann/model"))["model.safetensors.index.json"] == index


def hub_partial(files: dict[str, bytes]) -> Path:
    """Where the part of the weights waits."""
    digest = hashlib.sha256(files["consolidated.safetensors"]).hexdigest()
    return zoo_hub.cache_dir() / "models--ann--model/blobs" / f"{digest}.incomplete"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "never happened"
        time.sleep(0.02)
