"""What scans counted, kept in a directory: neither a later run nor another worker reads it again.

Counts are found by what the pair is: the identities of all its files, how they were aligned, and
the kernel. A file that was written to, copied over or touched has another identity, and its counts
are not found.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext, suppress
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import numpy as np

from pytest_subnet.checkpoints.dtypes import DTYPES
from pytest_subnet.checkpoints.files import FileStamp
from pytest_subnet.checkpoints.remote.urls import identifies
from pytest_subnet.scan.cache_file import packed, packed_size, unpacked
from pytest_subnet.scan.counters import Counters
from pytest_subnet.scan.tally import Tally
from pytest_subnet.turns import in_turn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from numpy.typing import NDArray

    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.scan.tolerance import Tolerance

KERNEL_VERSION = 1
"""To be raised when a kernel counts another thing: nothing that was kept is found then."""

MAX_PAIRS = 256
MAX_BYTES = 64 * 1024 * 1024
"""What a directory holds at most; what was written longest ago goes first."""

_ALWAYS_WRITTEN = 1024 * 1024
_WORTH_WRITING = 8
"""Tables larger than the first are written once so many times their bytes have been read."""

_TICK_NS, _COARSE_TICK_NS = 100_000_000, 2_000_000_000
"""How far apart two writes must be for the system to date them differently; without fractions of
a second in its dates, two seconds."""

_SMALL = 1 << 16
"""Of the numbers in an identity: the sides of a block, not an address."""

_PATIENCE, _SLOW_DISK = 60.0, 50e6
"""Another process may scan for so many seconds, and one more for so many bytes of the pair."""

_PACKAGES = ("pytest-subnet", "torch", "peft", "compressed-tensors")
"""By which weights are counted, or come by where they are stored otherwise."""


class NoCache:
    """Keeps nothing: what this process has not counted is read."""

    place = None

    def turn(self, what: str = "") -> AbstractContextManager[None]:
        """Nobody has to wait."""
        return nullcontext()

    def recall(
        self, rows: NDArray[np.intp], tolerances: Sequence[Tolerance]
    ) -> tuple[NDArray[np.intp], Counters]:
        """Nothing is known."""
        return rows[:0], Counters(0, tolerances)

    def remember(self, rows: NDArray[np.intp], counted: Counters) -> None:
        """Forget it."""


def cache_of(pair: ModelPair, directory: Path) -> ScanCache | NoCache:
    """Where the counts of `pair` are kept.

    Nowhere unless both sides are files which would show that they were written to: that takes
    another date than the last write's.
    """
    identities = pair.base.identity_when_opened(), pair.tuned.identity_when_opened()
    lasting = all(_lasts(each) for each in identities)
    if pair.base.is_live or pair.tuned.is_live or not lasting or not _settled(identities):
        return NoCache()
    return ScanCache(directory, pair)


def _lasts(identity: object) -> bool:
    """Whether an identity means the same in every process, and shows every write.

    It is made of the stamps of files, and of texts and small numbers beside them. A large number
    may be an address in memory.
    """
    stamps = 0
    for leaf in _leaves(identity):
        match leaf:
            case FileStamp():
                stamps += 1
            case (_, int() as size, str() as version, _) if identifies(version, size):
                stamps += 1
            case str():
                pass
            case int() if 0 <= leaf < _SMALL:
                pass
            case _:
                return False
    return stamps > 0


def _settled(identity: object) -> bool:
    """Whether a write from now on would give each file another date than it has."""
    now = time.time_ns()
    for leaf in _leaves(identity):
        if isinstance(leaf, FileStamp):
            fraction = leaf.ctime_ns % 1_000_000_000
            if now - leaf.ctime_ns < (_TICK_NS if fraction else _COARSE_TICK_NS):
                return False
    return True


def _leaves(identity: object) -> Iterator[object]:
    """The parts of an identity; a stamp of a file, here or remote, is one."""
    match identity:
        case FileStamp() | (str(), int() | None, str() | None, str()):
            yield identity
        case tuple():
            for each in identity:
                yield from _leaves(each)
        case _:
            yield identity


class ScanCache:
    """The counts of one pair in a directory that processes share.

    Whatever goes wrong with a file of the cache, it is as if there were none.
    """

    def __init__(self, directory: Path, pair: ModelPair) -> None:
        """Know nothing yet; no file is read or written."""
        self._directory = directory
        self._pair_is = (
            (pair.base.identity_when_opened(), pair.tuned.identity_when_opened()),
            pair.tensors,
            sorted(pair.renamed.items()),
            sorted(pair.tied.items()),
            pair.notes,
            # Sums of squares may differ in their last bits from one sort of device to another.
            (pair.device or "cpu").partition(":")[0],
        )
        widths = [
            DTYPES[each.base_dtype].itemsize + DTYPES[each.tuned_dtype].itemsize
            for each in pair.tensors
        ]
        self._entries = np.array([each.numel for each in pair.tensors], np.int64)
        self._nbytes = self._entries * np.array(widths, np.int64)
        self._known = Tally(len(pair.tensors))
        self._unwritten = 0
        self._file_was: tuple[int, ...] | None = None

    @property
    def place(self) -> tuple[Path, str]:
        """The directory, and what tells the pair from any other, for what else is kept of it."""
        return self._directory, self._key

    @contextmanager
    def turn(self, what: str = "") -> Iterator[None]:
        """Wait until no other process scans the pair, and make the others wait.

        What else is done to it, under a name of its own, does not wait for scans. After a while, or
        where files cannot be locked, there is no waiting: the pair is then read twice, and counted
        the same.
        """
        patience = _PATIENCE + float(self._nbytes.sum()) / _SLOW_DISK
        with in_turn(self._directory / f"{self._key}{what}.lock", patience):
            yield

    def recall(
        self, rows: NDArray[np.intp], tolerances: Sequence[Tolerance]
    ) -> tuple[NDArray[np.intp], Counters]:
        """Those of `rows` that are known under all of `tolerances`, and the counts."""
        self._look()
        found = np.setdiff1d(rows, self._known.missing_any(rows, tolerances))
        return found, self._known.counters(tolerances)

    def remember(self, rows: NDArray[np.intp], counted: Counters) -> None:
        """Keep what was counted of `rows`, with what is there already.

        A large table is not written for every small tensor: what is lost with it is read quickly.
        """
        self._look()
        if not self._known.missing_any(rows, counted.tolerances).size:
            return
        new = Tally(len(self._entries))
        new.keep(rows, counted)
        self._known.merge(new)
        self._unwritten += int(self._nbytes[rows].sum())
        size = packed_size(self._known)
        if size <= _ALWAYS_WRITTEN or self._unwritten >= _WORTH_WRITING * size:
            self._write(packed(self._known, self._key))
            self._unwritten = 0

    @cached_property
    def _key(self) -> str:
        parts = (self._pair_is, KERNEL_VERSION, sys.byteorder, [_version(p) for p in _PACKAGES])
        return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def _path(self) -> Path:
        return self._directory / f"{self._key}.counts"

    def _look(self) -> None:
        """Learn what is in the file, unless it is the one that was looked at."""
        with suppress(OSError):
            status = self._path.stat()
            now = status.st_ino, status.st_mtime_ns, status.st_size
            if now == self._file_was or not stat.S_ISREG(status.st_mode):
                return
            if status.st_size <= MAX_BYTES:
                found = unpacked(self._path.read_bytes(), self._key, self._entries)
                if found is not None:
                    self._known.merge(found)
            self._file_was = now

    def _write(self, data: bytes) -> None:
        if len(data) > MAX_BYTES:
            return
        with suppress(OSError):
            handle, draft = tempfile.mkstemp(".draft", f"{self._key}.", self._directory)
            try:
                with open(handle, "wb") as file:
                    file.write(data)
                os.replace(draft, self._path)  # noqa: PTH105 - a name, not a path
            except BaseException:
                with suppress(OSError):
                    os.unlink(draft)  # noqa: PTH108
                raise
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        """Keep the directory within its bounds, whatever of other pairs must go."""
        dates: dict[str, int] = {}
        sizes: dict[str, int] = {}
        files: dict[str, list[Path]] = {}
        for path in self._directory.iterdir():
            with suppress(OSError):
                status = path.lstat()
                key = path.name.partition(".")[0]
                dates[key] = max(dates.get(key, 0), status.st_mtime_ns)
                sizes[key] = sizes.get(key, 0) + status.st_size
                files.setdefault(key, []).append(path)
        held = 0
        # Only what was just written is certain to be used.
        order = sorted(dates, key=lambda key: (key != self._key, -dates[key]))
        for number, key in enumerate(order):
            held += sizes[key]
            if number and (number >= MAX_PAIRS or held > MAX_BYTES):
                for path in files[key]:
                    with suppress(OSError):
                        path.unlink()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
