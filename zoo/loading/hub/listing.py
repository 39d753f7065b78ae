"""A repository's files at one commit, from the hub or, where the network may not be used, from the cache."""

from __future__ import annotations

import time
from typing import Any

from zoo.loading.hub.cache import RepoCache
from zoo.loading.hub.client import client
from zoo.loading.hub.errors import Ask, told_apart
from zoo.loading.hub.settings import cache_dir, endpoint, offline
from zoo.loading.hub.transfer import WAITS
from zoo.loading.hub.types import HubSource, Remote, RemoteFile, check_names, is_commit
from zoo.registry.errors import FetchError


def parse_source(source: HubSource | str) -> tuple[str, str, str]:
    """Repository, revision ("main" where none is named) and layout of a source.

    A source is a card's section or "owner/name" or "owner/name@revision". Raises FetchError for what is no name.
    """
    if isinstance(source, str):
        repo, _, revision = source.partition("@")
        layout = "auto"
    elif source.hub is None:
        raise FetchError("the card names no repository on the hub", hint="give a folder with its weights")
    else:
        repo, revision, layout = source.hub, source.revision or "", source.layout
    check_names(repo, revision or "main")
    return repo, revision or "main", layout


def list_files(repo: str, revision: str | None = None) -> Remote:
    """The repository's files with sizes and hashes, at the commit that the revision (None = main) means now.

    Offline, and for a commit listed before, from the cache. Raises FetchError.
    """
    asked = revision or "main"
    check_names(repo, asked)
    switch = offline()
    if switch:
        return _cached(repo, asked, switch)
    known = RepoCache(repo).recorded(asked) if is_commit(asked) else None
    return known or _ask_hub(repo, asked)


def _cached(repo: str, revision: str, switch: str) -> Remote:
    remote = RepoCache(repo).listing(revision)
    if remote is None:
        raise FetchError(
            f"revision {revision!r} is not in the cache {cache_dir()}, and {switch} forbids the network",
            where=repo,
            hint="unset the variable and run the command again to fetch it",
        )
    return remote


def _ask_hub(repo: str, revision: str) -> Remote:
    with told_apart(Ask(repo, revision)):
        info = _model_info(repo, revision)
    files = []
    for sibling in info.siblings or ():
        digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        if sibling.size is None or not _is_hex(digest, 40, 64):
            raise _no_hub(repo, f"no size or hash of {sibling.rfilename!r}")
        files.append(RemoteFile(sibling.rfilename, sibling.size, digest))
    if not _is_hex(info.sha, 40):
        raise _no_hub(repo, f"the commit {info.sha!r}")
    return Remote(repo, info.sha, tuple(files))


def _model_info(repo: str, revision: str) -> Any:
    """The client's description of the repository; asked again after a fault of the hub that may pass."""
    api = client().HfApi(endpoint=endpoint(), library_name="zoo")
    timeout = client().constants.HF_HUB_ETAG_TIMEOUT
    for wait in (*WAITS, None):
        try:
            return api.model_info(repo, revision=revision, files_metadata=True, timeout=timeout)
        except (TypeError, KeyError, AttributeError) as error:
            # JSON of another shape.
            raise _no_hub(repo, f"JSON without {error}") from error
        except Exception as error:
            answer = getattr(error, "response", None)
            if wait is None or answer is None or answer.status_code < 500:
                raise
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _is_hex(text: object, *lengths: int) -> bool:
    """Whether the server's text may become a name in the cache."""
    return isinstance(text, str) and len(text) in lengths and not set(text) - set("0123456789abcdef")


def _no_hub(repo: str, found: str) -> FetchError:
    return FetchError(f"{endpoint()} does not answer as a hub does", where=repo, found=found, hint="check HF_ENDPOINT")
