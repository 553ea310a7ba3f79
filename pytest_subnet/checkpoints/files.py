"""Bytes from files: positional reads, and how a file is told from what it was before."""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pytest_subnet.checkpoints.remote.urls import is_url
from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from io import FileIO

_OPEN_FILES = 4
"""Files a reader keeps open: base and tuned, and one more of each at a shard's edge."""


class FileStamp(NamedTuple):
    """What tells a file from any other and from itself before a write."""

    path: str
    device: int
    inode: int
    size: int
    ctime_ns: int


def stamp(path: Path | str) -> FileStamp:
    """The stamp of the file `path` as it is now; links are followed."""
    try:
        status = Path(path).stat()
    except OSError as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):  # a pipe would block, a directory or device has no data
        what = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise CheckpointError(f"{safe(path)} is {what}, not a file; put the file there")
    return FileStamp(
        os.fspath(path), status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns
    )


def exists(path: Path | str) -> bool:
    """Whether there is anything at `path`; `CheckpointError` when the system will not say."""
    try:
        Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except ValueError:  # a null byte or a lone surrogate: no file can have such a name
        return False
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise unreadable(path, error) from error
    return True


def names_in(directory: Path) -> list[str]:
    """The names in a directory, sorted; `CheckpointError` when the system will not list them."""
    try:
        return sorted(entry.name for entry in directory.iterdir())
    except OSError as error:
        raise unreadable(directory, error) from error


def refuse_pointer(path: Path | str, head: bytes) -> None:
    """Raise if `head`, the first bytes of the file `path`, are those of a Git LFS pointer."""
    if head.startswith(b"version "):
        raise CheckpointError(
            f"{safe(path)} is a Git LFS pointer, not weights; run `git lfs pull` in its repository"
        )


def unreadable(path: Path | str, error: OSError) -> CheckpointError:
    """The error for a file the system will not let us read, with what to do."""
    if isinstance(error, FileNotFoundError):
        return CheckpointError(
            f"{safe(path)} does not exist; was the download or the save cut short?"
        )
    if isinstance(error, PermissionError):
        return CheckpointError(
            f"no permission to read {safe(path)}; give this user read access (chmod a+r, "
            "and a+x on the directories above it)"
        )
    reason = error.strerror or type(error).__name__
    return CheckpointError(
        f"cannot read {safe(path)}: {reason}; check the disk or the mount and copy the file again"
    )


def _read_at(handle: FileIO, buffer: memoryview, offset: int) -> int:
    return os.preadv(handle.fileno(), [buffer], offset)


def _seek_and_read(handle: FileIO, buffer: memoryview, offset: int) -> int:
    handle.seek(offset)
    return handle.readinto(buffer) or 0


# Windows has no preadv. A reader belongs to one thread, so seek and read are as good there.
read_some = _read_at if hasattr(os, "preadv") else _seek_and_read


def read_unchanged(known: FileStamp, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` from byte `offset` of a file that must be as it was when `known` was taken."""
    with FileReader() as reader:
        reader.read_into(known.path, offset, buffer)
    check_stamp(known)


def check_stamp(known: FileStamp) -> None:
    """Raise `CheckpointError` unless the file is as it was when `known` was taken."""
    if stamp(known.path) != known:
        raise CheckpointError(
            f"{safe(known.path)} changed after it was opened; wait until it is written, then open "
            "it again"
        )


class FileReader:
    """Reads runs of bytes from any number of files, keeping the last few open.

    It belongs to one thread; close it, or use it as a context manager.
    """

    def __init__(self) -> None:
        """Open nothing yet."""
        self._open: OrderedDict[str, FileIO] = OrderedDict()

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of the file `path`, or at that address, from `offset` on."""
        if is_url(path):
            from pytest_subnet.checkpoints.remote import (
                ranges,  # deferred: a file on disk needs no client
            )

            return ranges.read_into(path, offset, buffer)
        try:
            handle = self._handle(path)
            done = 0
            while done < len(buffer):
                got = read_some(handle, buffer[done:], offset + done)
                if got == 0:
                    raise CheckpointError(
                        f"{safe(path)} ends at byte {offset + done:,}, before the data its header "
                        "lists; it was cut short, save or download it again"
                    )
                done += got
        except OSError as error:
            raise unreadable(path, error) from error

    def descriptor(self, path: str) -> int:
        """The descriptor of the file `path`; good until a few other files have been opened."""
        try:
            return self._handle(path).fileno()
        except OSError as error:
            raise unreadable(path, error) from error

    def _handle(self, path: str) -> FileIO:
        handle = self._open.pop(path, None) or open(path, "rb", buffering=0)  # noqa: SIM115
        self._open[path] = handle
        if len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        return handle

    def close(self) -> None:
        """Close every file that is open."""
        while self._open:
            self._open.popitem()[1].close()

    def __enter__(self) -> FileReader:
        """Give the reader itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close every file that is open."""
        self.close()
