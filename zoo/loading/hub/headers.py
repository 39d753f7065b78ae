"""The heads of files by ranged reads: what weights a repository holds, without fetching them."""

from __future__ import annotations

from zoo.loading.hub.cache import RepoCache
from zoo.loading.hub.client import client, client_utils
from zoo.loading.hub.errors import Ask, page_fault, told_apart
from zoo.loading.hub.settings import endpoint, offline
from zoo.loading.hub.transfer import open_stream
from zoo.loading.hub.types import Remote, RemoteFile
from zoo.registry.errors import FetchError
from zoo.units import human_bytes

_FIRST = 1 << 17
_LARGEST_HEADER = 100_000_000
_LARGEST_FILE = 64_000_000


def ranged_headers(remote: Remote, path: str) -> bytes:
    """The head of a safetensors file: 8 bytes of little-endian length n and n bytes of JSON.

    Read from the cache if the file is there, else from the hub; a server that ignores ranges is cut off after the head.
    Raises FetchError for what cannot be a safetensors file, for faults of the network, and offline without the file.
    """
    file = remote.file(path)
    start = _read(remote, file, min(_FIRST, file.size))
    count = 8 + int.from_bytes(start[:8], "little")
    if len(start) < 8 or count > min(file.size, 8 + _LARGEST_HEADER):
        where = f"{remote}/{path}"
        raise page_fault(start, where) or FetchError(
            "not a safetensors file", where=where, found=f"a header of {count - 8} bytes in a file of {file.size}"
        )
    return start[:count] if count <= len(start) else _read(remote, file, count)


def read_file(remote: Remote, path: str) -> bytes:
    """All bytes of a small file (a configuration, an index), from the cache or the hub, without storing them."""
    file = remote.file(path)
    if file.size > _LARGEST_FILE:
        raise FetchError(
            "too large to be read without fetching it",
            where=f"{remote}/{path}",
            found=human_bytes(file.size),
            expected=f"at most {human_bytes(_LARGEST_FILE)}",
        )
    data = _read(remote, file, file.size)
    fault = page_fault(data, f"{remote}/{path}")
    if fault:
        raise fault
    return data


def _read(remote: Remote, file: RemoteFile, count: int) -> bytes:
    """The first `count` bytes of the file."""
    cache = RepoCache(remote.repo)
    if cache.has(remote, file):
        with (cache.snapshot(remote.revision) / file.path).open("rb") as handle:
            return handle.read(count)
    switch = offline()
    if switch:
        raise FetchError(
            f"not in the cache, and {switch} forbids the network",
            where=f"{remote}/{file.path}",
            hint="unset the variable, or fetch the model with `zoo pull` first",
        )
    with told_apart(Ask(remote.repo, remote.revision, file.path)):
        return _read_remote(remote, file, count)


def _read_remote(remote: Remote, file: RemoteFile, count: int) -> bytes:
    data = b""
    url, headers = address(remote, file)
    # A server that ignores the range sends the file from its start: the same bytes, and the rest is never read.
    with open_stream(url, headers, f"bytes=0-{count - 1}" if count else None) as answer:
        for piece in answer.iter_bytes():
            data += piece
            if len(data) >= count:
                break
    if len(data) < count:
        raise page_fault(data, f"{remote}/{file.path}") or FetchError(
            "the body ends early", where=f"{remote}/{file.path}", found=f"{len(data)} bytes", expected=f"{count} bytes"
        )
    return data[:count]


def address(remote: Remote, file: RemoteFile) -> tuple[str, dict[str, str]]:
    """The file's URL and the request headers with the user's token."""
    url = client().hf_hub_url(remote.repo, file.path, revision=remote.revision, endpoint=endpoint())
    return url, client_utils().build_hf_headers(library_name="zoo")
