"""What ranks save together is byte for byte what one process writes, and a save that fails leaves nothing."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import torch

import zoo
from tests.devices.likes import ATTENTION, GATED, MAMBA2, MIXTURE, make_card
from tests.devices.test_adapters import write_adapter
from tests.devices.test_deaths import SOON, children, impatient, linux
from tests.saving.test_save import same_files
from zoo.devices import gather
from zoo.devices.gather import Gathered
from zoo.model import Model
from zoo.registry.errors import RankError, RequestError, WeightsError
from zoo.registry.spec import Tensor
from zoo.testing import relative_error

OPTIONS: dict[str, Any] = {"weights": "random", "dtype": "float32", "device": "cpu"}
MIXTURES = make_card("mixtures", [{"repeat": 3, "mixer": ATTENTION, "ffn": MIXTURE}], dim=20)
BIASED = make_card("biased", [{"repeat": 3, "mixer": {**ATTENTION, "qkv_bias": True, "o_bias": True}, "ffn": GATED}])
TIED = make_card("tied", [{"mixer": {**MAMBA2, "num_groups": 1}, "ffn": GATED}] * 2, tied_embeddings=True)
SAVED = [
    ("everything", "tp=2,pp=2,ep=2", "zoo"),
    ("mixtures", "ep=2", "mistral"),
    ("mixtures", "tp=4", "huggingface"),
    ("mixtures", "pp=2", "huggingface"),
    ("biased", "tp=2", "huggingface"),
    ("tied", "pp=2", "zoo"),
]
"""tp=4: four ranks with two heads of keys and values, of which two ranks each have the same one."""


@pytest.fixture
def cards(everything: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"everything": everything, "mixtures": MIXTURES, "biased": BIASED, "tied": TIED}


@pytest.mark.parametrize(("card", "devices", "layout"), SAVED)
def test_files_are_those_of_one_process(
    card: str, devices: str, layout: str, cards: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several files, sent in chunks that are no whole rows."""
    monkeypatch.setattr(gather, "CHUNK", 100)
    with zoo.load(cards[card], **OPTIONS) as alone:
        alone.save(tmp_path / "alone", layout=layout, file_bytes=10_000)
    with zoo.load(cards[card], devices=devices, **OPTIONS) as spread:
        expected = spread.logits([5, 66, 0, 31])
        saved = spread.save(tmp_path / "spread", layout=layout, file_bytes=10_000)
        assert len(saved.files) > 3
        assert same_files(tmp_path / "alone", tmp_path / "spread")
        assert torch.equal(spread.logits([5, 66, 0, 31]), expected)
    with zoo.load(tmp_path / "spread", dtype="float32", device="cpu") as again:
        assert relative_error(again.logits([5, 66, 0, 31]), expected) < 1e-4


def test_packed_weights_are_gathered_plain(tmp_path: Path) -> None:
    """In bfloat16 and of sizes that the native kernels take."""
    attention = {**ATTENTION, "num_heads": 4, "head_dim": 32}
    card = make_card("dense", [{"repeat": 2, "mixer": attention, "ffn": {**GATED, "hidden_dim": 128}}], dim=64)
    for devices in (None, "tp=2", "pp=2"):
        with zoo.load(card, devices=devices, **OPTIONS | {"dtype": "bfloat16"}) as model:
            model.save(tmp_path / str(devices))
        assert same_files(tmp_path / "None", tmp_path / str(devices))


def test_merged_adapters_are_part_of_it(tmp_path: Path) -> None:
    with zoo.load(MIXTURES, **OPTIONS) as alone:
        adapter = write_adapter(tmp_path / "adapter", alone.plan)
    with zoo.load(MIXTURES, devices="tp=2,pp=2", adapters=[adapter], **OPTIONS) as spread:
        expected, plain = spread.logits([5, 66, 0, 31]), spread.logits([5, 66, 0, 31], adapter=None)
        with pytest.raises(RequestError, match=r"not part of the weights; found adapter\. Merge them or unload them"):
            spread.save(tmp_path / "merged")
        spread.merge_adapter("adapter")
        spread.save(tmp_path / "merged")
    with zoo.load(tmp_path / "merged", dtype="float32", device="cpu") as again:
        assert relative_error(again.logits([5, 66, 0, 31]), expected) < 1e-4 < relative_error(plain, expected)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    mixer = {**ATTENTION, "num_heads": 4, "head_dim": 32}
    card = make_card("wide", [{"repeat": 2, "mixer": mixer, "ffn": {**GATED, "hidden_dim": 256}}], dim=128)
    with (
        zoo.load(card, devices="pp=2", quantize="int8", **OPTIONS) as spread,
        pytest.raises(RequestError, match=r"quantised weights are not saved.*int8.*Load the model without `quantize`"),
    ):
        spread.save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def spread() -> Iterator[Model]:
    with zoo.load(MIXTURES, devices="pp=2", **OPTIONS) as model:
        yield model


def at(number: int, do: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Does something before the tensor of that number is brought together."""
    plain, count = Gathered.value, 0

    def value(self: Gathered, tensor: Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == number:
            do()
        return plain(self, tensor)

    monkeypatch.setattr(Gathered, "value", value)


def test_a_full_disk_ends_the_save_alone(spread: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    before = spread.logits([5, 66, 0])
    at(30, full, monkeypatch)
    with pytest.raises(WeightsError, match="saved: the folder cannot be written; found No space left on device"):
        spread.save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(spread.logits([5, 66, 0]), before)
    spread.save(tmp_path / "saved")


@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_stands_still_is_named(
    number: signal.Signals, spread: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [worker] = children(os.getpid())
    impatient(spread, 2)
    at(30, lambda: os.kill(worker, number), monkeypatch)
    start = monotonic()
    words = (
        "has ended; found signal SIGKILL" if number == signal.SIGKILL else "gives no sign of life; found none for 2 s"
    )
    with pytest.raises(RankError, match=f"rank 1 of 2 {words}"):
        spread.save(tmp_path / "saved")
    assert monotonic() - start < SOON
    assert list(tmp_path.iterdir()) == []


@linux
def test_ctrl_c_ends_the_save_alone(spread: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert threading.current_thread() is threading.main_thread()
    at(30, lambda: os.kill(os.getpid(), signal.SIGINT), monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        spread.save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []
    spread.save(tmp_path / "saved")
