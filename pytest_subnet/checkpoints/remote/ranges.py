"""Runs of bytes of remote files: asked for again when a connection breaks, but not for ever.

What is fetched goes where the caller wants it: nothing is kept, no temporary file is written. A
checkpoint is read in pieces of a few MB, and a broken connection costs the rest of one piece.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from pytest_subnet.checkpoints.remote.urls import RemoteFile
from pytest_subnet.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class Transport(Protocol):
        """A way to read remote files; a try of it either ends well or raises."""

        def look(self, file: RemoteFile) -> Look:
            """The first bytes of a file and what is known of it."""

        def read_some(self, file: RemoteFile, offset: int, buffer: memoryview) -> None:
            """Fill `buffer` from byte `offset` on."""

        def read_whole(self, file: RemoteFile, limit: int) -> bytes:
            """A small file; at most `limit` bytes of it and one more."""


ResultT = TypeVar("ResultT")

TRIES = 5
"""How often one piece is asked for."""
PAUSE_SECONDS = 0.5
"""Before the second try; twice as long before each further one."""
LONGEST_PAUSE_SECONDS = 8.0

PIECE_BYTES = 16 * 1024 * 1024
_LARGEST_JSON = 200_000_000


class Look(NamedTuple):
    """What a first look at a file gave: the file with its size and version, its first bytes."""

    file: RemoteFile
    head: bytes


class Interrupted(Exception):  # noqa: N818 - it is no error until it was tried often enough
    """A try that may go well the next time.

    Attributes:
        reason: what happened, to follow the name of the file.
        got: how many bytes had come by then.
    """

    def __init__(self, reason: str, got: int = 0) -> None:
        """Say what happened."""
        super().__init__(reason)
        self.reason = reason
        self.got = got


class AbsentError(CheckpointError):
    """There is no such file."""


class RefusedError(AbsentError):
    """The server does not let us read the file; some say so of files that are not there, too."""


def look(url: str) -> Look:
    """The first eight bytes of the file at `url`, and the file with its size and version.

    Raises:
        AbsentError: there is none, or it must not be read.
        CheckpointError: it cannot be read.
    """
    file = _known(url)
    transport = _transport(file)
    return persist(file, lambda: transport.look(file))


def read_into(url: str, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` from byte `offset` of the file at `url`, which must be what it was.

    Raises:
        CheckpointError: it cannot be read, ends before, or is another file than when it was opened.
    """
    file = _known(url)
    for start in range(0, len(buffer), PIECE_BYTES):
        _read_piece(file, offset + start, buffer[start : start + PIECE_BYTES])


def read_whole(url: str) -> bytes:
    """All bytes of a small file: an index or a config.

    Raises:
        AbsentError: there is none, or it must not be read.
        CheckpointError: it cannot be read, or is too large for what it should be.
    """
    file = _known(url)
    transport = _transport(file)
    raw = persist(file, lambda: transport.read_whole(file, _LARGEST_JSON))
    if len(raw) > _LARGEST_JSON:
        raise CheckpointError(
            f"{file} has more than {_LARGEST_JSON:,} bytes, too many for an index or a config; "
            "is this its address?"
        )
    return raw


def _known(url: str) -> RemoteFile:
    return url if isinstance(url, RemoteFile) else RemoteFile(url)


def _transport(file: RemoteFile) -> Transport:
    from pytest_subnet.checkpoints.remote import fsspec_ranges, http_ranges

    return http_ranges if file.is_http or file.scheme == "hf" else fsspec_ranges


def _read_piece(file: RemoteFile, offset: int, piece: memoryview) -> None:
    transport = _transport(file)
    done = 0

    def go_on() -> None:
        nonlocal done
        try:
            transport.read_some(file, offset + done, piece[done:])
        except Interrupted as error:
            done += error.got
            raise Interrupted(
                f"{error.reason} after {done:,} of {len(piece):,} bytes from byte {offset:,} on"
            ) from None

    persist(file, go_on)


def persist(file: RemoteFile, attempt: Callable[[], ResultT]) -> ResultT:
    """What `attempt` gives, tried up to `TRIES` times."""
    for number in range(1, TRIES + 1):
        try:
            return attempt()
        except Interrupted as error:
            reason = error.reason
        if number < TRIES:
            time.sleep(min(PAUSE_SECONDS * 2 ** (number - 1), LONGEST_PAUSE_SECONDS))
    raise CheckpointError(
        f"{file} could not be read in {TRIES} tries: {reason}; check the network and the server, "
        "and run again"
    )


def changed(file: RemoteFile) -> CheckpointError:
    """The error for a file that is another one than when it was opened."""
    return CheckpointError(
        f"{file} changed after it was opened; wait until it is written, then open it again"
    )
