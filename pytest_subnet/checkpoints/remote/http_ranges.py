"""Ranges of files over HTTP, each answer checked before its body is read.

The client is httpx: huggingface_hub depends on it (as httpx2 from its release 2 on), so it is there
wherever this package is; fsspec's own HTTP filesystem needs aiohttp, which nothing here requires,
and takes any answer to a range for the range. The hub's files are read the same way, at the commit
they were opened at, with huggingface_hub's addresses, token and `HF_ENDPOINT`: its HfFileSystem
buffers what it reads and neither checks which range it was given nor how large the file is.

Plain http is taken from this machine only (and from the `HF_ENDPOINT` that a user sets up): on the
way from elsewhere anyone could change the weights that a gate is about to pass.
"""

from __future__ import annotations

import atexit
import base64
import functools
import importlib
import ipaddress
import os
import re
import ssl
import threading
from contextlib import contextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

from pytest_subnet.checkpoints.remote.ranges import (
    AbsentError,
    Interrupted,
    Look,
    RefusedError,
    changed,
)
from pytest_subnet.checkpoints.remote.urls import RemoteFile, masked
from pytest_subnet.checkpoints.wording import short
from pytest_subnet.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import httpx2

_HEAD_BYTES = 8
_MOST_REDIRECTS = 5
_CONNECT_SECONDS, _READ_SECONDS = 10.0, 30.0
_GONE = (400, 401, 403, 404, 410)
BUSY = (408, 425, 429, 500, 502, 503, 504)
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", re.ASCII)
_PINNED = re.compile(
    r"hf://(?:(?P<kind>dataset|space)s/)?(?P<repo>[^/@]+/[^/@]+)@(?P<commit>[^/]+)/(?P<path>.+)"
)


def look(file: RemoteFile) -> Look:
    """The first bytes of a file, its size and its version."""
    if file.size == 0:
        return Look(file, b"")
    with _answer(file, {"Range": f"bytes=0-{_HEAD_BYTES - 1}"}) as response:
        if response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return Look(RemoteFile(file.address, 0, _version(file, response)), b"")
        if file.name.endswith(".json") and response.status_code == HTTPStatus.OK:
            # Read as a whole later: some servers have ranges of large files only.
            length = response.headers.get("content-length")
            size = int(length) if length else None
            return Look(RemoteFile(file.address, size, _version(file, response)), b"")
        run = _run(file, response, 0, _HEAD_BYTES - 1)
        buffer = memoryview(bytearray(run.last + 1))
        _fill(file, response, buffer)
        known = RemoteFile(file.address, run.size, _version(file, response))
    if file.size not in (None, run.size):  # the hub told another size
        raise changed(file)
    return Look(known, bytes(buffer))


def read_some(file: RemoteFile, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` from byte `offset` of a file that must be what it was when it was opened."""
    last = offset + len(buffer) - 1
    headers = {"Range": f"bytes={offset}-{last}", **_only_if_same(file)}
    with _answer(file, headers, is_part=True) as response:
        if response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise CheckpointError(
                f"{file} has no bytes {offset:,} to {last:,}: the server answered 416 (Requested "
                "Range Not Satisfiable); was it replaced by a shorter file? Open it again"
            )
        run = _run(file, response, offset, last)
        now = run.size, _version(file, response)
        if file.size is not None and now != (file.size, file.version):
            raise changed(file)
        got = run.last + 1 - run.first
        _fill(file, response, buffer[:got])
        if got < len(buffer):
            raise Interrupted("the server sent fewer bytes than it was asked for", got)


def read_whole(file: RemoteFile, limit: int) -> bytes:
    """A small file; at most `limit` bytes of it and one more."""
    raw = bytearray()
    with _answer(file, {}) as response:
        if response.status_code != HTTPStatus.OK:
            raise _unexpected(file, response)
        try:
            for chunk in response.iter_raw():
                raw += chunk
                if len(raw) > limit:
                    break
        except _library().TransportError as error:
            raise Interrupted(_spell(error), 0) from None
    return bytes(raw)


class _Run(NamedTuple):
    """Which bytes an answer holds, and how many the file has."""

    first: int
    last: int
    size: int


def _run(file: RemoteFile, response: httpx2.Response, first: int, last: int) -> _Run:
    """What an answer to a range holds; anything but a part of that range is refused unread."""
    if response.status_code == HTTPStatus.OK:
        if response.headers.get("content-type", "").startswith("text/html"):
            raise CheckpointError(
                f"{file} is a web page, not a file of weights; does it need a login, or is it a "
                "page about the file (on the hub: /blob/ where the file is at /resolve/)?"
            )
        raise CheckpointError(
            f"the server of {file} ignores ranges: asked for bytes {first:,} to {last:,} it sends "
            "the whole file; download it first and pass the path"
        )
    if response.status_code != HTTPStatus.PARTIAL_CONTENT:
        raise _unexpected(file, response)
    spelled = response.headers.get("content-range", "")
    match = _CONTENT_RANGE.fullmatch(spelled)
    encoding = response.headers.get("content-encoding", "identity")
    run = _Run(*map(int, match.groups())) if match else None
    if run is None or run.first != first or not first <= run.last <= last or run.last >= run.size:
        raise CheckpointError(
            f"the server of {file} answers with another range than it was asked for: bytes "
            f"{first:,} to {last:,}, and it says '{short(spelled)}'; download it first and pass "
            "the path"
        )
    if encoding != "identity":
        raise CheckpointError(
            f"the server of {file} sends it encoded ({short(encoding)}), so that ranges of it are "
            "no ranges of the file; download it first and pass the path"
        )
    return run


def _fill(file: RemoteFile, response: httpx2.Response, buffer: memoryview) -> None:
    """Copy the body of an answer that says it is as long as `buffer`.

    It is read to its end, after which the connection can be used again.
    """
    got = 0
    try:
        for chunk in response.iter_raw():
            if got + len(chunk) > len(buffer):
                raise CheckpointError(
                    f"the server of {file} sends more bytes than it announces; download it first "
                    "and pass the path"
                )
            buffer[got : got + len(chunk)] = chunk
            got += len(chunk)
    except _library().TransportError as error:
        raise Interrupted(_spell(error), got) from None
    if got < len(buffer):
        raise Interrupted("the server sent fewer bytes than it announced", got)


def _version(file: RemoteFile, response: httpx2.Response) -> str | None:
    """What tells the file from a later one; a file of the hub is known by its commit."""
    if file.scheme == "hf":
        return file.version
    etag = response.headers.get("etag")
    modified = response.headers.get("last-modified")
    return f"etag {etag}" if etag else f"modified {modified}" if modified else None


def _only_if_same(file: RemoteFile) -> dict[str, str]:
    """Headers with which a server refuses to send another version than the one known."""
    if file.scheme == "hf":  # asked for by its commit; the store behind has etags of its own
        return {}
    kind, _, value = (file.version or "").partition(" ")
    if kind == "etag" and not value.startswith("W/"):  # the standard never matches weak ones
        return {"If-Match": value}
    return {"If-Unmodified-Since": value} if kind == "modified" else {}


@contextmanager
def _answer(
    file: RemoteFile, headers: Mapping[str, str], *, is_part: bool = False
) -> Iterator[httpx2.Response]:
    """The answer to a request for `file`, its body unread; refusals are raised.

    A part is asked for where the last one came from: the hub redirects each request to a signed
    address that is good for an hour, and it counts how many it is asked for.
    """
    httpx = _library()
    first, secrets = _request_of(file)
    url = _moved.get(file.address, first) if is_part else first
    may_have_expired = url != first
    for _ in range(_MOST_REDIRECTS + 1):
        own = secrets if _origin(url) == _origin(first) else {}
        try:
            request = client().build_request(
                "GET", url, headers={"Accept-Encoding": "identity", **headers, **own}
            )
            response = client().send(request, stream=True)
        except httpx.TransportError as error:
            refuse_untrusted(file, url.host, error)
            raise Interrupted(_spell(error)) from None
        try:
            if response.has_redirect_location:
                url = _next_address(file, url, response.headers["location"])
                continue
            if response.status_code in _GONE and may_have_expired:
                url, may_have_expired = first, False
                continue
            _check_status(file, response)
            if url != first:
                _moved[file.address] = url
            yield response
            return
        finally:
            response.close()
    raise CheckpointError(
        f"{file} is redirected more than {_MOST_REDIRECTS} times; is this its address?"
    )


def _request_of(file: RemoteFile) -> tuple[httpx2.URL, dict[str, str]]:
    """Where to ask for `file`, and the headers with secrets for that host alone."""
    httpx = _library()
    if file.scheme == "hf":
        return _on_the_hub(file)
    try:
        url = httpx.URL(file.address)
    except httpx.InvalidURL:
        raise CheckpointError(f"{file} is no valid address; check its spelling") from None
    if url.scheme != "https" and not _is_here(url):
        raise CheckpointError(
            f"{file} would be read unencrypted, and whoever is on the way could change the "
            "weights; use https://, or download it first and pass the path"
        )
    if not url.userinfo:
        return url, {}
    pair = f"{unquote(url.username)}:{unquote(url.password)}".encode()
    secret = {"Authorization": f"Basic {base64.b64encode(pair).decode('ascii')}"}
    return url.copy_with(userinfo=b""), secret


def _on_the_hub(file: RemoteFile) -> tuple[httpx2.URL, dict[str, str]]:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    found = _PINNED.fullmatch(file.address)
    if found is None:
        raise CheckpointError(f"{file} names no file at a commit; open it with open_checkpoint")
    address = hf_hub_url(
        found["repo"], found["path"], repo_type=found["kind"], revision=found["commit"]
    )
    return _library().URL(address), build_hf_headers()


def _next_address(file: RemoteFile, url: httpx2.URL, location: str) -> httpx2.URL:
    """Where a redirect leads; never from an encrypted connection to one that is not."""
    httpx = _library()
    try:
        target: httpx2.URL = url.join(location)
    except httpx.InvalidURL:
        raise CheckpointError(f"{file} is redirected to no valid address") from None
    is_unsafe = target.scheme == "http" and (url.scheme == "https" or not _is_here(target))
    if target.scheme not in ("http", "https") or is_unsafe:
        raise CheckpointError(
            f"{file} is redirected to {short(masked(str(target)))}, which is not encrypted; "
            "download it first and pass the path"
        )
    return target


def _origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)


def _is_here(url: httpx2.URL) -> bool:
    """Whether an address is one of this machine."""
    try:
        return url.host == "localhost" or ipaddress.ip_address(url.host).is_loopback
    except ValueError:
        return False


def _check_status(file: RemoteFile, response: httpx2.Response) -> None:
    """Raise for an answer that says why there is no file."""
    status = response.status_code
    if status in BUSY:
        raise Interrupted(f"the server answered {_named(status)}")
    if status in (401, 403):
        advice = (
            "log in with `hf auth login` if the repository is private or gated"
            if file.scheme == "hf"
            else "has the link expired, or does it need a user and a password?"
        )
        raise RefusedError(
            f"{file} must not be read: the server answered {_named(status)}; {advice}"
        )
    if status in (404, 410):
        raise AbsentError(
            f"{file} does not exist: the server answered {_named(status)}; check the address"
        )
    if status == HTTPStatus.PRECONDITION_FAILED:
        raise changed(file)


def _unexpected(file: RemoteFile, response: httpx2.Response) -> CheckpointError:
    return CheckpointError(
        f"{file} cannot be read: the server answered {_named(response.status_code)}; check the "
        "address, or download it first and pass the path"
    )


def _named(status: int) -> str:
    try:
        return f"{status} ({HTTPStatus(status).phrase})"
    except ValueError:
        return str(status)


def _spell(error: Exception) -> str:
    """What happened to a connection; the library's own words may hold the address."""
    httpx = _library()
    if isinstance(error, httpx.TimeoutException):
        return "the server did not answer in time"
    if isinstance(error, httpx.ConnectError | httpx.ProxyError):
        return "no connection to the server"
    return "the connection was dropped"


def refuse_untrusted(file: RemoteFile, host: str, error: Exception) -> None:
    """Raise if a connection failed for the certificate of `host`: it is the same the next time."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise CheckpointError(
                f"{file} cannot be read: the certificate of {short(host)} is not trusted "
                f"({short(cause.verify_message)}); if the server is your own, put the path of its "
                "authority's certificate into SSL_CERT_FILE; if not, somebody may be in between"
            ) from None
        cause = cause.__cause__ or cause.__context__


_moved: dict[str, httpx2.URL] = {}
_clients: dict[int, httpx2.Client] = {}
_making = threading.Lock()


def client() -> httpx2.Client:
    """The client of this process: threads share it, and its connections are used again."""
    process = os.getpid()  # a child must not speak over its parent's connections
    if process not in _clients:
        httpx = _library()
        with _making:
            if process not in _clients:
                _clients[process] = httpx.Client(
                    timeout=httpx.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS, pool=None),
                    limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
                )
    return _clients[process]


def close() -> None:
    """Close the connections of this process; a later read opens others."""
    _moved.clear()
    made = _clients.pop(os.getpid(), None)
    if made is not None:
        made.close()


atexit.register(close)


def transport_errors() -> tuple[type[Exception], ...]:
    """What the client raises where a connection fails."""
    return (_library().TransportError,)


@functools.cache
def _library() -> Any:
    """The httpx that huggingface_hub brings: httpx2 from its release 2 on."""
    try:
        return importlib.import_module("httpx2")
    except ModuleNotFoundError:
        return importlib.import_module("httpx")
