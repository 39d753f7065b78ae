"""Runs the command line inside the test's process."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest

from zoo.cli import main


@dataclass(frozen=True)
class Outcome:
    """What a command printed and its exit status."""

    out: str
    err: str
    code: int


Command = Callable[..., Outcome]


@pytest.fixture
def zoo_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """`zoo_command("run", "tiny", ..., stdin="text")`: as the user would type it, with piped input and output."""

    def run(*arguments: str, stdin: str = "") -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*arguments])
        printed = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Outcome(printed.out, printed.err, ended.value.code)

    return run


@pytest.fixture
def quick_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's limits from four megabytes: figures that mean little, in no time."""
    from zoo.bench.limits import machine_limits

    small = partial(machine_limits, total_bytes=1 << 22, size=128, repeats=1)
    monkeypatch.setattr("zoo.bench.limits.machine_limits", small)
    monkeypatch.setattr("zoo.bench.machine.machine_limits", small)
