"""Processes that find each other without torchrun, and connections between ranks of one process."""

from __future__ import annotations

import socket

from zoo.devices.channel import Channel


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def two_machines() -> list[dict[str, str]]:
    """What whoever starts one process on each of two machines sets in its environment."""
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [place | {"RANK": str(rank)} for rank in range(2)]


def channels() -> tuple[Channel, Channel]:
    """Both ends of a connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    return Channel(near), Channel(far)
