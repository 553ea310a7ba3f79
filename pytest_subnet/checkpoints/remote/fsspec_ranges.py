"""Ranges of files in object stores (s3, gs, az) and wherever else fsspec reaches."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pytest_subnet.checkpoints.remote.ranges import AbsentError, Interrupted, Look, RefusedError
from pytest_subnet.checkpoints.remote.urls import RemoteFile, masked_text
from pytest_subnet.checkpoints.wording import short
from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEAD_BYTES = 8
# What tells a version from the next, as the filesystems call it; the first that is there counts.
_ETAGS = ("ETag", "etag", "generation", "VersionId", "version_id", "md5Hash", "checksum")
_TIMES = ("LastModified", "last_modified", "updated", "mtime", "modified", "modify", "created")


def look(file: RemoteFile) -> Look:
    """The first bytes of a file, its size and its version."""
    with _in_our_words(file):
        files, path = _filesystem(file)
        files.invalidate_cache(path)  # what it knows of the file may be old
        told = files.info(path)
        if told.get("type") != "file" or not isinstance(told.get("size"), int):
            raise AbsentError(f"{file} is no file whose size is known; check the address")
        known = RemoteFile(file.address, told["size"], _version(told))
        head = files.cat_file(path, start=0, end=_HEAD_BYTES) if told["size"] else b""
    return Look(known, bytes(head[:_HEAD_BYTES]))


def read_some(file: RemoteFile, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` from byte `offset` on; that it is still the same file, the caller looks at."""
    with _in_our_words(file):
        files, path = _filesystem(file)
        raw = files.cat_file(path, start=offset, end=offset + len(buffer))
    if len(raw) > len(buffer):
        raise CheckpointError(
            f"{file}: fsspec's {safe(type(files).__name__)} gave {len(raw):,} bytes where "
            f"{len(buffer):,} were asked for; download it first and pass the path"
        )
    buffer[: len(raw)] = raw
    if len(raw) < len(buffer):
        raise Interrupted("fewer bytes came than were asked for", len(raw))


def read_whole(file: RemoteFile, limit: int) -> bytes:
    """A small file; at most `limit` bytes of it and one more."""
    with _in_our_words(file):
        files, path = _filesystem(file)
        files.invalidate_cache(path)
        size = files.info(path)["size"]
        return bytes(files.cat_file(path, start=0, end=min(size, limit + 1)))


def _version(told: dict[str, Any]) -> str | None:
    for kind, keys in (("etag", _ETAGS), ("modified", _TIMES)):
        for key in keys:
            if told.get(key):
                return f"{kind} {told[key]}"
    return None


def _filesystem(file: RemoteFile) -> tuple[Any, str]:
    """The filesystem of fsspec for an address, this thread's own, and the path in it."""
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    try:
        files, path = url_to_fs(file.address)
    except ImportError as error:
        package = known_implementations[file.scheme]["class"].partition(".")[0]
        how = f"pip install {package}" if package != "fsspec" else short(error)
        raise CheckpointError(
            f"{file} needs a package that is not installed: {how}; or download it first and pass "
            "the path"
        ) from None
    return files, path


@contextmanager
def _in_our_words(file: RemoteFile) -> Iterator[None]:
    """Errors without the address, which may hold a secret, and told apart by what helps."""
    try:
        yield
    except (CheckpointError, Interrupted):
        raise
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise AbsentError(f"{file} does not exist; check the address") from None
    except PermissionError:
        raise RefusedError(
            f"{file} must not be read; check the credentials that its filesystem looks for"
        ) from None
    except (OSError, EOFError) as error:
        raise Interrupted(_spelled(error)) from None
    except Exception as error:  # each filesystem's client raises its own kind
        raise CheckpointError(
            f"{file} could not be read ({_spelled(error)}); check the address and the credentials"
        ) from None


def _spelled(error: Exception) -> str:
    return f"{type(error).__name__}: {short(masked_text(str(error)))}"
