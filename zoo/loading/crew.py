"""Several threads for the pieces of a file: some wait for the disk while others convert, and memory is taken by all.

What a thread takes for the first time the system has to clear, on some virtual machines to fetch from their host, which
is slower than most disks: another reason for several.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from zoo.components import native

Job = TypeVar("Job")

WORKERS = 8
"""Threads, each with a request to the disk or a piece to convert; more than cores, as disks want several requests."""

AHEAD = 2
"""Jobs for each worker that may be done or waiting before their turn."""


def in_order(work: Callable[[Job], None], jobs: Iterable[Job]) -> Iterator[Job]:
    """Does the jobs, several at a time, and yields each when it and all before it are done.

    Jobs are taken from `jobs` by the caller's thread, a few ahead. The first error ends it: what runs is waited for,
    nothing more is begun.
    """
    pool = ThreadPoolExecutor(WORKERS, "zoo-loading", _alone)
    begun: deque[tuple[Job, Future[None]]] = deque()
    try:
        for job in jobs:
            begun.append((job, pool.submit(work, job)))
            if len(begun) == AHEAD * WORKERS:
                yield _done(*begun.popleft())
        while begun:
            yield _done(*begun.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _done(job: Job, future: Future[None]) -> Job:
    future.result()
    return job


def _alone() -> None:
    """The calling thread computes by itself: there are as many as are of use."""
    torch.get_num_threads()  # torch decides on its own number at a thread's first question
    if native.missing() is None:
        native.library().handle.zoo_alone()
