"""Processes that torchrun has started find each other and answer as one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.devices.machines import free_port, two_machines
from zoo.devices.likeness import compare, traits
from zoo.locating import locate
from zoo.registry.card import load_card
from zoo.registry.errors import RequestError
from zoo.registry.resolve import resolve

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


def machines(commands: Sequence[Sequence[str]], env: Sequence[dict[str, str]]) -> list[tuple[int, str, str]]:
    """What processes say that run at the same time, one on each machine: exit code, stdout, stderr."""
    started = [
        subprocess.Popen(command, env=os.environ | own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command, own in zip(commands, env, strict=True)
    ]
    try:
        ended = [process.communicate(timeout=100) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *said) for process, said in zip(started, ended, strict=True)]


def ask(*options: str) -> list[str]:
    return ["run", "tiny", "--device", "cpu", "--temperature", "0", *options, "--prompt", PROMPT]


def test_two_machines_give_one_answer_in_stages() -> None:
    rendezvous = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *rendezvous, "--nproc-per-node", "1", "--node-rank"]
    first, second = machines([[*torchrun, str(node), "-m", "zoo", *ask()] for node in range(2)], [{}, {}])
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert "8 experts" in first[1]
    assert second[1] == ""
    assert "2 devices (tp=1,pp=2,ep=1); layers 0 to " in first[2]


def two(*options: Sequence[str]) -> list[tuple[int, str, str]]:
    """`zoo run` on two machines, as whoever sets torchrun's variables starts it, each with options of its own."""
    commands = [[sys.executable, "-m", "zoo", *ask(*own)] for own in options]
    return machines(commands, [place | {"ZOO_DEADLINE": "60"} for place in two_machines()])


def test_files_that_one_machine_lacks_are_named_on_both(tmp_path: Path) -> None:
    first, second = two([], ["--weights", str(tmp_path / "nowhere")])
    assert first[0] == second[0] == 2
    assert "rank 1, " in first[2]
    assert "nowhere" in first[2]
    assert "nowhere" in second[2]
    first, second = two(["--weights", str(tmp_path / "nowhere")], [])
    assert first[0] == second[0] == 2
    assert "nowhere" in first[2]
    assert "rank 0, " in second[2]
    assert "nowhere" in second[2]


def test_machines_with_unlike_files_are_refused(tmp_path: Path) -> None:
    folder = locate("tiny").folder
    assert folder is not None
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    [weights] = other.glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[len(data) // 32 * 16 + 5] ^= 1
    weights.write_bytes(data)
    first, second = two([], ["--weights", str(other)])
    assert first[0] == 2
    assert second[0] == 1
    assert "rank 1, weights: ranks must have the same weights; found " in first[2]
    assert "ranks must have the same weights" in second[2]


def test_whatever_differs_is_named() -> None:
    plan = resolve(load_card("tiny"))
    first = traits(plan, "float32", None, "random")
    compare(first, first)
    for own, name in (
        (traits(plan, "bfloat16", None, "random"), "dtype"),
        (traits(plan, "float32", "int8", "random"), "quantize"),
        (traits(resolve(load_card("mistral-7b-v0.3")), "float32", None, "random"), "card"),
        (first | {"zoo": "0.0.1"}, "zoo"),
        ({}, "zoo"),
    ):
        with pytest.raises(RequestError, match=f"^{name}: ranks must have the same {name}; found "):
            compare(own, first)
