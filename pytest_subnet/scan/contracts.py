"""What the parts of a scan owe each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence
    from contextlib import AbstractContextManager

    import numpy as np
    from numpy.typing import NDArray

    from pytest_subnet.checkpoints.base import Buffer
    from pytest_subnet.scan.counters import Counters
    from pytest_subnet.scan.found import Found

UnitT = TypeVar("UnitT")
ResultT = TypeVar("ResultT")
UnitT_contra = TypeVar("UnitT_contra", contravariant=True)
ResultT_co = TypeVar("ResultT_co", covariant=True)


class Kernel(Protocol):
    """Compares two buffers and adds to counters.

    Every kernel gives the same integers; sums may differ in the last digits.
    """

    def __call__(
        self, base: Buffer, tuned: Buffer, dtype: str, bounds: NDArray[np.int64], counters: Counters
    ) -> None:
        """Compare segment by segment.

        Args:
            base: the packed bytes of all segments.
            tuned: likewise, as many.
            dtype: of the entries of both.
            bounds: int64 `[segments + 1]`: segment `i` is the entries `bounds[i]` up to
                `bounds[i + 1]`.
            counters: one row a segment; what is found is added to them.
        """
        ...


class Place(NamedTuple):
    """Where a run of bytes starts: an open file's descriptor and the offset."""

    file: int
    offset: int


class FileRun(NamedTuple):
    """A run of bytes in one file on each side, and buffers to read it into.

    Attributes:
        base: where it starts.
        tuned: likewise.
        scratch: uint8 `[bytes]`, a buffer for each side, small enough for the cache.
        entries: how long it is.
    """

    base: Place
    tuned: Place
    scratch: tuple[NDArray[np.uint8], NDArray[np.uint8]]
    entries: int


@runtime_checkable
class FileKernel(Kernel, Protocol):
    """A kernel that can also read: what it compares is still in the cache."""

    def compare_files(
        self,
        runs: Iterable[FileRun],
        dtype: str,
        bounds: NDArray[np.int64],
        counters: Counters,
    ) -> bool:
        """Compare segments that lie in files, run by run.

        Args:
            runs: where the bytes of both sides lie; one after the other they are all segments.
            dtype: of the entries of both.
            bounds: as for the kernel.
            counters: as for the kernel.

        Returns:
            Whether all could be read. If not, the counters are as they were.
        """
        ...


class MaskKernel(Protocol):
    """Compares as a `Kernel` does and marks which entries are updated.

    Every such kernel gives the same integers and bits.
    """

    def __call__(
        self,
        base: Buffer,
        tuned: Buffer,
        dtype: str,
        bounds: NDArray[np.int64],
        counters: Counters,
        found: Found,
    ) -> None:
        """Compare segment by segment.

        Args:
            base: as for `Kernel`.
            tuned: likewise.
            dtype: likewise.
            bounds: likewise.
            counters: likewise.
            found: empty; filled with bits and strata.
        """
        ...


@runtime_checkable
class FileMaskKernel(MaskKernel, Protocol):
    """A mask kernel that can also read."""

    def mask_files(
        self,
        base: Place,
        tuned: Place,
        scratch: tuple[NDArray[np.uint8], NDArray[np.uint8]],
        dtype: str,
        bounds: NDArray[np.int64],
        counters: Counters,
        found: Found,
    ) -> bool:
        """As `FileKernel.compare_files`; if not all could be read, `found` is empty again."""
        ...


class Work(Protocol[UnitT_contra, ResultT_co]):
    """What an engine does with each unit; picklable when its units name files."""

    def open(self) -> AbstractContextManager[Callable[[UnitT_contra], ResultT_co]]:
        """A function from unit to result, for one worker, with the files and buffers it reuses."""
        ...


class Engine(Protocol):
    """Spreads work units over workers."""

    def map(
        self, work: Work[UnitT, ResultT], units: Sequence[UnitT]
    ) -> Generator[tuple[int, ResultT]]:
        """Give `(position in units, result)` for each unit, exactly once, in any order.

        The first error of a unit ends the map and is raised; closing the generator stops the
        workers.
        """
        ...
