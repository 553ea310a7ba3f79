"""Real servers on loopback: files over HTTP with every way to fail, and a hub on top of them."""

from __future__ import annotations

import hashlib
import json
import ssl
import threading
from collections import Counter, defaultdict, deque
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# Signed by itself for localhost and 127.0.0.1; it protects nothing but the tests.
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgEvovE1inVsZM+qGb
b1VosAUG0LglCU7L2CZni/jtrB2hRANCAAQMkiK8ririKIWuI9bXeIYbxgSdcFLz
QflcBq6RLIYvzDxzByuijtrxJ08XLQc4XxteVYDD/VYxtu7KoaSiXnn9
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBtDCCAVmgAwIBAgIUSEKQepXycVQ3TO2njdrgBMlzZLIwCgYIKoZIzj0EAwIw
IDEeMBwGA1UEAwwVbG9vcGJhY2sgb2YgdGhlIHRlc3RzMCAXDTI2MTEyMTIwNTM1
MVoYDzIxMjYxMDI4MjA1MzUxWjAgMR4wHAYDVQQDDBVsb29wYmFjayBvZiB0aGUg
dGVzdHMwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAQMkiK8ririKIWuI9bXeIYb
xgSdcFLzQflcBq6RLIYvzDxzByuijtrxJ08XLQc4XxteVYDD/VYxtu7KoaSiXnn9
o28wbTAdBgNVHQ4EFgQUuK6bNrBmeoURAYjJvbWyaq4qGjswHwYDVR0jBBgwFoAU
uK6bNrBmeoURAYjJvbWyaq4qGjswDwYDVR0TAQH/BAUwAwEB/zAaBgNVHREEEzAR
gglsb2NhbGhvc3SHBH8AAAEwCgYIKoZIzj0EAwIDSQAwRgIhAJtdWApFp0AO925S
N3+kBsHYLdR0Glo8OV5wCNXSl/3BAiEAoUoqAyEdtLJy5Q7YgaQgsFzE2VwZMqPq
CwwrgTwNaB8=
-----END CERTIFICATE-----
"""


class Asked(NamedTuple):
    """One request."""

    method: str
    path: str
    headers: dict[str, str]


class FileServer(ThreadingHTTPServer):
    """Serves files by ranges, notes what was asked and sent, and fails where it is told to.

    Attributes:
        files: what is served, by path.
        next: answers to give instead, by path: each once, in order.
        always: an answer to give instead, by path.
        tells: how a file's version is told: `"etag"`, `"weak"`, `"date"` or `"nothing"`.
        asked: all requests.
        sent: bytes of bodies sent, by path.
    """

    request_queue_size = 64

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = files or {}
        self.next: defaultdict[str, deque[Callable[[Answer], None]]] = defaultdict(deque)
        self.always: dict[str, Callable[[Answer], None]] = {}
        self.tells = "etag"
        self.asked: list[Asked] = []
        self.sent: Counter[str] = Counter()
        self.connections = 0
        self.scheme = "http"

    @property
    def address(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_port}"

    def version_headers(self, data: bytes) -> dict[str, str]:
        digest = hashlib.sha256(data).hexdigest()[:12]
        return {
            "etag": {"ETag": f'"{digest}"'},
            "weak": {"ETag": f'W/"{digest}"'},
            "date": {"Last-Modified": formatdate(int(digest, 16) % 2**30, usegmt=True)},
            "nothing": {},
        }[self.tells]

    def find(self, answer: Answer) -> None:
        """Serve what a path names."""
        data = self.files.get(answer.path_asked)
        if data is None:
            return refuse(404)(answer)
        answer.send_ranges(data, self.version_headers(data))


class Answer(BaseHTTPRequestHandler):
    """The answer to one request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: 40 ms each time else
    server: FileServer

    def setup(self) -> None:
        self.server.connections += 1
        super().setup()

    @property
    def path_asked(self) -> str:
        return unquote(self.path.partition("?")[0])

    def do_GET(self) -> None:
        self.server.asked.append(Asked(self.command, self.path, dict(self.headers)))
        queue = self.server.next[self.path_asked]
        behave = queue.popleft() if queue else self.server.always.get(self.path_asked)
        (behave or self.server.find)(self)

    do_HEAD = do_GET  # noqa: N815

    def send_ranges(self, data: bytes, headers: dict[str, str]) -> None:
        """As the standard has it."""
        expected, unmodified = self.headers["If-Match"], self.headers["If-Unmodified-Since"]
        if (expected and headers.get("ETag") != expected) or (
            unmodified and headers.get("Last-Modified") != unmodified
        ):
            return self.send(b"", headers, 412)
        if not self.headers["Range"]:
            return self.send(data, headers)
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        if first >= len(data):
            return self.send(b"", {**headers, "Content-Range": f"bytes */{len(data)}"}, 416)
        last = min(last, len(data) - 1)
        told = {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"}
        self.send(data[first : last + 1], told, 206)

    def send(
        self, data: bytes, headers: dict[str, str], status: int = 200, length: int | None = None
    ) -> None:
        """Send a body, and say that it has `length` bytes."""
        if self.command != "HEAD":
            self.server.sent[self.path_asked] += len(data)  # before the client can look
        self.send_response(status)
        told = {"Content-Length": str(len(data) if length is None else length), **headers}
        for name, value in told.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            try:
                self.wfile.write(data)
            except OSError:  # hung up: as clients do that refuse an answer
                self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Keep the terminal clean."""


def refuse(status: int, body: bytes = b"no", **headers: str) -> Callable[[Answer], None]:
    """Answer with a status."""
    told = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda answer: answer.send(body, told, status)


def redirect(location: str, status: int = 302) -> Callable[[Answer], None]:
    """Send elsewhere."""
    return refuse(status, b"", Location=location)


def drop_after(nbytes: int) -> Callable[[Answer], None]:
    """Announce the range that was asked for, send some bytes of it, and hang up."""

    def behave(answer: Answer) -> None:
        data = answer.server.files[answer.path_asked]
        first, last = map(int, answer.headers["Range"].removeprefix("bytes=").split("-"))
        headers = answer.server.version_headers(data)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        answer.send(data[first : first + nbytes], headers, 206, length=last + 1 - first)
        answer.close_connection = True

    return behave


def send_range(first: int, last: int, *, lie: str | None = None) -> Callable[[Answer], None]:
    """Answer any range with this one, and with `Content-Range: lie` if there is one."""

    def behave(answer: Answer) -> None:
        data = answer.server.files[answer.path_asked]
        headers = answer.server.version_headers(data)
        headers["Content-Range"] = lie or f"bytes {first}-{last}/{len(data)}"
        answer.send(data[first : last + 1], headers, 206)

    return behave


def ignore_range(answer: Answer) -> None:
    """Answer with all of the file."""
    data = answer.server.files[answer.path_asked]
    answer.send(data, answer.server.version_headers(data))


class Hub(FileServer):
    """Repositories, each with its revisions, and as much of the hub's API as ranges need.

    Weights are redirected to `store`, on another host, as the hub does.
    """

    def __init__(self, repositories: dict[str, dict[str, dict[str, bytes]]]) -> None:
        super().__init__()
        self.repositories = repositories
        self.store = FileServer()
        self.gated: set[str] = set()

    def commit(self, repo: str, revision: str) -> str:
        content = repr(sorted(self.repositories[repo][revision].items()))
        return hashlib.sha1(content.encode()).hexdigest()

    def find(self, answer: Answer) -> None:
        parts = [unquote(part) for part in answer.path.partition("?")[0].strip("/").split("/")]
        is_api = parts[:2] == ["api", "models"]
        if is_api:
            parts = parts[2:]
        repo = "/".join(parts[:2])
        if repo not in self.repositories:
            return refuse(401, X_Error_Code="RepoNotFound")(answer)
        revisions = self.repositories[repo]
        asked = parts[3] if len(parts) > 3 else "main"
        name = {self.commit(repo, each): each for each in revisions}.get(asked, asked)
        if name not in revisions:
            return refuse(404, X_Error_Code="RevisionNotFound")(answer)
        if is_api:
            return self._tell(answer, repo, name)
        if repo in self.gated:
            return refuse(403, X_Error_Code="GatedRepo")(answer)
        path = "/".join(parts[4:])
        data = revisions[name].get(path)
        if data is None:
            return refuse(404, X_Error_Code="EntryNotFound")(answer)
        if path.endswith(".safetensors"):
            blob = f"/blobs/{hashlib.sha256(data).hexdigest()}"
            self.store.files[blob] = data
            # localhost and 127.0.0.1 are two hosts to a client
            there = f"http://localhost:{self.store.server_port}{blob}?X-Amz-Signature=f00"
            return redirect(there)(answer)
        answer.send_ranges(data, self.version_headers(data))

    def _tell(self, answer: Answer, repo: str, revision: str) -> None:
        siblings = [
            {
                "rfilename": path,
                "size": len(data),
                "blobId": hashlib.sha1(data).hexdigest(),
                **(
                    {
                        "lfs": {
                            "size": len(data),
                            "sha256": hashlib.sha256(data).hexdigest(),
                            "pointerSize": 130,
                        }
                    }
                    if path.endswith(".safetensors")
                    else {}
                ),
            }
            for path, data in self.repositories[repo][revision].items()
        ]
        told = {"id": repo, "sha": self.commit(repo, revision), "siblings": siblings}
        answer.send(json.dumps(told).encode(), {"Content-Type": "application/json"})


@contextmanager
def running(server: FileServer, certificate: Path | None = None) -> Iterator[FileServer]:
    """Serve until the block ends; with TLS if there is a file to put the certificate in."""
    if certificate is not None:
        certificate.write_text(CERTIFICATE)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.scheme = "https"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
