"""A Group of processes, by torch.distributed: gloo on CPUs, NCCL on CUDA devices.

The groups are made from a store alone, not through torch's one default group, so that a process may hold several
models. Nothing here touches its collectives of objects, which pickle.
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from zoo.devices.group import LostError, Waits
from zoo.registry.errors import ZooError

PATIENCE = 24 * 3600.0
"""Seconds after which torch ends an operation: ranks that stand still are found otherwise, and sooner."""


class ProcessGroup:
    """Ranks in processes of their own. waits: told of each wait for others."""

    def __init__(
        self, store: Store, name: str, rank: int, size: int, device: torch.device, host: str, waits: Waits
    ) -> None:
        if not dist.is_available():
            raise ZooError("this torch has no torch.distributed", hint="install a build that has")
        self.rank, self.size, self.device, self.waits = rank, size, device, waits
        shared, limit = PrefixStore(name, store), timedelta(seconds=PATIENCE)
        with _lost():
            self._group: Any = (
                _nccl(shared, rank, size, limit) if device.type == "cuda" else _gloo(shared, rank, size, limit, host)
            )

    def sum(self, x: Tensor) -> Tensor:
        """In place, where the tensor lies in one piece."""
        x = x.contiguous()
        with _lost(), self.waits:
            self._group.allreduce([x]).wait()
        return x

    def join(self, x: Tensor, widths: list[int]) -> Tensor:
        """Padded to the widest, since all ranks send equally much."""
        if not len(x):
            return x.new_empty(0, sum(widths))
        widest = max(widths)
        if x.shape[1] < widest:
            x = torch.nn.functional.pad(x, (0, widest - x.shape[1]))
        options = dist.GatherOptions()
        options.rootRank = 0
        parts = [torch.empty_like(x) for _ in widths] if self.rank == 0 else []
        with _lost(), self.waits:
            self._group.gather([parts] if self.rank == 0 else [], [x.contiguous()], options).wait()
        if self.rank:
            return x
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    def spread(self, x: Tensor) -> Tensor:
        """In place."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        with _lost(), self.waits:
            self._group.broadcast([x], options).wait()
        return x

    def send(self, x: Tensor, rank: int) -> Callable[[], None]:
        """Returns at once; the other one may come later."""
        x = x.contiguous()
        with _lost():
            work = self._group.send([x], rank, 0)

        def wait(sent: Tensor = x) -> None:
            with _lost(), self.waits:
                work.wait()

        return wait

    def receive(self, x: Tensor, rank: int) -> Tensor:
        """In place."""
        with _lost(), self.waits:
            self._group.recv([x], rank, 0).wait()
        return x

    def close(self) -> None:
        """Lets go of the connections, also while operations wait."""
        with contextlib.suppress(RuntimeError):
            self._group.abort()


@contextmanager
def _lost() -> Iterator[None]:
    """What torch raises when another rank has gone, as LostError."""
    try:
        yield
    except RuntimeError as error:
        raise LostError(str(error).partition("\n")[0]) from None


def _gloo(store: Store, rank: int, size: int, limit: timedelta, host: str) -> Any:
    options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = limit
    if _is_loopback(host):
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host, lazy_init=False)]
    else:
        options._devices = [dist.ProcessGroupGloo.create_default_device(lazy_init=False)]
    return dist.ProcessGroupGloo(store, rank, size, options)


def _nccl(store: Store, rank: int, size: int, limit: timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = limit
    return dist.ProcessGroupNCCL(store, rank, size, options)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
