"""How the ranks of a run find each other: processes that the first one starts, or those that torchrun has started."""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from time import monotonic
from typing import Any

import torch
import torch.distributed
from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from zoo.devices.channel import Channel, Door, knock
from zoo.devices.group import LostError, Waits
from zoo.devices.lead import Ranks
from zoo.devices.mesh import Mesh
from zoo.devices.peer import MEETING
from zoo.devices.process_group import ProcessGroup
from zoo.devices.processes import Worker
from zoo.registry.environment import deadline
from zoo.registry.errors import RankError, RequestError, ZooError, error_of, fields_of

LOCAL = "127.0.0.1"
KEY = "zoo"
_MET: list[Store] = []
"""Where this process has met those that torchrun has started beside it."""


@dataclass(frozen=True)
class Meeting:
    """Where the tensors of ranks meet. host: the address that gloo listens at."""

    store: Store
    host: str
    rank: int
    size: int
    waits: Waits = field(default_factory=Waits)

    def group(self, ranks: Sequence[int], device: torch.device) -> ProcessGroup:
        """A group of these ranks, this one among them; each of them calls this at the same time."""
        name, rank = "-".join(map(str, ranks)), ranks.index(self.rank)
        return ProcessGroup(self.store, name, rank, len(ranks), device, self.host, self.waits)

    def groups(self, mesh: Mesh, device: torch.device) -> tuple[ProcessGroup, ProcessGroup]:
        """The group of all ranks, and that of this one's stage."""
        world = self.group(range(self.size), device)
        near = mesh.near(self.rank)
        return world, world if len(near) in (1, self.size) else self.group(near, device)


def start(size: int, threads: int) -> tuple[Meeting, Ranks]:
    """Starts the other ranks on this machine and meets them. Raises RankError when one does not come."""
    limit, token = MEETING * deadline(), secrets.token_hex(16)
    with _named("this machine's own address"):
        store = _own_store(limit)
    door = Door(LOCAL, token)
    said = {"host": LOCAL, "port": door.port, "token": token, "store": store.port, "size": size}
    workers = {rank: Worker(rank, {**said, "rank": rank}, threads) for rank in range(1, size)}
    meeting = Meeting(store, LOCAL, 0, size)
    return meeting, Ranks(_admitted(door, size, workers, limit), workers, deadline(), meeting.waits)


def _own_store(limit: float) -> TCPStore:
    """A store that this machine alone can reach: torch by itself would listen at every address."""
    listener = socket.create_server((LOCAL, 0))
    return TCPStore(
        LOCAL,
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=limit),
        master_listen_fd=listener.detach(),
    )


def come(said: dict[str, Any]) -> tuple[Meeting, Channel]:
    """Meets the first rank, on the other side of `start`."""
    limit = MEETING * deadline()
    channel = knock(said["host"], said["port"], said["rank"], said["token"], limit)
    store = TCPStore(said["host"], said["store"], is_master=False, timeout=timedelta(seconds=limit))
    return Meeting(store, said["host"], said["rank"], said["size"]), channel


def _admitted(door: Door, size: int, workers: dict[int, Worker], limit: float) -> dict[int, Channel]:
    """A channel to every other rank."""
    found: dict[int, Channel] = {}
    end = monotonic() + limit
    try:
        while len(found) < size - 1:
            came = door.admit(0.2)
            if came is not None and 0 < came[0] < size:
                found[came[0]] = came[1]
                continue
            missing = sorted({*range(1, size)} - {*found})
            dead = [worker for rank, worker in workers.items() if rank in missing and not worker.running]
            if dead:
                raise RankError(f"rank {dead[0].rank} of {size} has ended", where="devices", found=dead[0].cause)
            if monotonic() > end:
                raise RankError(
                    "ranks have not come",
                    where="devices",
                    found=f"none of {', '.join(map(str, missing))} within {limit:g} s",
                    hint="ZOO_DEADLINE=SECONDS allows more",
                )
    except BaseException:
        for channel in found.values():
            channel.close()
        for worker in workers.values():
            worker.end(monotonic())
        raise
    finally:
        door.close()
    return found


@contextmanager
def _named(where: str) -> Iterator[None]:
    """torch's errors of addresses and ports, in words."""
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        text = str(error).partition("\n")[0]
        raise RankError("the ranks cannot meet", where=where, found=text[:300]) from None


def started() -> tuple[int, int] | None:
    """(rank, number of ranks) where torchrun, or who sets its variables, has started this process.

    Raises RequestError for values that mean nothing.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except ValueError:
        rank, size = -1, 0
    if not 0 <= rank < size:
        raise RequestError(
            "not a rank",
            where="RANK, WORLD_SIZE",
            found=f"{os.environ['RANK']!r} of {os.environ['WORLD_SIZE']!r}",
            expected="numbers as torchrun sets them",
        )
    return rank, size


def report(error: ZooError) -> None:
    """Tells the processes that torchrun has started beside this one of an error before they have met, so that they do
    not wait for it until the deadline: the first one tells the others, each other one the first."""
    with suppress(ZooError, RuntimeError, LostError, TimeoutError):
        rank, size = started() or (0, 1)
        if size == 1 or _MET:
            return
        if rank:
            _, first = join_started(rank, size)
            assert isinstance(first, Channel)
            first.send({"error": fields_of(error)})
            first.wait_at_most(MEETING * deadline())
            # What is closed with bytes unread may take those with it that the other side has not read.
            while True:
                first.receive()
        else:
            store, _ = _started_store(rank, size)
            store.set(KEY, json.dumps({"error": fields_of(error)}))
            # The store is this process's, and what nobody has read by then ends with it.
            store.wait([_heard(other) for other in range(1, size)], timedelta(seconds=deadline()))


def _heard(rank: int) -> str:
    """Under which key a rank says that it has read of an error."""
    return f"{KEY}/{rank}"


def _started_store(rank: int, size: int) -> tuple[Store, str]:
    """Where the processes that torchrun has started find each other, and the first one's address."""
    host = os.environ.get("MASTER_ADDR", LOCAL)
    with _named(f"{host}:{os.environ.get('MASTER_PORT', '')}"):
        store, *_ = next(rendezvous("env://", rank, size, timeout=timedelta(seconds=MEETING * deadline())))
    _MET.append(store)
    return store, host


def join_started(rank: int, size: int) -> tuple[Meeting, Ranks | Channel]:
    """Meets the ranks that torchrun has started: the first one gets the others, these a channel to it."""
    limit = MEETING * deadline()
    store, host = _started_store(rank, size)
    meeting = Meeting(store, host, rank, size)
    if rank:
        with _named(host):
            said = json.loads(store.get(KEY).decode())
        if "error" in said:
            store.set(_heard(rank), "")
            raise error_of("rank 0", said["error"])
        return meeting, knock(host, said["port"], rank, said["token"], limit)
    token = secrets.token_hex(16)
    door = Door(host if host in (LOCAL, "localhost") else "", token)
    store.set(KEY, json.dumps({"port": door.port, "token": token}))
    return meeting, Ranks(_admitted(door, size, {}, limit), {}, deadline(), meeting.waits)
