"""The client's, the network's and the disk's exceptions as one message each, with the next step to take.

Exceptions are known by the names of their classes: the client changed its HTTP library between releases, and the
names stayed.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from zoo.loading.hub.settings import cache_dir, endpoint
from zoo.registry.errors import FetchError

LOG_IN = "set HF_TOKEN or run `hf auth login`"
_PROXY = "open the address in a browser: a proxy, a firewall or a login page stands between; see HTTPS_PROXY"
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_RIGHT = {errno.EROFS, errno.EACCES, errno.EPERM}


class Ask(NamedTuple):
    """What was asked of the hub."""

    repo: str
    revision: str
    file: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}/{self.file}" if self.file else self.repo


@contextmanager
def told_apart(ask: Ask) -> Iterator[None]:
    """Turn every fault that the hub, the network or the disk can cause into a FetchError; let other faults pass."""
    try:
        yield
    except FetchError:
        raise
    except Exception as error:
        told = explain(error, ask)
        if told is None:
            raise
        raise told from error


def explain(error: Exception, ask: Ask) -> FetchError | None:
    """The FetchError for an exception of the client, or None for one that is not about fetching."""
    names = [kind.__name__ for kind in type(error).__mro__]
    for name, teller in _TELLERS:
        if name in names:
            return teller(error, ask)
    return None


def is_name(error: Exception, *names: str) -> bool:
    """Whether the exception or one of its bases has one of these class names."""
    return any(kind.__name__ in names for kind in type(error).__mro__)


def page_fault(start: bytes, where: str) -> FetchError | None:
    """The FetchError for bytes that are a web page or a large-file pointer where a file was asked for."""
    head = start[:512].lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return FetchError(
            "the answer is a web page and not the file",
            where=where,
            found=repr(start[:40].decode("utf-8", "replace")),
            hint=_PROXY,
        )
    if head.startswith(b"version https://git-lfs"):
        return FetchError(
            "the answer is a Git LFS pointer and not the file",
            where=where,
            hint=f"the server at {endpoint()} does not serve large files; check HF_ENDPOINT",
        )
    return None


def _response(error: Any) -> tuple[int, bool, str | None]:
    """Status, whether a token was sent, and what the server says."""
    answer = error.response
    return answer.status_code, "authorization" in answer.request.headers, getattr(error, "server_message", None)


def _gated(error: Exception, ask: Ask) -> FetchError:
    _, with_token, _ = _response(error)
    page = f"{endpoint()}/{ask.repo}"
    if with_token:
        return FetchError(
            "the repository is gated and this token has no access to it",
            where=str(ask),
            hint=f"ask for access at {page} with the token's account, or give another account's token in HF_TOKEN",
        )
    return FetchError(
        "the repository is gated and no token was sent",
        where=str(ask),
        hint=f"accept its terms at {page}, then {LOG_IN}",
    )


def _refused_token(ask: Ask) -> FetchError:
    return FetchError(
        "the hub refuses the token: it is wrong, expired or revoked",
        where=str(ask),
        hint="put a valid one into HF_TOKEN or run `hf auth login`; a public repository needs none",
    )


def _no_repository(error: Exception, ask: Ask) -> FetchError:
    _, with_token, _ = _response(error)
    if with_token:
        return FetchError(
            "no such repository, or a private one that this token may not see",
            where=str(ask),
            hint="check the spelling and the token's account",
        )
    return FetchError(
        "no such repository, or a private one",
        where=str(ask),
        hint=f"check the spelling; if it is private, {LOG_IN}",
    )


def _no_revision(error: Exception, ask: Ask) -> FetchError:
    return FetchError(
        f"no revision {ask.revision!r} in the repository",
        where=str(ask),
        hint=f"see {endpoint()}/{ask.repo}/commits/main, or leave the revision out for the newest",
    )


def _no_file(error: Exception, ask: Ask) -> FetchError:
    return FetchError(
        "the hub lists the file and does not serve it", where=str(ask), hint="try again, or name another revision"
    )


def _status(error: Exception, ask: Ask) -> FetchError:
    status, with_token, said = _response(error)
    if status == 401 and with_token:
        return _refused_token(ask)
    hints = {
        401: LOG_IN,
        403: "check what the token may do at the hub's settings page",
        404: "check the spelling of the repository and HF_ENDPOINT",
        429: f"wait some minutes; without a token the hub allows fewer requests: {LOG_IN}",
    }
    hint = hints.get(status, "try again")
    if status >= 500:
        hint = "the hub is in trouble: try again later (https://status.huggingface.co)"
    return FetchError(f"{endpoint()} answers with status {status}", where=str(ask), found=said, hint=hint)


def _offline(error: Exception, ask: Ask) -> FetchError:
    return FetchError(
        "the hub's client was imported while HF_HUB_OFFLINE was set and refuses the network",
        where=str(ask),
        hint="start the program again without the variable",
    )


def _by_cause(error: Exception, ask: Ask) -> FetchError:
    """The client found a file neither on the hub nor in the cache, and keeps the reason as the error's cause."""
    cause = error.__cause__
    return (explain(cause, ask) if isinstance(cause, Exception) else None) or _disk(error, ask)


def _bad_token(error: Exception, ask: Ask) -> FetchError:
    return FetchError(
        "the token has characters that no token has",
        where=str(ask),
        hint="copy it anew into HF_TOKEN, letters and digits",
    )


def _slow(error: Exception, ask: Ask) -> FetchError:
    return FetchError(
        f"{endpoint()} does not answer in time",
        where=str(ask),
        hint="check the network and HTTPS_PROXY; HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT wait longer",
    )


def _bad_address(error: Exception, ask: Ask) -> FetchError:
    return FetchError(
        "HF_ENDPOINT is not an address", where=str(ask), found=repr(endpoint()), expected="https://huggingface.co, say"
    )


def _proxy(error: Exception, ask: Ask) -> FetchError:
    return FetchError(
        "the proxy does not let the request pass", where=str(ask), found=error, hint="check HTTPS_PROXY and NO_PROXY"
    )


def _unreachable(error: Exception, ask: Ask) -> FetchError:
    return FetchError(
        f"{endpoint()} cannot be reached",
        where=str(ask),
        found=error,
        hint="check the network, HTTPS_PROXY and HF_ENDPOINT; what is in the cache works with HF_HUB_OFFLINE=1",
    )


def _dropped(error: Exception, ask: Ask) -> FetchError:
    return FetchError(
        "the connection breaks off again and again",
        where=str(ask),
        found=error,
        hint="what was received is kept: run the command again to go on from there",
    )


def _not_json(error: Exception, ask: Ask) -> FetchError:
    body = error.doc if isinstance(error, json.JSONDecodeError) else ""
    if not body.strip():
        return FetchError(f"{endpoint()} answers with an empty body", where=str(ask), hint=_PROXY)
    return page_fault(body.encode(), str(ask)) or FetchError(
        f"{endpoint()} does not answer as a hub does", where=str(ask), found=repr(body[:40]), hint="check HF_ENDPOINT"
    )


def _disk(error: Exception, ask: Ask) -> FetchError:
    assert isinstance(error, OSError)
    path = error.filename or cache_dir()
    if error.errno in _NO_SPACE:
        return FetchError(
            f"the disk is full: {cache_dir()}",
            where=str(ask),
            found=os.strerror(error.errno or 0),
            hint="free some space (`zoo rm`), or put the cache on another disk with HF_HOME; the part received is kept",
        )
    if error.errno in _NO_RIGHT:
        return FetchError(
            f"the cache cannot be written: {path}",
            where=str(ask),
            found=os.strerror(error.errno or 0),
            hint="mend the folder's rights, or put the cache elsewhere with HF_HOME",
        )
    return FetchError(
        f"the cache cannot be used: {path}",
        where=str(ask),
        found=error.strerror or error,
        hint="HF_HOME names the folder",
    )


# In this order: a gated repository is also a repository not found, and the client's HTTP errors are also OSErrors.
_TELLERS: tuple[tuple[str, Callable[[Exception, Ask], FetchError]], ...] = (
    ("GatedRepoError", _gated),
    ("RepositoryNotFoundError", _no_repository),
    ("RevisionNotFoundError", _no_revision),
    ("RemoteEntryNotFoundError", _no_file),
    ("HfHubHTTPError", _status),
    ("LocalEntryNotFoundError", _by_cause),
    ("UnicodeEncodeError", _bad_token),
    ("OfflineModeIsEnabled", _offline),
    ("TimeoutException", _slow),
    ("UnsupportedProtocol", _bad_address),
    ("InvalidURL", _bad_address),
    ("ProxyError", _proxy),
    ("ConnectError", _unreachable),
    ("TransportError", _dropped),
    ("TooManyRedirects", _proxy),
    ("JSONDecodeError", _not_json),
    ("OSError", _disk),
)
