"""One file over HTTP: resumed where it stopped, also by a later process, and checked against the hub's hash.

The client's own download starts from nothing after its process has ended and checks no hash, which costs a user with
a slow line the night: so the bytes are received here, through the client's session.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from zoo.loading.hub.client import client, client_utils
from zoo.loading.hub.errors import is_name, page_fault
from zoo.loading.hub.types import Note, RemoteFile
from zoo.registry.errors import FetchError

WAITS = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each new attempt after a fault of the network; counted anew whenever bytes arrive."""

Report = Callable[[int], None]
"""Called with the bytes of one file received so far."""

_BLOCK = 1 << 20


class Partial:
    """The received part of a file on disk, hashed as it grows. A context manager."""

    def __init__(self, path: Path, file: RemoteFile, where: str) -> None:
        self.path, self.file, self.where = path, file, where
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = path.open("a+b")
        self.size = path.stat().st_size
        if self.size > file.size:
            self._handle.truncate(0)
            self.size = 0
        self._hash = _hash_of(self._handle, self.size, file)

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.close()
        if not self.size and self.file.size:
            self.path.unlink(missing_ok=True)

    def write(self, data: bytes) -> None:
        if self.size + len(data) > self.file.size:
            self.restart()
            raise _wrong_size(self, "a longer body")
        self._handle.write(data)
        self._hash.update(data)
        self.size += len(data)

    def restart(self) -> None:
        """Forget everything received."""
        self._handle.truncate(0)
        self._hash, self.size = _hasher(self.file), 0

    def done(self) -> bool:
        self._handle.flush()
        return self.size == self.file.size

    def fault(self) -> FetchError | None:
        """What is wrong with a finished file, or None."""
        found = self._hash.hexdigest()
        return None if found == self.file.digest else _foreign(self._handle, self.file, found, self.where)


def download(
    url: str,
    file: RemoteFile,
    partial: Path,
    where: str,
    headers: dict[str, str],
    progress: Report | None,
    note: Note,
) -> None:
    """Bring all of `file` into `partial` and check it.

    Raises FetchError for a wrong or foreign body, of which nothing is kept, and the client's exceptions for a fault of
    the network, after which everything received so far is kept for the next run.
    """
    if partial.exists():
        # Before the part is opened: hashing it takes a minute where it is large.
        note(f"{file.path}: going on at byte {partial.stat().st_size} of {file.size}")
    with Partial(partial, file, where) as part:
        resumed = part.size
        _receive_all(url, part, headers, progress, note)
        if resumed and part.fault():
            note(f"{file.path}: the part received earlier was bad; starting again")
            part.restart()
            _receive_all(url, part, headers, progress, note)
        fault = part.fault()
        if fault:
            part.restart()
            raise fault


def check_file(path: Path, file: RemoteFile, where: str) -> FetchError | None:
    """What is wrong with a file that the client fetched, or None."""
    with path.open("rb") as handle:
        size = path.stat().st_size
        found = _hash_of(handle, size, file).hexdigest()
        return None if (size, found) == (file.size, file.digest) else _foreign(handle, file, found, where)


def _receive_all(url: str, part: Partial, headers: dict[str, str], progress: Report | None, note: Note) -> None:
    attempt = 0
    while not part.done():
        before = part.size
        problem: Exception | None = None
        try:
            _receive(url, part, headers, progress, note)
        except Exception as error:
            if not _passing(error):
                raise
            problem = error
        if part.done():
            return
        attempt = 1 if part.size > before else attempt + 1
        if attempt > len(WAITS):
            raise problem or _cut(part)
        time.sleep(WAITS[attempt - 1])


def _receive(url: str, part: Partial, headers: dict[str, str], progress: Report | None, note: Note) -> None:
    """One request for what is not there yet. An answer that cannot be the file leaves the part as it is."""
    with open_stream(url, headers, f"bytes={part.size}-" if part.size else None) as answer:
        if answer.status_code == 416:
            part.restart()
            return
        start = part.size if _goes_on(answer, part.size) else 0
        _check_head(answer, part, start)
        if start < part.size:
            note(f"{part.file.path}: the server cannot go on at byte {part.size}; starting again")
            part.restart()
        for data in answer.iter_bytes():
            part.write(data)
            if progress:
                progress(part.size)


@contextmanager
def open_stream(url: str, headers: dict[str, str], span: str | None) -> Iterator[Any]:
    """The hub's answer to a GET, its body unread; `span` is a Range header.

    Redirects are followed, to other hosts without the token. Raises the client's exceptions for a status other than
    success and 416.
    """
    # A compressed answer has neither a length to check nor ranges.
    asked = {**headers, "Accept-Encoding": "identity", **({"Range": span} if span else {})}
    timeout = client().constants.HF_HUB_DOWNLOAD_TIMEOUT
    with client_utils().get_session().stream("GET", url, headers=asked, timeout=timeout) as answer:
        if answer.status_code != 416:
            client_utils().hf_raise_for_status(answer)
        yield answer


def _passing(error: Exception) -> bool:
    """Whether the fault may be gone at the next attempt."""
    if is_name(error, "ProxyError", "UnsupportedProtocol"):
        return False
    answer = getattr(error, "response", None)
    if answer is not None:
        return answer.status_code in (408, 429) or answer.status_code >= 500
    return is_name(error, "TransportError")


def _goes_on(answer: Any, start: int) -> bool:
    """Whether the body begins at byte `start`."""
    return bool(answer.status_code == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"))


def _check_head(answer: Any, part: Partial, start: int) -> None:
    """Refuse an answer that cannot be the file from byte `start` on, before anything of it is written."""
    if answer.headers.get("Content-Type", "").startswith("text/html"):
        raise page_fault(next(answer.iter_bytes(), b""), part.where) or _wrong_size(part, "a web page")
    length = answer.headers.get("Content-Length")
    if length is not None and "Content-Encoding" not in answer.headers and int(length) != part.file.size - start:
        raise _wrong_size(part, "an empty body" if length == "0" else f"a body of {length} bytes")


def _cut(part: Partial) -> FetchError:
    return FetchError(
        "the body ends early again and again",
        where=part.where,
        found=f"{part.size} bytes",
        expected=f"{part.file.size} bytes",
        hint="what was received is kept: run the command again to go on from there",
    )


def _wrong_size(part: Partial, found: str) -> FetchError:
    return FetchError(
        "the server does not send the file that the hub lists",
        where=part.where,
        found=found,
        expected=f"{part.file.size} bytes",
        hint="try again; if it stays so, a proxy or mirror changes the answer: check HTTPS_PROXY and HF_ENDPOINT",
    )


def _foreign(handle: BinaryIO, file: RemoteFile, found: str, where: str) -> FetchError:
    handle.seek(0)
    return page_fault(handle.read(512), where) or FetchError(
        "the bytes received do not hash to what the hub names; they were thrown away",
        where=where,
        found=found,
        expected=file.digest,
        hint="run the command again; if it happens again, a proxy or the disk changes the data",
    )


def _hash_of(handle: BinaryIO, size: int, file: RemoteFile) -> Any:
    """The hash of the first `size` bytes of the open file."""
    digest = _hasher(file)
    handle.seek(0)
    for start in range(0, size, _BLOCK):
        digest.update(handle.read(min(_BLOCK, size - start)))
    return digest


def _hasher(file: RemoteFile) -> Any:
    """sha256 for large-file storage; git's blob hash, a sha1 over a small head and the contents, for the others."""
    assert file.digest is not None
    if len(file.digest) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
