"""Processes that torchrun has started find each other and answer as one."""

from __future__ import annotations

import subprocess
import sys

PROMPT = "How many experts does Mixtral 8x7B have?"


def test_torchrun_gives_one_answer() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "zoo"]
    run = subprocess.run(
        [*torchrun, "run", "tiny", "--device", "cpu", "--temperature", "0", "--prompt", PROMPT],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("8 experts") == 1
    assert run.stderr.count("2 devices (tp=2,pp=1,ep=1), ") == 1


def test_devices_must_be_as_many_as_processes() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "zoo"]
    run = subprocess.run(
        [*torchrun, "run", "tiny", "--device", "cpu", "--devices", "4", "--prompt", PROMPT],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert run.returncode != 0
    assert run.stdout == ""
    assert "as many devices as processes are needed; found 4 devices and 2 processes" in run.stderr
