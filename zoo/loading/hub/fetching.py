"""Fetching into the hub client's own cache: what is needed, whether it fits, then file by file."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from zoo.loading.hub.cache import RepoCache
from zoo.loading.hub.choice import Chosen, choose, choose_small
from zoo.loading.hub.client import client, client_utils
from zoo.loading.hub.errors import Ask, is_name, told_apart
from zoo.loading.hub.headers import address
from zoo.loading.hub.listing import list_files, parse_source
from zoo.loading.hub.settings import cache_dir, endpoint, offline
from zoo.loading.hub.transfer import check_file, download
from zoo.loading.hub.types import HubSource, Note, Progress, Remote, RemoteFile
from zoo.registry.errors import FetchError
from zoo.units import human_bytes

CLIENT_ABOVE = 50_000_000_000
"""Bytes above which the hub serves a file through its own storage protocol only, which the client speaks."""


@dataclass(frozen=True)
class FetchPlan:
    """What `fetch` will do: the files, the folder that will hold them, what is not there yet, room on the disk.

    `missing_bytes` are the bytes still to be received; `notes` are lines for the user.
    """

    remote: Remote
    chosen: Chosen
    folder: Path
    missing: tuple[RemoteFile, ...]
    missing_bytes: int
    free_bytes: int
    notes: tuple[str, ...]


def plan_fetch(source: HubSource | str, *, weights: bool = True) -> FetchPlan:
    """What fetching would bring. Nothing is written.

    If the hub cannot answer and the cache holds a whole model of that revision, the plan is that one and its notes say
    so. Raises FetchError.
    """
    repo, revision, named = parse_source(source)
    wanted = named if weights else None
    try:
        return _plan(list_files(repo, revision), wanted)
    except FetchError as problem:
        kept = _plan_kept(repo, revision, wanted, problem)
        if kept is None:
            raise
        return kept


def fetch(
    source: HubSource | str,
    *,
    weights: bool = True,
    progress: Progress | None = None,
    note: Note | None = None,
) -> Path:
    """The folder with the model's files, fetched where the cache lacks them.

    `source` is a card's source section, "owner/name" or "owner/name@revision".
    The disk's room is checked first; an interrupted transfer goes on where it stopped; every file received is checked
    by size and hash. Without `weights` only the configuration and tokenizer files are fetched.
    `progress` is called as bytes arrive, `note` with lines for the user. Raises FetchError.
    """
    say = note or _silent
    plan = plan_fetch(source, weights=weights)
    for line in plan.notes:
        say(line)
    _check_may(plan)
    revision = parse_source(source)[1]
    if plan.missing:
        with told_apart(Ask(plan.remote.repo, revision)):
            _bring_all(plan, revision, progress, say)
    elif not offline():
        _remember(plan, revision)
    return plan.folder


def _plan(remote: Remote, layout: str | None, *notes: str) -> FetchPlan:
    """The plan for a layout's weights, or for no weights (None)."""
    cache = RepoCache(remote.repo)
    present = {file.path for file in remote.files if cache.has(remote, file)}
    if layout is None:
        chosen = choose_small(remote.files)
    else:
        chosen = choose(remote.files, layout, cached=present, where=str(remote))
    missing = tuple(file for file in chosen.files if file.path not in present)
    needed = sum(file.size - cache.received(file) for file in missing)
    state = (
        f"{len(missing)} of {len(chosen.files)} files to fetch, {human_bytes(needed)}" if missing else "in the cache"
    )
    lines = (*notes, f"{remote.repo} at revision {remote.revision}: {state}", chosen.note)
    folder = cache_dir().absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    return FetchPlan(remote, chosen, cache.snapshot(remote.revision), missing, needed, free, lines)


def _plan_kept(repo: str, revision: str, layout: str | None, problem: FetchError) -> FetchPlan | None:
    """The plan that needs no network, if the cache holds all of a model."""
    kept = RepoCache(repo).listing(revision)
    if kept is None:
        return None
    try:
        plan = _plan(kept, layout, f"{problem} The copy in the cache is used")
    except FetchError:
        return None
    return None if plan.missing else plan


def _check_may(plan: FetchPlan) -> None:
    """FetchError if something is missing and the network may not be used or the disk has no room."""
    switch = offline()
    if plan.missing and switch:
        names = ", ".join(file.path for file in plan.missing)
        raise FetchError(
            f"not in the cache: {names}; {switch} forbids the network",
            where=str(plan.remote),
            hint="unset the variable and run the command again to fetch them",
        )
    if plan.missing_bytes > plan.free_bytes:
        raise FetchError(
            f"not enough room on the disk of {cache_dir()}",
            where=str(plan.remote),
            found=f"{human_bytes(plan.free_bytes)} free",
            expected=human_bytes(plan.missing_bytes),
            hint="free some space (`zoo rm`), or put the cache on another disk with HF_HOME",
        )


def _bring_all(plan: FetchPlan, revision: str, progress: Progress | None, say: Note) -> None:
    cache, remote = RepoCache(plan.remote.repo), plan.remote
    cache.record(remote)
    if cache.commit(revision) is None:
        # Lets an offline run after an interrupted one say what is missing. A branch fetched before keeps meaning its
        # old whole commit until the new one is whole.
        cache.point(revision, remote.revision)
    before, total = 0, sum(file.size for file in plan.missing)
    for file in plan.missing:
        if progress is None:
            say(f"fetching {file.path}, {human_bytes(file.size)}")
        with told_apart(Ask(remote.repo, revision, file.path)):
            if file.size > CLIENT_ABOVE:
                _bring_by_client(remote, file, bar=progress is not None)
            else:
                _bring(remote, file, _shifted(progress, before, total), say)
        before += file.size
        if progress:
            progress(before, total)
    cache.point(revision, remote.revision)


def _shifted(progress: Progress | None, before: int, total: int) -> Callable[[int], None] | None:
    """One file's progress as a part of the whole."""
    return None if progress is None else lambda done: progress(before + done, total)


def _bring(remote: Remote, file: RemoteFile, progress: Callable[[int], None] | None, say: Note) -> None:
    cache = RepoCache(remote.repo)
    with _alone(cache, file, say):
        if cache.has(remote, file) or cache.adopt(remote, file):
            return
        url, headers = address(remote, file)
        download(url, file, cache.partial(file), f"{remote.repo}/{file.path}", headers, progress, say)
        cache.place(remote, file)


def _bring_by_client(remote: Remote, file: RemoteFile, *, bar: bool) -> None:
    """The client's own download, with its own bar: no resuming in a later process, but the only way to large files."""
    place = {"revision": remote.revision, "cache_dir": cache_dir(), "endpoint": endpoint()}
    utils = client_utils()
    silenced = not bar and not utils.are_progress_bars_disabled()
    if silenced:
        utils.disable_progress_bars()
    try:
        path = Path(client().hf_hub_download(remote.repo, file.path, library_name="zoo", **place))
    finally:
        if silenced:
            utils.enable_progress_bars()
    fault = check_file(path, file, f"{remote.repo}/{file.path}")
    if fault:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise fault


def _remember(plan: FetchPlan, revision: str) -> None:
    """Keep what the branch means now; a cache that cannot be written still serves."""
    cache = RepoCache(plan.remote.repo)
    try:
        cache.point(revision, plan.remote.revision)
    except OSError:
        return


@contextlib.contextmanager
def _alone(cache: RepoCache, file: RemoteFile, say: Note) -> Iterator[None]:
    """Hold the client's lock of the blob, so that two processes do not fetch the same file at once."""
    path = cache.lock(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = client_utils().WeakFileLock(path, timeout=0.2)
    try:
        lock.__enter__()
    except Exception as error:
        if not is_name(error, "Timeout"):
            raise
        say(f"another process is fetching {file.path}; waiting for it")
        lock = client_utils().WeakFileLock(path)
        lock.__enter__()
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def _silent(_: str) -> None:
    return
