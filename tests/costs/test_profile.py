"""What was measured of a machine is stored, found again, and refused when it does not hold here."""

from __future__ import annotations

from pathlib import Path

import pytest

from zoo import machine
from zoo.costs.profile import Key, Limits, Pace, Product, Profile, Speed, profile_file, store, stored
from zoo.registry.errors import ZooError

LIMITS = Limits(read={"sum": 2e10, "rows": 3e10}, multiply={"bfloat16": 1e11, "float32": 2e10}, call_s=1e-6)
SPEED = Speed(
    products={"plain": (Product(elements=1000, rows=1, seconds=1e-10),)},
    elements=1e9,
    step_s=1e-4,
    sequence_s=0.0,
    paces={"attention": Pace(call_s=1e-5, item_s=1e-5, read=1e10, multiply=1e10)},
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def profile(**changes: str) -> Profile:
    key = Key.here().model_copy(update=changes)
    return Profile(
        key=key, measured="2026-11-28T05:00:00+00:00", seconds=4.0, limits=LIMITS, speeds={"bfloat16": SPEED}
    )


def test_stored_is_found_again(cache: Path) -> None:
    file = store(profile(), "cpu")
    assert file == cache / "zoo/machine-cpu.json"
    assert stored("cpu") == profile()
    assert [f.name for f in file.parent.iterdir()] == [file.name]


def test_generations_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Virtual machines often tell of a processor no more than its maker."""
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(machine, "CPU_INFO", info)
    told = []
    for family, model in ((25, 17), (26, 2)):
        one = f"processor\t: 0\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: AMD EPYC\nstepping\t: 1\n"
        info.write_text(f"{one}\n{one}")
        told.append(Key.here().processor)
    assert told == ["AMD EPYC family 25 model 17", "AMD EPYC family 26 model 2"]
    info.write_text("processor\t: 0\nmodel name\t: Cortex\n")
    assert Key.here().processor == "Cortex"
    info.unlink()
    assert Key.here().processor


def test_the_limit_is_the_fastest_way() -> None:
    assert (LIMITS.read_way, LIMITS.bytes_per_second) == ("rows", 3e10)


def test_nothing_measured_says_how() -> None:
    with pytest.raises(ZooError, match=r"has not been measured.*`zoo bench --machine`"):
        stored("cpu")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": 1}', "\0"], ids=repr)
def test_a_broken_profile_is_refused(text: str) -> None:
    store(profile(), "cpu").write_text(text)
    with pytest.raises(ZooError, match=r"machine-cpu.json: the machine's profile is broken; found .*`zoo bench"):
        stored("cpu")


def test_a_profile_without_sense_is_refused() -> None:
    file = store(profile(), "cpu")
    file.write_text(file.read_text().replace("20000000000.0", "-1.0"))
    with pytest.raises(ZooError, match=r"broken; found .*greater than 0 at limits\.read\.sum"):
        stored("cpu")


@pytest.mark.parametrize("name", ["processor", "torch", "zoo", "threads"])
def test_a_profile_of_other_circumstances_is_refused(name: str) -> None:
    store(profile(**{name: "another"}), "cpu")
    with pytest.raises(ZooError, match=f"other circumstances; found {name} another; expected"):
        stored("cpu")


def test_a_gpu_is_known_by_its_name() -> None:
    store(profile(accelerator="first"), "cuda")
    assert stored("cuda").device == "first"
    with pytest.raises(ZooError, match="accelerator first; expected second"):
        stored("cuda", "second")


def test_a_folder_that_cannot_be_written_is_told(cache: Path) -> None:
    (cache / "zoo").write_text("a file")
    with pytest.raises(ZooError, match="cannot be stored"):
        store(profile(), "cpu")
    assert profile_file("cpu").parent == cache / "zoo"
