"""Messages between ranks: JSON behind its length, over TCP. Nothing is ever unpickled."""

from __future__ import annotations

import contextlib
import hmac
import json
import socket
import struct
import threading
from typing import Any

from zoo.devices.group import LostError
from zoo.registry.errors import ZooError

LENGTH = struct.Struct("!Q")
LONGEST = 1 << 30
"""Bytes of a message that is still believed."""

HELLO = 5.0
"""Seconds within which one who connects must say who it is."""


class ClosedError(LostError):
    """The other side of a connection has gone."""


class Channel:
    """One end of a connection between two ranks."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _keep_alive(connection)
        self._socket, self._lock = connection, threading.Lock()

    def send(self, message: Any) -> None:
        """Sends plain data. Raises ClosedError."""
        data = json.dumps(message, separators=(",", ":")).encode()
        try:
            with self._lock:
                self._socket.sendall(LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise ClosedError(str(error)) from None

    def receive(self) -> Any:
        """The next message; waits for it however long that takes. Raises ClosedError."""
        (length,) = LENGTH.unpack(self._bytes(LENGTH.size))
        if length > LONGEST:
            raise ClosedError(f"a message of {length} bytes")
        return json.loads(self._bytes(length))

    def wait_at_most(self, seconds: float | None) -> None:
        """From now on, `receive` raises TimeoutError after so many seconds without a byte; None: never."""
        self._socket.settimeout(seconds)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _bytes(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            try:
                piece = self._socket.recv(min(count - len(data), 1 << 20))
            except TimeoutError:
                raise
            except OSError as error:
                raise ClosedError(str(error)) from None
            if not piece:
                raise ClosedError("the connection was closed")
            data += piece
        return bytes(data)


def _keep_alive(connection: socket.socket) -> None:
    """A machine that vanishes without a word is noticed within half a minute."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Door:
    """Where the other ranks of a run find the first one."""

    def __init__(self, host: str, token: str) -> None:
        self._token = token
        self._listener = socket.create_server((host, 0))
        self.port: int = self._listener.getsockname()[1]

    def admit(self, deadline: float) -> tuple[int, Channel] | None:
        """The next rank that comes within so many seconds and knows the token, with its number; None for nobody."""
        self._listener.settimeout(deadline)
        try:
            connection, _ = self._listener.accept()
        except TimeoutError:
            return None
        connection.settimeout(HELLO)
        channel = Channel(connection)
        try:
            hello = channel.receive()
        except (ClosedError, TimeoutError, ValueError):
            channel.close()
            return None
        known = isinstance(hello, dict) and isinstance(hello.get("rank"), int) and isinstance(hello.get("token"), str)
        if not known or not hmac.compare_digest(hello["token"], self._token):
            channel.close()
            return None
        channel.wait_at_most(None)
        return hello["rank"], channel

    def close(self) -> None:
        self._listener.close()


def knock(host: str, port: int, rank: int, token: str, deadline: float) -> Channel:
    """A connection to the first rank's door. Raises ZooError."""
    try:
        connection = socket.create_connection((host, port), timeout=deadline)
    except OSError as error:
        raise ZooError("the first rank cannot be reached", where=f"{host}:{port}", found=str(error)) from None
    channel = Channel(connection)
    channel.wait_at_most(None)
    channel.send({"rank": rank, "token": token})
    return channel
