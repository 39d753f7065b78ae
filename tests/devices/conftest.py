"""Models that one process and several run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.devices.likes import AUDIO, EVERYTHING, VISION, make_card


@pytest.fixture(scope="package")
def everything() -> dict[str, Any]:
    """A card with every mixer, mixtures and both encoders."""
    return make_card("everything", EVERYTHING, vision=VISION, audio=AUDIO)


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Ranks wait for each other at most so long, and the processes of these tests take one core each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_DEADLINE", "60")
        patch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
        yield
