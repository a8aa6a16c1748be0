"""A hub on loopback that speaks as much of Hugging Face's HTTP API as pulling uses.

It serves real files from memory, with range requests, and misbehaves as it is told: refuses, breaks
off, lies about hashes and sizes, stands still. Every request is kept, with the bytes that were sent
for it, so that a test can say that nothing was fetched twice. It never talks to anybody else.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

CHUNK_BYTES = 16 << 10
LFS_BYTES_MIN = 10 << 10


@dataclass(frozen=True)
class Refusal:
    """How a request is refused; `code` is the hub's X-Error-Code."""

    status: int
    code: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1 << 30


@dataclass
class Sent:
    """A request and what became of it."""

    path: str
    range: str
    token: str
    bytes_sent: int = 0


@dataclass
class Repository:
    """One repository at one commit; further revisions are names of that commit."""

    files: dict[str, bytes]
    commit: str = "0123456789abcdef0123456789abcdef01234567"
    revisions: tuple[str, ...] = ("main",)
    token: str = ""
    gated: bool = False


class FakeHub:
    """Use it as a context; `endpoint` is its address while it runs."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Sent] = []
        self.refusals: dict[str, Refusal] = {}
        """By the end of the path: refuse `times` times."""
        self.break_after: dict[str, list[int]] = {}
        """By file: how many bytes each of the next answers sends before the connection breaks."""
        self.stop_after: dict[str, int] = {}
        """By file: bytes after which every answer stands still until `go_on` is set."""
        self.go_on = threading.Event()
        self.standing = threading.Event()
        """Set when an answer stands still."""
        self.announced: dict[str, dict[str, Any]] = {}
        """By file: what the listing says instead of the truth."""
        self.elsewhere: dict[str, str] = {}
        """By file: an endpoint of another hub that is redirected to, as large files are."""
        self.ranges = True
        self.sent: dict[str, bytes] = {}
        """By file: other bytes than those that the hashes are of."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                _answer(hub, self)

            def log_message(self, format: str, *arguments: object) -> None:
                """Nothing: what was asked is in `requests`."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.go_on.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, name: str, directory: Path, **more: Any) -> Repository:
        """Publish the files of a directory, with extra ones in `files`."""
        files = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
        files |= more.pop("files", {})
        self.repositories[name] = repository = Repository(files, **more)
        return repository

    def bytes_sent(self, file: str) -> int:
        """Bytes of a file that were sent, over all requests."""
        return sum(sent.bytes_sent for sent in self.requests if sent.path.endswith("/" + file))

    def asked(self, file: str) -> list[Sent]:
        """The requests for a file."""
        return [sent for sent in self.requests if sent.path.endswith("/" + file)]


def _answer(hub: FakeHub, handler: BaseHTTPRequestHandler) -> None:
    path = unquote(urlsplit(handler.path).path)
    token = (handler.headers.get("authorization") or "").removeprefix("Bearer ")
    sent = Sent(path, handler.headers.get("range") or "", token)
    hub.requests.append(sent)
    for ending, refusal in list(hub.refusals.items()):
        if path.endswith(ending):
            left = refusal.times - 1
            if left > 0:
                hub.refusals[ending] = Refusal(refusal.status, refusal.code, refusal.headers, left)
            else:
                del hub.refusals[ending]
            _refuse(handler, refusal)
            return
    if path.startswith("/api/models/"):
        name, _, revision = path.removeprefix("/api/models/").partition("/revision/")
        _list(hub, handler, name, revision or "main", token)
        return
    name, _, rest = path.strip("/").partition("/resolve/")
    commit, _, file = rest.partition("/")
    repository = hub.repositories.get(name)
    if repository is None or commit != repository.commit or file not in repository.files:
        _refuse(handler, Refusal(404, "EntryNotFound"))
    elif repository.token and token != repository.token:
        _refuse(handler, Refusal(401, "RepoNotFound"))
    elif file in hub.elsewhere:
        _refuse(handler, Refusal(302, headers={"Location": hub.elsewhere[file] + path}))
    else:
        _send(hub, handler, file, hub.sent.get(file, repository.files[file]), sent)


def _refuse(handler: BaseHTTPRequestHandler, refusal: Refusal) -> None:
    handler.send_response(refusal.status)
    if refusal.code:
        handler.send_header("X-Error-Code", refusal.code)
    for name, value in refusal.headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def _list(
    hub: FakeHub, handler: BaseHTTPRequestHandler, name: str, revision: str, token: str
) -> None:
    repository = hub.repositories.get(name)
    if repository is None or (repository.token and token != repository.token):
        _refuse(handler, Refusal(403 if token else 401, "" if token else "RepoNotFound"))
        return
    if repository.gated:
        _refuse(handler, Refusal(403, "GatedRepo"))
        return
    if revision not in (*repository.revisions, repository.commit):
        _refuse(handler, Refusal(404, "RevisionNotFound"))
        return
    siblings = []
    for file, content in repository.files.items():
        blob = b"blob %d\0" % len(content) + content
        entry: dict[str, Any] = {
            "rfilename": file,
            "size": len(content),
            "blobId": hashlib.sha1(blob).hexdigest(),
        }
        if len(content) >= LFS_BYTES_MIN:
            sha256 = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
        siblings.append(entry | hub.announced.get(file, {}))
    body = json.dumps({"id": name, "sha": repository.commit, "siblings": siblings}).encode()
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def _send(
    hub: FakeHub, handler: BaseHTTPRequestHandler, file: str, content: bytes, sent: Sent
) -> None:
    start = 0
    if sent.range and hub.ranges:
        start = int(sent.range.removeprefix("bytes=").rstrip("-"))
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    else:
        handler.send_response(200)
    body = content[start:]
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    breaks = hub.break_after.get(file)
    limit = breaks.pop(0) if breaks else len(body)
    stop = hub.stop_after.get(file)
    try:
        while sent.bytes_sent < min(limit, len(body)):
            if stop is not None and start + sent.bytes_sent >= stop and not hub.go_on.is_set():
                hub.standing.set()
                hub.go_on.wait()
            end = min(sent.bytes_sent + CHUNK_BYTES, limit, len(body))
            handler.wfile.write(body[sent.bytes_sent : end])
            sent.bytes_sent = end
    except OSError:
        handler.close_connection = True
        return
    if limit < len(body):
        handler.close_connection = True
