"""A hub on this machine: the protocol of huggingface.co as the real client speaks it, with faults on demand.

Served: /api/models/REPO[/revision/REV] with blobs, /api/models/REPO/tree/REV, HEAD and GET /REPO/resolve/REV/FILE with
ETag, X-Repo-Commit, X-Linked-Size and X-Linked-Etag, ranges, a redirect of large files to a second host, and the
errors GatedRepo, RepoNotFound, RevisionNotFound, EntryNotFound and refused tokens as the hub words them.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

LARGE = (".safetensors", ".pth", ".pt", ".bin", "tekken.json", "tokenizer.model")
PAGE = b"<!DOCTYPE html><html><head><title>Please log in to the network</title></head></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"


@dataclass
class Repo:
    """A repository: files by commit, commits by branch or tag."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    gated: bool = False
    private: bool = False


@dataclass
class Fault:
    """What goes wrong for GETs of the file `target` ("api" for the listing, "HEAD file" for a HEAD), `times` times.

    Kinds: drop (close after `at` bytes of the body), cut (the same without a length), hold (wait for `Hub.release`
    after `at` bytes), no_ranges, html (web page), page_of_size (web page as long as the file, as a file), pointer,
    empty, corrupt (one byte changed), longer (without a length), status (answer `at`), gone, silent (no answer), json
    (another server's JSON).
    """

    target: str
    kind: str
    at: int = 0
    times: int = 1_000_000


@dataclass
class Asked:
    """One request as it came."""

    method: str
    path: str
    range: str | None
    token: str | None
    host: str
    encoding: str


@dataclass
class Hub:
    """The servers, their repositories and what was asked of them; `lie` replaces fields of listings."""

    repos: dict[str, Repo] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    granted: set[str] = field(default_factory=set)
    faults: list[Fault] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    redirect: bool = False
    lie: dict[str, Any] = field(default_factory=dict)
    held: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    sent: int = 0

    def __post_init__(self) -> None:
        self._servers = [_serve(self), _serve(self)]
        self.url, self.store = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)

    def add(self, name: str, files: dict[str, bytes], **how: Any) -> str:
        """Put a commit with these files on the branch main of a repository; returns the commit's sha."""
        sha = hashlib.sha1(repr((name, sorted(files.items()))).encode()).hexdigest()
        repo = self.repos.setdefault(name, Repo({}, {}, **how))
        repo.commits[sha] = files
        repo.refs["main"] = sha
        return sha

    def fault(self, target: str, kind: str, at: int = 0, times: int = 1_000_000) -> None:
        self.faults.append(Fault(target, kind, at, times))

    def take_fault(self, target: str) -> Fault | None:
        for fault in self.faults:
            if target == fault.target and fault.times > 0:
                fault.times -= 1
                return fault
        return None

    def gets(self, file: str = "") -> list[Asked]:
        """Requests for the contents of files whose path ends with `file`."""
        return [
            ask for ask in self.asked if ask.method == "GET" and "/api/" not in ask.path and ask.path.endswith(file)
        ]

    def stop(self) -> None:
        self.release.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()


def digest_of(name: str, data: bytes) -> str:
    """The file's hash as the hub names it."""
    if name.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _serve(hub: Hub) -> ThreadingHTTPServer:
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return server


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is what some tests are about, and no news."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Refused(Exception):
    """An answer other than the thing asked for."""

    def __init__(self, status: int, code: str, message: str) -> None:
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        return

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        bearer = self.headers.get("Authorization")
        token = bearer.removeprefix("Bearer ") if bearer else None
        host = f"http://{self.headers['Host']}"
        encoding = self.headers.get("Accept-Encoding", "")
        self.hub.asked.append(Asked(self.command, path, self.headers.get("Range"), token, host, encoding))
        try:
            if path.startswith("/api/models/"):
                self._api(path.removeprefix("/api/models/"), token)
            elif path.startswith("/store/"):
                _, _, repo, sha, name = path.split("/", 4)
                self._send_file(self.hub.repos[repo.replace("--", "/")].commits[sha][name], name, {})
            else:
                self._resolve(path[1:], token)
        except _Refused as refused:
            self._send_error(refused)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _repo(self, name: str, token: str | None, *, contents: bool) -> Repo:
        hub = self.hub
        if token is not None and token not in hub.tokens:
            raise _Refused(401, "", "Invalid credentials in Authorization header")
        repo = hub.repos.get(name)
        if repo is None or (repo.private and token not in hub.granted):
            raise _Refused(401 if token is None else 404, "RepoNotFound", "Repository not found")
        if contents and repo.gated and token not in hub.granted:
            known = token is not None
            said = f"Access to model {name} is restricted" + (
                " and you are not in the authorized list." if known else "."
            )
            raise _Refused(403 if known else 401, "GatedRepo", said)
        return repo

    @staticmethod
    def _commit(repo: Repo, revision: str) -> str:
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def _api(self, rest: str, token: str | None) -> None:
        fault = self.hub.take_fault("api")
        if fault and self._api_fault(fault):
            return
        name, _, revision = rest.partition("/revision/")
        tree = "/tree/" in rest
        if tree:
            name, _, revision = rest.partition("/tree/")
        repo = self._repo(name, token, contents=False)
        sha = self._commit(repo, revision or "main")
        rows = [self._row(path, data) for path, data in repo.commits[sha].items()]
        if tree:
            self._send_json([_tree_row(row) for row in rows])
            return
        if "blobs" not in parse_qs(urlsplit(self.path).query):
            rows = [{"rfilename": row["rfilename"]} for row in rows]
        gated = "manual" if repo.gated else False
        about = {"id": name, "modelId": name, "sha": sha, "private": repo.private, "gated": gated, "siblings": rows}
        self._send_json(about | self.hub.lie)

    def _api_fault(self, fault: Fault) -> bool:
        if fault.kind == "status":
            raise _Refused(fault.at, "", "Service trouble")
        if fault.kind == "silent":
            self.hub.release.wait(20)
            return True
        bodies = {"html": (PAGE, "text/html"), "empty": (b"", "application/json"), "json": (b"[1]", "application/json")}
        if fault.kind in bodies:
            self._send(200, *bodies[fault.kind])
            return True
        return False

    @staticmethod
    def _row(path: str, data: bytes) -> dict[str, Any]:
        row: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
        if path.endswith(LARGE):
            row["lfs"] = {"sha256": digest_of(path, data), "size": len(data), "pointerSize": 134}
        else:
            row["blobId"] = digest_of(path, data)
        return row

    def _resolve(self, rest: str, token: str | None) -> None:
        name, _, tail = rest.partition("/resolve/")
        revision, _, path = tail.partition("/")
        repo = self._repo(name, token, contents=True)
        sha = self._commit(repo, revision)
        data = repo.commits[sha].get(path)
        if data is None:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        if self.command == "HEAD" and self.hub.take_fault(f"HEAD {path}"):
            raise _Refused(503, "", "Service trouble")
        head = {"X-Repo-Commit": sha, "ETag": f'"{digest_of(path, data)}"'}
        if not (self.hub.redirect and path.endswith(LARGE)):
            self._send_file(data, path, head)
            return
        head |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": head["ETag"], "ETag": '"store"'}
        head["Location"] = f"{self.hub.store}/store/{name.replace('/', '--')}/{sha}/{path}?signature=1"
        self._send(302, b"", "text/plain", head)

    def _send_file(self, data: bytes, path: str, head: dict[str, str]) -> None:
        fault = self.hub.take_fault(path) if self.command == "GET" else None
        kind = fault.kind if fault else ""
        if kind == "status":
            assert fault is not None
            raise _Refused(fault.at, "", "Service trouble")
        if kind == "gone":
            raise _Refused(404, "EntryNotFound", "Entry not found")
        if kind == "silent":
            self.hub.release.wait(20)
            return
        if kind in ("html", "empty"):
            self._send(200, PAGE if kind == "html" else b"", "text/html" if kind == "html" else "text/plain", head)
            return
        span = self.headers.get("Range")
        start, stop, status = 0, len(data), 200
        if span and kind != "no_ranges":
            first, last = span.removeprefix("bytes=").split("-")
            start, stop, status = int(first), min(int(last) + 1 if last else len(data), len(data)), 206
            head = {**head, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
        more = b"more" if kind == "longer" else b""
        self._send_body(status, _spoilt(data, kind)[start:stop] + more, head, fault, start)

    def _send_body(self, status: int, body: bytes, head: dict[str, str], fault: Fault | None, start: int) -> None:
        kind = fault.kind if fault else ""
        self.send_response(status)
        for name, value in {**head, "Content-Type": "application/octet-stream"}.items():
            self.send_header(name, value)
        if kind in ("cut", "longer"):
            self.close_connection = True
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is None or kind not in ("drop", "cut", "hold"):
            self._write(body)
            return
        self._write(body[: max(fault.at - start, 0)])
        if kind == "hold":
            self.hub.held.set()
            self.hub.release.wait(20)
            self._write(body[max(fault.at - start, 0) :])
            return
        self.close_connection = True

    def _write(self, body: bytes) -> None:
        for at in range(0, len(body), 1 << 14):
            self.wfile.write(body[at : at + (1 << 14)])
            self.hub.sent += len(body[at : at + (1 << 14)])
        self.wfile.flush()

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), "application/json")

    def _send_error(self, refused: _Refused) -> None:
        head = {"X-Error-Message": refused.message, **({"X-Error-Code": refused.code} if refused.code else {})}
        self._send(refused.status, json.dumps({"error": refused.message}).encode(), "application/json", head)

    def _send(self, status: int, body: bytes, kind: str, head: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(head or {}), "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _spoilt(data: bytes, kind: str) -> bytes:
    if kind == "corrupt":
        return data[:-1] + bytes([data[-1] ^ 1])
    if kind == "page_of_size":
        return PAGE + bytes(len(data) - len(PAGE))
    if kind == "pointer":
        return POINTER + bytes(len(data) - len(POINTER))
    return data


def _tree_row(row: dict[str, Any]) -> dict[str, Any]:
    shown = {"type": "file", "path": row["rfilename"], "size": row["size"], "oid": row["blobId"]}
    if "lfs" in row:
        shown["lfs"] = {"oid": row["lfs"]["sha256"], "size": row["size"], "pointerSize": 134}
    return shown


VARIABLES = (
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "ZOO_OFFLINE",
    "HTTP_PROXY",
    "http_proxy",
    "ALL_PROXY",
    "all_proxy",
)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The local hub, an empty cache, no token, and no waiting between attempts."""
    from huggingface_hub import close_session, constants

    from zoo.loading.hub import listing, transfer

    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    served = Hub()
    monkeypatch.setenv("HF_ENDPOINT", served.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home/token"))
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 2)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 2)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(transfer, "WAITS", (0.0, 0.0))
    monkeypatch.setattr(listing, "WAITS", (0.0, 0.0))
    yield served
    served.stop()
    close_session()


@pytest.fixture(scope="session")
def weights() -> Any:
    """weights(bytes, seed) -> a safetensors file with one tensor of about that many bytes."""

    def build(size: int = 1000, seed: int = 0) -> bytes:
        head = json.dumps({f"t{seed}": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
        noise = hashlib.shake_128(str(seed).encode()).digest(size)
        return len(head).to_bytes(8, "little") + head + noise

    return build
