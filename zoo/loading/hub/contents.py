"""What the cache holds of a repository, and its removal (`zoo rm`)."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from zoo.loading.hub.cache import RepoCache
from zoo.loading.hub.client import client
from zoo.loading.hub.errors import Ask, told_apart
from zoo.loading.hub.listing import parse_source
from zoo.loading.hub.settings import cache_dir
from zoo.loading.hub.types import HubSource
from zoo.registry.errors import FetchError


@dataclass(frozen=True)
class CachedRevision:
    """One commit in the cache; `size` counts its files' bytes, also of files that other commits share."""

    repo: str
    revision: str
    refs: tuple[str, ...]
    folder: Path
    files: int
    size: int


def cached(source: HubSource | str) -> list[CachedRevision]:
    """The commits of the source's repository that the cache holds; with a revision in the source, that one only."""
    repo, revision, _ = parse_source(source)
    cache = RepoCache(repo)
    wanted = cache.commit(revision) if _names_revision(source) else None
    if _names_revision(source) and wanted is None:
        return []
    folders = sorted((cache.folder / "snapshots").glob("*"))
    return [_describe(cache, folder) for folder in folders if wanted in (None, folder.name)]


def remove(source: HubSource | str) -> int:
    """Delete what `cached` lists, and parts of interrupted transfers with the last of it; returns the bytes freed.

    Raises FetchError if there is nothing to delete or it cannot be deleted.
    """
    repo, revision, _ = parse_source(source)
    cache = RepoCache(repo)
    found = cached(source)
    if not found and (_names_revision(source) or not cache.folder.is_dir()):
        raise FetchError("nothing of it is in the cache", where=repo, found=str(cache_dir()))
    with told_apart(Ask(repo, revision)):
        before = _disk_bytes(cache.folder)
        if found:
            _delete(cache, [commit.revision for commit in found])
        if cache.folder.is_dir() and not any((cache.folder / "snapshots").glob("*")):
            shutil.rmtree(cache.folder)
        return before - _disk_bytes(cache.folder)


def _delete(cache: RepoCache, commits: list[str]) -> None:
    """Through the client, which knows what other commits and repositories share."""
    client().scan_cache_dir(cache_dir()).delete_revisions(*commits).execute()
    for commit in commits:
        (cache.folder / "zoo" / f"{commit}.json").unlink(missing_ok=True)


def _names_revision(source: HubSource | str) -> bool:
    return "@" in source if isinstance(source, str) else source.revision is not None


def _describe(cache: RepoCache, folder: Path) -> CachedRevision:
    refs = cache.folder / "refs"
    names = [path.relative_to(refs).as_posix() for path in sorted(refs.rglob("*")) if path.is_file()]
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    pointing = tuple(name for name in names if cache.commit(name) == folder.name)
    return CachedRevision(cache.repo, folder.name, pointing, folder, len(sizes), sum(sizes))


def _disk_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
