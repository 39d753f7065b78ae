"""Variables of the environment: each has its name in one place, and values that mean nothing are refused."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from zoo.registry.environment import NAMES, strangers, switch, whole
from zoo.registry.errors import RequestError

ROOT = Path(__file__).parent.parent.parent


def test_names_are_those_that_the_sources_read_and_the_page_explains() -> None:
    files = [file for folder in ("zoo", "registry", "components") for file in (ROOT / folder).rglob("*.py")]
    read = {name for file in files for name in re.findall(r"""["'](ZOO_[A-Z_]+)["']""", file.read_text())}
    page = (ROOT / "docs" / "running.md").read_text(encoding="utf-8").partition("## Environment")[2]
    explained = {name for line in page.splitlines() for name in re.findall(r"`(ZOO_[A-Z_]+)`", line.split(" | ")[0])}
    assert read == NAMES == explained


@pytest.mark.parametrize(("value", "on"), [("1", True), ("Yes", True), ("", False), ("0", False), ("off", False)])
def test_switches(value: str, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_OFFLINE", value)
    assert switch("ZOO_OFFLINE") is on


def test_what_is_neither_on_nor_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_OFFLINE", "please")
    with pytest.raises(RequestError, match="ZOO_OFFLINE: neither on nor off; found 'please'; expected 1 or 0"):
        switch("ZOO_OFFLINE")


def test_numbers_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert whole("LOCAL_WORLD_SIZE", 3) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert whole("LOCAL_WORLD_SIZE", 3) == 2
    for value in ("0", "two", "-1", ""):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
        with pytest.raises(RequestError, match="LOCAL_WORLD_SIZE: not a number of processes"):
            whole("LOCAL_WORLD_SIZE", 3)


def test_misspelt_names_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("ZOO_")]:
        monkeypatch.delenv(name)
    assert strangers() == []
    monkeypatch.setenv("ZOO_NATVE", "off")
    monkeypatch.setenv("ZOO_NATIVE", "off")
    monkeypatch.setenv("ZOO_QQQQQQQ", "1")
    assert strangers() == [
        "nothing reads the variable ZOO_NATVE; did you mean 'ZOO_NATIVE'?",
        "nothing reads the variable ZOO_QQQQQQQ",
    ]
