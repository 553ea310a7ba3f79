"""Files that are kept for later runs: whole or not at all, and never more than so many bytes."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

import xxhash

from pytest_subnet.atomic import write_bytes

if TYPE_CHECKING:
    from pathlib import Path

_DIGEST_BYTES = 16


class KeptFiles:
    """What was stored under a name, in a directory that processes share.

    Whatever goes wrong with a file, it is as if there were none.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        """Touch nothing yet.

        Args:
            directory: holds nothing else; made when something is stored.
            max_bytes: what it holds at most; what was used longest ago goes first.
        """
        self._directory = directory
        self._max_bytes = max_bytes

    def load(self, name: str) -> bytes | None:
        """What was stored under `name`, a plain file name; None if nothing is, or it is damaged."""
        path = self._directory / name
        with suppress(OSError):
            status = path.stat()
            if stat.S_ISREG(status.st_mode) and status.st_size <= self._max_bytes + _DIGEST_BYTES:
                data = path.read_bytes()
                if data[:_DIGEST_BYTES] == _digest(name, data[_DIGEST_BYTES:]):
                    with suppress(OSError):
                        os.utime(path)  # it was used just now
                    return data[_DIGEST_BYTES:]
        return None

    def store(self, name: str, data: bytes) -> None:
        """Keep `data` under `name`, in the place of what was there."""
        if len(data) > self._max_bytes:
            return
        with suppress(OSError):
            self._directory.mkdir(parents=True, exist_ok=True)
            write_bytes(self._directory / name, _digest(name, data) + data)
            self._drop_oldest(name)

    def _drop_oldest(self, latest: str) -> None:
        found = []
        for path in self._directory.iterdir():
            with suppress(OSError):
                status = path.lstat()
                found.append((path.name == latest, status.st_mtime_ns, status.st_size, path))
        held = 0
        for _, _, size, path in sorted(found, reverse=True):
            held += size
            if held > self._max_bytes + _DIGEST_BYTES:
                with suppress(OSError):
                    path.unlink()


def _digest(name: str, data: bytes) -> bytes:
    return xxhash.xxh3_128_digest(name.encode() + b"\0" + data)
