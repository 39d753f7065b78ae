"""Tests of what kernels in C do faster, once more in a process that leaves them out: most machines never have them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from zoo.components import native

ROOT = Path(__file__).parent.parent

CHOSEN = (
    "tests/components/test_linear.py",
    "tests/components/test_quantised.py",
    "tests/loading/test_quantising.py",
    "tests/test_model.py",
)


@pytest.mark.skipif(native.missing() is not None, reason="all tests run without the kernels")
def test_without_kernels_all_works_by_torch() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *CHOSEN]
    env = os.environ | {"ZOO_NATIVE": "off"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
