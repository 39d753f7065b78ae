"""Processes that torchrun has started find each other and answer as one."""

from __future__ import annotations

import subprocess
import sys

PROMPT = "How many experts does Mixtral 8x7B have?"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    """What `zoo run tiny` says in two processes of torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "zoo"]
    command = [*torchrun, "run", "tiny", "--device", "cpu", *options, "--prompt", PROMPT]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def test_torchrun_gives_one_answer() -> None:
    done = run("--temperature", "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("8 experts") == 1
    assert done.stderr.count("2 devices (tp=2,pp=1,ep=1), ") == 1


def test_devices_must_be_as_many_as_processes() -> None:
    done = run("--devices", "4")
    assert done.returncode != 0
    assert done.stdout == ""
    assert "as many devices as processes are needed; found 4 devices and 2 processes" in done.stderr
