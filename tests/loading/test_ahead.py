"""Reading ahead: in order, not too far, what is going to be loaded, silent about faults, and over when it is left."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import zoo
from zoo.cli.asking import load_model
from zoo.loading import ahead
from zoo.loading.ahead import ReadAhead, weights_at_hand
from zoo.loading.mapped import Mapped
from zoo.locating import locate
from zoo.registry.card import Card
from zoo.registry.errors import WeightsError
from zoo.registry.resolve import Plan

Plans = Callable[..., Plan]
Names = Callable[[Plan], dict[str, tuple[int, ...]]]
Write = Callable[..., Path]

PIECE = 4096


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Where what was read began. No thread is left afterwards."""
    begun: list[int] = []
    monkeypatch.setattr(ahead, "PIECE", PIECE)
    monkeypatch.setattr(Mapped, "read", lambda self, offset, size: begun.append(offset))
    yield begun
    assert not threads()


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "zoo-reading-ahead"]


def until(wanted: Callable[[], bool]) -> bool:
    """Waits at most ten seconds."""
    end = time.monotonic() + 10
    while not wanted() and time.monotonic() < end:
        time.sleep(0.005)
    return wanted()


@pytest.fixture
def file(tmp_path: Path, plan_of: Plans, native_names: Names, save: Write) -> Path:
    return save(tmp_path / "w.safetensors", native_names(plan_of()), torch.bfloat16)


def test_all_of_a_file_in_its_order(file: Path, read: list[int]) -> None:
    with ReadAhead(file.parent):
        assert until(lambda: not threads())
    assert read == [*range(0, file.stat().st_size, PIECE)]


def test_no_further_than_there_is_memory(file: Path, read: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "LEAST", 2 * PIECE)
    monkeypatch.setattr(ahead, "free_memory", lambda: 0)
    told: list[tuple[int, int]] = []
    with ReadAhead(file) as reading:
        assert until(lambda: len(read) == 2)
        progress = reading.passed(lambda done, total: told.append((done, total)))
        progress(PIECE, 10 * PIECE)
        assert until(lambda: len(read) == 3)
        time.sleep(0.02)
        assert read == [0, PIECE, 2 * PIECE]
    assert told == [(PIECE, 10 * PIECE)]


def test_faults_are_left_to_who_loads(tmp_path: Path, read: list[int], file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])
    for place in (None, tmp_path / "nothing", file):
        with ReadAhead(place):
            pass
    assert read == []


@pytest.mark.parametrize("fault", [WeightsError("a fault of the load"), KeyboardInterrupt()])
def test_nothing_is_left_after_a_fault(file: Path, read: list[int], fault: BaseException) -> None:
    with pytest.raises(type(fault)), ReadAhead(file):
        raise fault


def test_a_load_reads_ahead_and_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[Path | None] = []

    class Seen(ReadAhead):
        def __init__(self, place: Path | None, layout: str) -> None:
            places.append(place)
            super().__init__(place, layout)

    monkeypatch.setattr(ahead, "ReadAhead", Seen)
    with zoo.load("tiny", device="cpu"):
        assert not threads()
    zoo.load("tiny", device="cpu", weights="random").close()
    assert places == [locate("tiny").folder, None]


def test_where_weights_are_going_to_be_loaded_from(
    tmp_path: Path, plan_of: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    fields = {"name": "little", "context_length": 64, "model": plan_of().card.model}
    hub = locate(Card.from_dict({**fields, "source": {"hub": "owner/name"}}))
    assert weights_at_hand(locate(Card.from_dict(fields)), "auto") is None
    assert weights_at_hand(hub, "auto") is None
    assert weights_at_hand(hub, "random") is None
    assert weights_at_hand(hub, f"file://{tmp_path}") == tmp_path
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c" * 40)
    assert weights_at_hand(hub, "auto") == repository / "snapshots" / ("c" * 40)


@pytest.fixture
def collections() -> Iterator[list[int]]:
    """Generations that were collected."""
    found: list[int] = []

    def note(phase: str, told: dict[str, int]) -> None:
        if phase == "start":
            found.append(told["generation"])

    gc.callbacks.append(note)
    yield found
    gc.callbacks.remove(note)
    gc.enable()


def test_commands_look_for_no_garbage_while_they_load(collections: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*given: object, **options: object) -> SimpleNamespace:
        _ = [[] for _ in range(100_000)]
        return SimpleNamespace(card=SimpleNamespace(name="it"), notes=[])

    monkeypatch.setattr("zoo.api.load", load)
    flags = dict.fromkeys(("devices", "overrides"))
    monkeypatch.setattr("zoo.cli.asking.load_arguments", lambda given: flags)
    load_model("tiny", flags)
    assert collections == []
    assert gc.isenabled()
    assert gc.get_freeze_count() > 100_000
    gc.unfreeze()
    monkeypatch.setattr("zoo.api.load", lambda *given, **options: weights_at_hand(*given))
    with pytest.raises(TypeError):
        load_model("tiny", flags)
    assert gc.isenabled()
    gc.unfreeze()


@pytest.mark.parametrize("wanted", [True, False])
def test_a_program_keeps_its_way_with_garbage(wanted: bool, collections: list[int]) -> None:
    if not wanted:
        gc.disable()
    zoo.load("tiny", device="cpu", weights="random").close()
    assert gc.isenabled() == wanted
    if not wanted:
        assert collections == []
