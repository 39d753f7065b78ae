"""The hub client's cache folder: which files of a revision are there, and how a new one is put there.

The folder is the client's own (models--owner--name/{blobs,refs,snapshots}), so what other programs fetched is used and
they use what zoo fetches. zoo adds one file per commit, zoo/<commit>.json: the listing, which lets an offline run say
what is missing or cut short.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from zoo.loading.hub.settings import cache_dir
from zoo.loading.hub.types import Remote, RemoteFile, is_commit


@dataclass(frozen=True)
class RepoCache:
    """One repository's part of the cache."""

    repo: str

    @property
    def folder(self) -> Path:
        return cache_dir() / ("models--" + self.repo.replace("/", "--"))

    def snapshot(self, revision: str) -> Path:
        """The folder that holds a commit's files under their own names."""
        return self.folder / "snapshots" / revision

    def blob(self, file: RemoteFile) -> Path:
        assert file.digest is not None
        return self.folder / "blobs" / file.digest

    def partial(self, file: RemoteFile) -> Path:
        """Where the received part of a file waits; the name that clients before 2.0 resume from."""
        return self.blob(file).with_name(f"{file.digest}.incomplete")

    def lock(self, file: RemoteFile) -> Path:
        """The client's own lock for the blob."""
        return cache_dir() / ".locks" / self.folder.name / f"{file.digest}.lock"

    def commit(self, revision: str) -> str | None:
        """The commit that a branch or tag meant when it was last fetched."""
        if is_commit(revision):
            return revision
        try:
            return (self.folder / "refs" / revision).read_text().strip() or None
        except OSError:
            return None

    def listing(self, revision: str) -> Remote | None:
        """The commit's files: as the hub listed them if zoo recorded it, else those present."""
        commit = self.commit(revision)
        if commit is None:
            return None
        recorded = self.recorded(commit)
        if recorded is not None or not self.snapshot(commit).is_dir():
            return recorded
        folder = self.snapshot(commit)
        present = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        files = [RemoteFile(path.relative_to(folder).as_posix(), path.stat().st_size, None) for path in present]
        return Remote(self.repo, commit, tuple(files))

    def recorded(self, commit: str) -> Remote | None:
        """The listing that zoo recorded for the commit; None if there is none or it is not readable."""
        try:
            rows = json.loads(self._record(commit).read_text())["files"]
            files = tuple(RemoteFile(str(path), int(size), digest) for path, size, digest in rows)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return Remote(self.repo, commit, files)

    def record(self, remote: Remote) -> None:
        """Keep the listing beside the files."""
        if self.recorded(remote.revision) is None:
            rows = [[file.path, file.size, file.digest] for file in remote.files]
            _write(self._record(remote.revision), json.dumps({"files": rows}))

    def point(self, revision: str, commit: str) -> None:
        """Let a branch or tag mean the commit from now on."""
        if self.commit(revision) != commit:
            self.snapshot(commit).mkdir(parents=True, exist_ok=True)
            _write(self.folder / "refs" / revision, commit)

    def has(self, remote: Remote, file: RemoteFile) -> bool:
        """Whether the file lies in the commit's folder with all its bytes."""
        return _size(self.snapshot(remote.revision) / file.path) == file.size

    def received(self, file: RemoteFile) -> int:
        """Bytes of a missing file that are on the disk already, as another commit's blob or as a part."""
        if file.digest is None:
            return 0
        return min(_size(self.blob(file)) or _size(self.partial(file)) or 0, file.size)

    def adopt(self, remote: Remote, file: RemoteFile) -> bool:
        """Show a blob that is already there (another commit's, another process's) in the commit's folder."""
        blob = self.blob(file)
        if _size(blob) != file.size:
            blob.unlink(missing_ok=True)
            return False
        self._show(blob, self.snapshot(remote.revision) / file.path)
        return True

    def place(self, remote: Remote, file: RemoteFile) -> None:
        """Make the finished partial file the blob, and show it in the commit's folder."""
        self.partial(file).replace(self.blob(file))
        self._show(self.blob(file), self.snapshot(remote.revision) / file.path)

    def _record(self, commit: str) -> Path:
        return self.folder / "zoo" / f"{commit}.json"

    @staticmethod
    def _show(blob: Path, name: Path) -> None:
        name.parent.mkdir(parents=True, exist_ok=True)
        name.unlink(missing_ok=True)
        try:
            name.symlink_to(os.path.relpath(blob, name.parent))
        except OSError:
            # Windows without the right to make links: the client keeps the file itself in the snapshot there.
            blob.replace(name)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        new.write_text(text)
        new.replace(path)
    finally:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
