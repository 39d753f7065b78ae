"""The compiled kernels' file, found without loading it, and why an installation has none. Imports no torch."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from zoo.registry.environment import switch

FOLDER = Path(__file__).parent / "native"

FLAGS = ("-O3", "-fopenmp")
"""With which pyproject.toml lets the sources be compiled."""


def kernels_file() -> Path | None:
    """Zoo's kernels in C; None where they were not built."""
    files = (FOLDER / f"kernels{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def packs() -> bool:
    """Whether weights in bfloat16 are packed on this machine's CPU (zoo.components.native.panels), as far as that is
    known without loading the kernels. Raises RequestError for a ZOO_UNPACKED that is no switch."""
    if switch("ZOO_UNPACKED") or kernels_file() is None or os.environ.get("ZOO_NATIVE") == "off":
        return False
    return {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= _traits()


@cache
def _traits() -> frozenset[str]:
    """What Linux says of the processor, in words; nothing elsewhere."""
    try:
        return frozenset(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return frozenset()


def compiler() -> list[str] | None:
    """The command that an installation would compile with; None where there is none."""
    words = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    return words if words and shutil.which(words[0]) else None


def unbuilt() -> str | None:
    """Why there are no kernels, which is found by building them once more, away from here; None where they are, and on
    processors of a kind for which there are none."""
    if kernels_file() is not None or platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    command = compiler()
    if command is None:
        return "there is no C compiler here; with one, install zoo again"
    with tempfile.TemporaryDirectory() as folder:
        sources = [str(file) for file in sorted(FOLDER.glob("*.c"))]
        out = ["-shared", "-fPIC", "-o", str(Path(folder) / "kernels.so")]
        built = subprocess.run([*command, *FLAGS, *sources, *out], capture_output=True, text=True, errors="replace")
    if built.returncode == 0:
        return f"{command[0]} compiles them now: install zoo again, with `pip install -v` to see what it says"
    lines = [line.strip() for line in built.stderr.splitlines() if line.strip()]
    first = next((line for line in lines if "error" in line), lines[0] if lines else f"status {built.returncode}")
    return f"{command[0]} fails on them: {first}"
