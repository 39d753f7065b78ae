"""Heartbeats: once a second a rank reports what it is doing, while it computes and while it waits.

A thread of its own sends them, so that a rank is heard during a long computation and not heard when the system has
stopped it. It reads what the rank does from that thread's stack, which costs the steps nothing.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Mapping
from types import FrameType
from typing import Any

from torch import nn

from zoo.devices.channel import Channel, ClosedError
from zoo.devices.processes import LOST

INTERVAL = 1.0
"""Seconds between two signs of life, unless what waits for them is more impatient."""

LEAVE = 5.0
"""Seconds that a rank has to end when the first one has gone, before it is ended."""

WAITING = {"zoo.devices.process_group": "another rank", "zoo.devices.peer": "the next step"}
"""Modules in which a rank waits, and for what."""


class Pulse:
    """Tells another rank what this one does, by the thread that makes it.

    follows: whether that one is the first, without which this one ends.
    """

    def __init__(self, channel: Channel, interval: float, *, follows: bool) -> None:
        self._channel, self._interval, self._follows = channel, min(INTERVAL, interval), follows
        self._thread, self._names, self._end = threading.get_ident(), dict[int, str](), threading.Event()
        threading.Thread(target=self._run, name="zoo pulse", daemon=True).start()

    def names(self, module: nn.Module) -> None:
        """From now on the module's parts are known by name."""
        self._names = {id(part): path for path, part in module.named_modules() if path}

    def stop(self) -> None:
        """The rank is about to end."""
        self._end.set()

    def _run(self) -> None:
        host = socket.gethostname()
        while not self._end.is_set():
            waits, doing = activity(sys._current_frames().get(self._thread), self._names)
            try:
                self._channel.send({"alive": doing, "waits": waits, "host": host})
            except ClosedError:
                # This one may stand in an operation that nobody ends.
                if self._follows and not self._end.wait(LEAVE):
                    os._exit(LOST)
                return
            self._end.wait(self._interval)


def activity(frame: FrameType | None, names: Mapping[int, str]) -> tuple[bool, str]:
    """Whether a thread waits for others, and what it does, from its innermost call on: the part of the model that it is
    in, or the function of zoo."""
    function = ""
    while frame is not None:
        module, code = frame.f_globals.get("__name__", ""), frame.f_code
        line = f"{code.co_filename.rpartition('/')[2]}, line {frame.f_lineno}"
        if module in WAITING and not function:
            return True, f"its wait for {WAITING[module]}"
        if code.co_name == "forward" and (path := names.get(_owner(frame))):
            return False, f"{path} ({line})"
        if not function and module.partition(".")[0] == "zoo":
            function = f"{code.co_name} ({line})"
        frame = frame.f_back
    return False, function or "an unknown place"


def _owner(frame: FrameType) -> int:
    owner: Any = frame.f_locals.get("self")
    return id(owner)
