"""However a run over several processes ends, it ends soon, says why, and leaves nobody behind."""

from __future__ import annotations

import gc
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

import zoo
from tests.devices.machines import channels, two_machines
from zoo.components.attention.gqa import Attention
from zoo.devices.channel import Channel, ClosedError, Door, knock
from zoo.devices.group import Waits
from zoo.devices.lead import Ranks
from zoo.devices.peer import MEETING, Peer, Watch
from zoo.devices.processes import LOST
from zoo.model import Model
from zoo.registry.errors import RankError, RequestError, WeightsError, ZooError

SOON = 10.0


def gone(pid: int) -> bool:
    """Whether a process has ended: a zombie that nobody has asked for yet counts."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_for(pids: list[int]) -> None:
    end = monotonic() + SOON
    while not all(map(gone, pids)):
        assert monotonic() < end, "a process was left behind"
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    """The workers that a process has started."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid and b"zoo.devices.worker" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except (OSError, IndexError, ValueError):
            continue
    return found


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes by Linux's /proc")


@linux
def test_a_killed_rank_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with zoo.load("tiny", devices=2, device="cpu") as model:
        workers = children(os.getpid())
        assert len(workers) == 1
        stream = model.stream("Hello", max_tokens=500, ignore_eos=True)
        next(stream)
        os.kill(workers[0], signal.SIGKILL)
        start = monotonic()
        with pytest.raises(RankError, match="rank 1 of 2 has ended; found signal SIGKILL"):
            for _ in stream:
                pass
        assert monotonic() - start < SOON
        with pytest.raises(RankError, match="rank 1 of 2 has ended"):
            model.generate("Hello", max_tokens=1)
    wait_for(workers)


def impatient(model: Model, seconds: float) -> None:
    """From now on a rank that stands still so long is given up."""
    ranks = model.engine._others
    assert isinstance(ranks, Ranks)
    ranks._watch._deadline = seconds


@linux
def test_a_stopped_rank_is_named() -> None:
    with zoo.load("tiny", devices=2, device="cpu") as model:
        impatient(model, 3)
        [worker] = children(os.getpid())
        stream = model.stream("Hello", max_tokens=1000, ignore_eos=True)
        next(stream)
        os.kill(worker, signal.SIGSTOP)
        start, host = monotonic(), re.escape(socket.gethostname())
        with pytest.raises(RankError, match=rf"{host}: rank 1 of 2 gives no sign of life; found none for 3 s; it was"):
            for _ in stream:
                pass
        assert 1 < monotonic() - start < SOON
        with pytest.raises(RankError, match="rank 1 of 2 gives no sign of life"):
            model.generate("Hello", max_tokens=1)
    wait_for([worker])


SLOW_PART = """
import sys

if "zoo.devices.worker" in " ".join(sys.orig_argv):
    import os, time
    from zoo.components.attention.gqa import Attention

    plain, left = Attention.forward, [1]

    def forward(self, *arguments):
        while left and not left.clear():
            time.sleep(float(os.environ["SLOW"]))
        return plain(self, *arguments)

    Attention.forward = forward
"""


@linux
def test_a_rank_that_never_ends_its_part_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW_PART)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("SLOW", "1000")
    with zoo.load("tiny", devices=2, device="cpu") as model:
        impatient(model, 3)
        [worker] = children(os.getpid())
        start = monotonic()
        with pytest.raises(RankError, match=r"rank 1 of 2 does not come on; .* last seen in layers\.0\.mixer \(sitecu"):
            model.generate("Hello", max_tokens=3)
        assert monotonic() - start < SOON
    wait_for([worker])


@linux
def test_a_rank_that_computes_for_long_is_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW_PART)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("ZOO_DEADLINE", "5")
    monkeypatch.setenv("SLOW", "3")
    forward = Attention.forward

    def slow(self: Attention, *arguments: Any) -> Any:
        time.sleep(0.3)
        return forward(self, *arguments)

    monkeypatch.setattr(Attention, "forward", slow)
    with zoo.load("tiny", devices=2, device="cpu") as model:
        impatient(model, 2)
        assert len(model.generate("Hello", max_tokens=1)[0].tokens) == 1


@linux
def test_the_last_words_of_a_rank_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif 'zoo.devices.worker' in ' '.join(sys.orig_argv): sys.exit('the disk is on fire')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(
        RankError, match=r"rank 1 of 2 has ended; found exit code 1; its last words: .*the disk is on fire"
    ):
        zoo.load("tiny", devices=2, device="cpu")
    assert children(os.getpid()) == []


FIRST_RANK = """
import os, signal, sys, zoo
from zoo.components.attention.gqa import Attention
from zoo.devices import run

opened, forward, (when, sign) = run.open_run, Attention.forward, sys.argv[1:]

def struck(*arguments):
    print(when, flush=True)
    sys.stdin.readline()
    os.kill(os.getpid(), getattr(signal, sign))

def open_run(*arguments):
    found = opened(*arguments)
    struck()
    return found

if when == "loading":
    run.open_run = open_run
model = zoo.load("tiny", devices=None if "RANK" in os.environ else 2, device="cpu")
stream = model.stream("Hello", max_tokens=1000, ignore_eos=True)
next(stream)
if when == "idle":
    stream.close()
    struck()
Attention.forward = struck
next(stream)
"""
"""A first rank that is stopped or killed in the middle of loading, in that of a step, or between steps, once it is
given a line."""


def first_rank(when: str, sign: str, env: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FIRST_RANK, when, sign]
    env = os.environ | {"ZOO_DEADLINE": "2"} | env
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True)


@linux
@pytest.mark.parametrize(("when", "sign"), [("loading", "SIGSTOP"), ("generating", "SIGSTOP"), ("idle", "SIGKILL")])
def test_a_first_rank_that_is_stopped_or_killed_leaves_nobody(when: str, sign: str) -> None:
    first = first_rank(when, sign, {})
    assert first.stdout is not None
    with first:
        try:
            assert first.stdout.readline() == f"{when}\n"
            workers = children(first.pid)
            assert len(workers) == 1
            print(file=first.stdin, flush=True)
            wait_for(workers)
        finally:
            first.kill()


@linux
@pytest.mark.parametrize(("when", "sign"), [("generating", "SIGSTOP"), ("loading", "SIGKILL")])
def test_a_rank_started_apart_ends_with_the_first_one(when: str, sign: str) -> None:
    places = two_machines()
    first = first_rank(when, sign, places[0])
    print(file=first.stdin, flush=True)
    other = [sys.executable, "-m", "zoo", "run", "tiny", "--device", "cpu", "--prompt", "Hello"]
    env = os.environ | places[1] | {"ZOO_DEADLINE": "2"}
    with subprocess.Popen(other, env=env, stderr=subprocess.PIPE, text=True) as second:
        try:
            _, said = second.communicate(timeout=4 * SOON)
        finally:
            second.kill()
            first.kill()
            first.communicate()
    host = re.escape(socket.gethostname())
    # Python names some places so: <module>, <listcomp>.
    place = r"(its wait for another rank|[\w<>.]+ \(\w+\.py, line \d+\))"
    silent = rf"zoo: {host}: rank 0 of 2 gives no sign of life; found none for 2 s; it was last seen in {place}\."
    assert (second.returncode, bool(re.search(silent, said))) == ((1, True) if sign == "SIGSTOP" else (LOST, False))


def test_between_steps_a_rank_may_be_silent_for_longer() -> None:
    found: list[int] = []
    peers = [Peer(number, channel) for number, channel in enumerate(channels())]
    peers[0].patience = MEETING
    for peer in peers:
        Watch([peer], 2, Waits(), 0.2, lambda fault, number: found.append(number))
    time.sleep(1)
    assert found == [1]
    for peer in peers:
        peer.channel.close()


@linux
def test_a_model_that_is_dropped_takes_its_workers_along() -> None:
    """But not while somebody still reads from it."""
    model = zoo.load("tiny", devices=2, device="cpu")
    others = model.engine._others
    assert isinstance(others, Ranks)
    workers = [worker.pid for worker in others.workers.values()]
    chunks = model.stream("Hello", max_tokens=4, ignore_eos=True)
    del model, others
    gc.collect()
    assert sum(len(chunk.tokens) for chunk in chunks) == 4
    del chunks
    gc.collect()
    wait_for(workers)


@linux
def test_ctrl_c_ends_the_command_and_its_workers() -> None:
    command = [sys.executable, "-c", "from zoo.cli import main; main()", "run", "tiny", "--prompt", "Hello"]
    run = subprocess.Popen(
        [*command, "--devices", "2", "--device", "cpu", "--temperature", "9", "--seed", "1", "--max-tokens", "1900"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    run.stdout.read(1)
    workers = children(run.pid)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=SOON)
    assert run.returncode == 130
    assert "interrupted" in said
    assert "Traceback" not in said
    assert len(workers) == 1
    wait_for(workers)


def test_a_rank_that_cannot_load_says_why(tmp_path: Path) -> None:
    source = Path(zoo.inspect("tiny").folder or "")
    for name in ("consolidated.safetensors", "tekken.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    with (tmp_path / "consolidated.safetensors").open("r+b") as file:
        file.truncate(5_000_000)
    with pytest.raises(WeightsError, match="consolidated"):
        zoo.load("tiny", devices=2, device="cpu", weights=tmp_path)
    assert children(os.getpid()) == []


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (0, "not a number of devices; found 0; expected a number, a list of devices, or sizes such as tp=2"),
        ("tp=2,tp=2", "not a number of devices; found 'tp=2,tp=2'"),
        ("tp=4,ep=2", "experts are shared out among all ranks of a stage or not at all; found 'tp=4,ep=2'"),
        (
            "tp=3",
            r"mixer.num_kv_heads: .* among 3 ranks; found 2, which 3 does not divide. "
            r"Devices that would do: 2 \(tp=2\), 3 \(pp=3\), 4",
        ),
        ([], "not a number of devices"),
    ],
)
def test_a_bad_layout_is_refused(devices: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        zoo.load("tiny", devices=devices, device="cpu")  # type: ignore[arg-type]


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(RankError, match=rf"127\.0\.0\.1:{port}: the ranks cannot meet.*address already in use"):
            zoo.load("tiny", device="cpu")


def test_ranks_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_DEADLINE", "0.1")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(RankError, match=r"the ranks cannot meet; found Timed out after .* 1/2 clients joined"):
        zoo.load("tiny", device="cpu")


def listens(pid: int) -> set[str]:
    """The addresses, in hexadecimal digits, at which a process listens."""
    opened = [fd for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()]
    inodes = {str(fd.readlink()).removeprefix("socket:[").rstrip("]") for fd in opened if fd.is_symlink()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1].rpartition(":")[0])
    return found


@linux
def test_only_this_machine_can_connect() -> None:
    before = listens(os.getpid())
    with zoo.load("tiny", devices=2, device="cpu"):
        [worker] = children(os.getpid())
        found = (listens(os.getpid()) - before) | listens(worker)
        assert found == {"0100007F"}


def test_strangers_are_not_let_in() -> None:
    door = Door("127.0.0.1", "secret")
    try:
        stranger = knock("127.0.0.1", door.port, 1, "guess", 5.0)
        assert door.admit(1.0) is None
        with pytest.raises(ClosedError):
            stranger.receive()
        with socket.create_connection(("127.0.0.1", door.port)) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert door.admit(1.0) is None
        knock("127.0.0.1", door.port, 3, "secret", 5.0)
        admitted = door.admit(1.0)
        assert admitted is not None
        assert admitted[0] == 3
        assert isinstance(admitted[1], Channel)
    finally:
        door.close()


def test_a_deadline_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_DEADLINE", "soon")
    with pytest.raises(ZooError, match="ZOO_DEADLINE: not a number of seconds; found 'soon'"):
        zoo.load("tiny", devices=2, device="cpu")
