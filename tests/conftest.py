"""Fixtures for every test. No test may reach another machine."""

from __future__ import annotations

import importlib.util
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

LOCAL = {"127.0.0.1", "::1", "localhost"}


@pytest.fixture(scope="session", autouse=True)
def _only_this_machine() -> Iterator[None]:
    """Connections to other machines fail, so that a test which forgets its local server is found."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOCAL:
            raise ConnectionRefusedError(f"a test tried to reach {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


def _reference(name: str) -> ModuleType:
    file = Path(__file__).parent / "reference" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"reference_{name}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def always_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences are given drafts in every step, whatever came of the last ones and however fast this machine is."""
    from zoo.engine.drafting import MOST, Pace
    from zoo.engine.ledger import Ledger

    monkeypatch.setattr(Pace, "ask", lambda self, ledger: MOST)
    monkeypatch.setattr(Ledger, "knows", lambda self, rows: True)


@pytest.fixture(scope="session")
def mistral_inference() -> ModuleType:
    """The oracle `tests/reference/mistral_inference.py`."""
    if importlib.util.find_spec("xformers") is None:
        pytest.skip("mistral-inference needs xformers, which has no wheel for this machine")
    return _reference("mistral_inference")
