"""Addresses of remote files, and what of them may be shown.

An address can hold a password (`https://user:password@host/…`) or a signature that opens the file
for whoever has it (`?X-Amz-Signature=…`). Neither may reach a message, a report or a cache.
"""

from __future__ import annotations

import re
from urllib.parse import quote

from pytest_subnet.text import safe

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>()]+")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # of two letters or more: C:// is a drive
_HOST = re.compile(r"(\[[^\[\]@]*\]|[^:@]*)(:\d*)?")


def is_url(source: str) -> bool:
    """Whether `source` is an address rather than a path.

    >>> is_url("s3://bucket/run"), is_url("runs/one")
    (True, False)
    """
    return _SCHEME.match(source) is not None


def masked(url: str) -> str:
    """`url` as it is shown: without user, password, query and fragment.

    >>> masked("https://me:secret@host:8443/run/model.safetensors?X-Amz-Signature=f00")
    'https://host:8443/run/model.safetensors'
    >>> masked("hf://org/name@main/sub")
    'hf://org/name@main/sub'
    """
    scheme, _, rest = url.partition("://")
    authority, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    host = authority.rpartition("@")[2]
    if not _HOST.fullmatch(host):  # a password that was not escaped: where it ends is not known
        return f"{scheme}://…"
    return f"{scheme}://{host}{slash}{path}"


def masked_text(text: str) -> str:
    """A text of somebody else's in which every address is shown as `masked` shows it.

    >>> masked_text("GET 'https://host/file?token=f00' failed")
    "GET 'https://host/file' failed"
    """
    return _URL.sub(lambda found: masked(found[0]), text)


def identifies(version: str | None, size: int | None) -> bool:
    """Whether a server's word for the version of a file is another one for any other content.

    A date is not, nor is a weak etag, nor an etag that is made of date and size, as nginx and
    Apache make them: a copy that keeps the date has the same one.

    Args:
        version: as `RemoteFile.version`.
        size: the bytes of the file; None where they are not known, and nothing identifies it then.

    >>> identifies('etag "5f3c1a9e"', 16), identifies('etag W/"5f3c1a9e"', 16)
    (True, False)
    >>> identifies('etag "674f2a10-10"', 16)  # seconds and size, in hexadecimal
    False
    """
    kind, _, etag = (version or "").partition(" ")
    parts = etag.strip('"').split("-")
    return kind == "etag" and "W/" not in etag and size is not None and f"{size:x}" not in parts


class RemoteFile(str):
    """The address of one file, and what is known of the file.

    It is an ordinary string to whoever reads the file, also in another process, and prints as
    `masked` shows it: no message, log of a unit or traceback with its locals can give it away.

    Attributes:
        size: its bytes when it was opened; None when it was not looked at.
        version: what tells it from what may be there later, as `etag "…"` or `modified …`; None
            when it was not looked at, or the server gives nothing of the kind.

    >>> file = RemoteFile("https://me:secret@host/model.safetensors")
    >>> print(file, repr(file), file.name, file.address == "https://me:secret@host/model.safetensors")
    https://host/model.safetensors 'https://host/model.safetensors' model.safetensors True
    """

    size: int | None
    version: str | None

    def __new__(cls, url: str, size: int | None = None, version: str | None = None) -> RemoteFile:
        """Keep what is known beside the address."""
        self = super().__new__(cls, url)
        self.size, self.version = size, version
        return self

    @property
    def address(self) -> str:
        """The address itself; for whoever fetches, never for a message."""
        return self[:]

    @property
    def scheme(self) -> str:
        """What it starts with: `https`."""
        return self.partition("://")[0].lower()

    @property
    def is_http(self) -> bool:
        """Whether it is an address of the web, whose parts are escaped and may have a query."""
        return self.scheme in ("http", "https")

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self._path().rpartition("/")[2]

    @property
    def parent(self) -> RemoteFile:
        """The directory of the file."""
        path = self._path()
        return RemoteFile(path.rpartition("/")[0] + self._query())

    def __truediv__(self, name: str) -> RemoteFile:
        """The entry `name` of this directory; a query stays, as a token for a directory does."""
        part = quote(name, safe="") if self.is_http else name
        return RemoteFile(f"{self._path().rstrip('/')}/{part}{self._query()}")

    def _path(self) -> str:
        return re.split(r"[?#]", self.address, maxsplit=1)[0] if self.is_http else self.address

    def _query(self) -> str:
        address = self.address.partition("#")[0]
        return address[len(self._path()) :] if self.is_http else ""

    def __str__(self) -> str:
        """As `masked` shows it, and nothing in it that could steer a terminal."""
        return safe(masked(self.address))

    def __repr__(self) -> str:
        """Likewise."""
        return repr(str(self))

    def __format__(self, spec: str) -> str:
        """Likewise."""
        return format(str(self), spec)
