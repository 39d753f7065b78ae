"""A repository's files as the hub lists them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from zoo.registry.errors import FetchError

Progress = Callable[[int, int], None]
"""Called with the bytes present so far and the bytes in all, of every file to fetch together."""

Note = Callable[[str], None]
"""Called with one line for the user's eyes."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPO = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9_][\w./+-]*", re.ASCII)


class HubSource(Protocol):
    """What a card's `source` section says: a repository, a branch, tag or commit (None = main), a weight layout."""

    @property
    def hub(self) -> str | None: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def layout(self) -> str: ...


@dataclass(frozen=True)
class RemoteFile:
    """One file: path in the repository, bytes, and what the hub says its contents hash to.

    `digest` is the sha256 of a file in large-file storage (64 hex digits) or the git blob's sha1 (40), and the name
    of its blob in the cache; None for a file that is only known from a cache filled by another program.
    """

    path: str
    size: int
    digest: str | None


@dataclass(frozen=True)
class Remote:
    """A repository at one commit; `revision` is the commit's sha."""

    repo: str
    revision: str
    files: tuple[RemoteFile, ...]

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision[:12]}"

    def file(self, path: str) -> RemoteFile:
        """The file of that path; FetchError if the repository has none."""
        for file in self.files:
            if file.path == path:
                return file
        raise FetchError(f"no file {path!r} in the repository", where=str(self))


def is_commit(revision: str) -> bool:
    """Whether the revision is a full commit sha, which can never mean other files."""
    return _COMMIT.fullmatch(revision) is not None


def check_names(repo: str, revision: str) -> None:
    """FetchError unless both are names that the hub could know; they become parts of paths in the cache."""
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise FetchError(
            "not the name of a repository", found=repr(repo), expected="owner/name, as in mistralai/Mistral-7B-v0.3"
        )
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise FetchError(
            "not the name of a revision", where=repo, found=repr(revision), expected="a branch, a tag or a commit's sha"
        )
