"""A rank that follows: it holds its share of the model and does what the first rank says, until that one ends.

Run as `python -m zoo.devices.worker` by `zoo.devices.processes`, with one line of JSON on stdin.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zoo.device import memory_free
from zoo.devices.channel import Channel
from zoo.devices.gather import GIVE, give
from zoo.devices.group import Group, LostError, Waits
from zoo.devices.likeness import compare
from zoo.devices.meet import Meeting, come
from zoo.devices.peer import MEETING, Peer, Watch
from zoo.devices.processes import LOST
from zoo.devices.pulse import Pulse
from zoo.devices.setup import Setup
from zoo.devices.shares import join
from zoo.engine.engine import Engine
from zoo.engine.leading import ANSWERED, Reads, follow
from zoo.loading.fill import adapter_of, filled
from zoo.registry.environment import deadline
from zoo.registry.errors import RankError, ZooError, fields_of

Gives = Callable[[dict[str, Any]], None]
"""Sends the first rank what this one has of a tensor."""


def serve(
    meeting: Meeting, channel: Channel, weights: str | Path | None = None, traits: Mapping[str, str] | None = None
) -> int:
    """Follows the first rank; returns the exit code.

    weights: this machine's, where they are not the first's. traits: what this rank has, where it was started apart.
    """
    pulse, first = Pulse(channel, deadline() / 10, follows=True), Peer(0, channel)
    first.patience = MEETING
    watch = Watch([first], meeting.size, Waits(), deadline(), _orphaned)
    try:
        _serve(meeting, first, pulse, weights, traits or {})
    except LostError:
        return LOST
    except ZooError as error:
        channel.send({"error": fields_of(error)})
        sys.stderr.write(f"zoo: {error}\n")
        return 1
    finally:
        watch.stop()
        pulse.stop()
    return 0


def _orphaned(fault: RankError, _: int) -> None:
    """The first rank stands still: nobody else would end this one, which may wait for it in an operation."""
    sys.stderr.write(f"zoo: {fault}\n")
    sys.stderr.flush()
    os._exit(1)


def _serve(meeting: Meeting, first: Peer, pulse: Pulse, weights: str | Path | None, traits: Mapping[str, str]) -> None:
    setup, channel = Setup(**first.receive()), first.channel
    first.patience = 1
    compare(traits, setup.traits)
    plan, placement = setup.plan(), setup.placement(meeting.rank)
    if placement.device.type == "cpu":
        torch.set_num_threads(setup.threads)
    channel.send({"ready": memory_free(placement.device)})
    part = setup.part(plan, meeting.rank, _told(first)["borders"])
    world, near = meeting.groups(part.mesh, placement.device)
    weights = setup.weights if weights is None else weights
    module, *_ = filled(plan, placement, weights, quantize=setup.quantize, progress=_telling(channel), part=part)
    pulse.names(module)
    join(module, part, world, near, placement.dtype)
    channel.send({"loaded": memory_free(placement.device)})
    sizes = {"device": placement.device, "dtype": placement.dtype, **_told(first)}
    with Engine(module, part.local, follows=True, **sizes) as engine:
        reads = partial(adapter_of, plan=plan, module=module, part=part)
        follow_to_the_end(first, engine, world, reads, partial(give, part=part, module=module, world=world))


def _told(first: Peer) -> dict[str, Any]:
    """What the first rank says before there is an engine. Raises LostError where it ends the run instead."""
    said = first.receive()
    if not isinstance(said, dict):
        raise LostError("the first rank has ended the run")
    return said


def follow_to_the_end(first: Peer, engine: Engine, world: Group, reads: Reads, gives: Gives) -> None:
    """Does what the first rank says until it says that this is all. Between steps it may be silent for longer: what
    has asked for them may keep its process busy, or be suspended."""
    _, runner = engine.parts
    while True:
        first.patience = MEETING
        told = first.receive()
        first.patience = 1
        for task, message in told:
            if task == "end":
                return
            if task == GIVE:
                gives(message)
            else:
                follow(runner, world, task, message, reads)
            if task in ANSWERED:
                first.channel.send({"done": task})


def _telling(channel: Channel) -> Callable[[int, int], None]:
    def tell(done: int, total: int) -> None:
        channel.send({"progress": [done, total]})

    return tell


def _end_with_parent() -> None:
    """Whoever started this process holds the other end of stdin, as long as it lives."""
    sys.stdin.read()
    os._exit(LOST)


def main() -> None:
    """One worker's life."""
    said: dict[str, Any] = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    code = serve(*come(said))
    sys.stderr.flush()
    # Without waiting for threads of torch that may wait for ranks which have gone.
    os._exit(code)


if __name__ == "__main__":
    main()
