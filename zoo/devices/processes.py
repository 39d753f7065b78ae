"""The processes of a run: started, watched, and ended with the run, whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from time import monotonic
from typing import Any

LOST = 75
"""Exit code of a rank that stopped because another one did."""

KEPT = 20
"""Lines of a rank's stderr that are kept."""


class Worker:
    """One rank's process, which ends when its stdin does: no worker outlives the process that started it."""

    def __init__(self, rank: int, start: dict[str, Any], threads: int) -> None:
        self.rank = rank
        self._lines: deque[str] = deque(maxlen=KEPT)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "zoo.devices.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=_environment(threads),
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._watch, name=f"zoo rank {rank}", daemon=True)
        self._reader.start()
        with contextlib.suppress(OSError):
            self._tell(json.dumps(start) + "\n")

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def cause(self) -> str:
        """How it ended, in words: its signal or exit code, and its last line on stderr."""
        code = self._process.poll()
        if code is None:
            return "it is still running"
        self._reader.join(1.0)
        how = f"exit code {code}" if code >= 0 else f"signal {_signal_name(-code)}"
        return f"{how}; its last words: {self._lines[-1]}" if self._lines else how

    @property
    def culprit(self) -> bool:
        """Whether it has ended of itself, and not because another rank did."""
        return self._process.poll() not in (None, 0, LOST)

    def kill(self) -> None:
        """Ends it at once."""
        self._process.kill()

    def end(self, deadline: float) -> None:
        """Waits until `deadline` (monotonic seconds), then kills it."""
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(max(deadline - monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(1.0)

    def _tell(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text)
        self._process.stdin.flush()

    def _watch(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                if line.strip():
                    self._lines.append(line.strip())


def _environment(threads: int) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(threads)}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
