"""Who measures the matrices of a pair: this process on all its cores, a GPU, a Ray cluster."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Generic, Protocol, TypeAlias, TypeVar, runtime_checkable

from pytest_subnet.arithmetic import plain_arithmetic
from pytest_subnet.findings.matrices.batched import nbytes_of
from pytest_subnet.findings.matrices.updates import Matrix
from pytest_subnet.pairs.model_pair import ModelPair
from pytest_subnet.scan.engines import MadeThere, ThisThread
from pytest_subnet.scan.travelling import FileRanges, device_there

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

    from pytest_subnet.pairs.model_pair import TensorPair
    from pytest_subnet.scan.contracts import Engine, Work

RowT = TypeVar("RowT")
RowT_co = TypeVar("RowT_co", covariant=True)
Batch: TypeAlias = tuple[Matrix, ...]

_BATCHED_ON = "cuda"

_BATCH_BYTES = 2 * 1024**3
"""What a batch takes on a GPU, about; one matrix may take more."""

_LITTLE = 1 << 18
"""Entries of matrices whose memory is not worth a look."""


class MatrixWork(Protocol[RowT_co]):
    """What is measured of a matrix; can be pickled, so that it can be done elsewhere."""

    @property
    def title(self) -> str:
        """What a progress bar calls it: `"rotating"`."""

    @property
    def key(self) -> Hashable:
        """Tells it from any other, with all that its numbers depend on but the matrix."""

    def measure(self, pair: ModelPair, matrix: Matrix) -> RowT_co:
        """Measure one matrix of `pair`."""


@runtime_checkable
class MeasuresAlike(Protocol[RowT_co]):
    """Work that does better on a GPU with several matrices of one shape together."""

    def measure_alike(self, pair: ModelPair, batch: Batch) -> Sequence[RowT_co]:
        """Measure matrices of one shape, as `MatrixWork.measure` does each."""


def batches_of(pair: ModelPair, matrices: Sequence[Matrix], work: object) -> list[Batch]:
    """What is measured at a time: on a GPU matrices of one shape together, else one by one."""
    on_gpu = pair.device is not None and pair.device.startswith(_BATCHED_ON)
    if not (on_gpu and isinstance(work, MeasuresAlike)):
        return [(each,) for each in matrices]
    alike: dict[tuple[tuple[int, int], bool], list[Matrix]] = {}
    for each in matrices:
        is_double = pair.tensors[each.row].dtype == "float64"
        alike.setdefault((each.shape, is_double), []).append(each)
    batches: list[Batch] = []
    for (shape, is_double), group in alike.items():
        size = max(1, _BATCH_BYTES // nbytes_of(*shape, 8 if is_double else 4))
        batches += [tuple(group[first : first + size]) for first in range(0, len(group), size)]
    return batches


def shared_out(
    pair: ModelPair, matrices: Sequence[Matrix], work: MatrixWork[RowT]
) -> tuple[Engine, Work[Batch, Sequence[RowT]]]:
    """Who measures, and how: one batch after the other here, each on all cores; else a task each.

    Raises:
        CheckpointError: it is to be done elsewhere, and a side is in no files.
    """
    if pair.engine != "ray":
        return ThisThread(), _Measuring(pair, work)
    from pytest_subnet.scan.ray_engine import RayEngine

    tensors = {row: pair.tensors[row] for row in dict.fromkeys(each.row for each in matrices)}
    base = FileRanges.of(pair.base, [each.base_name for each in tensors.values()])
    tuned = FileRanges.of(pair.tuned, [each.tuned_name for each in tensors.values()])
    base.config, tuned.config = dict(pair.base.config), dict(pair.tuned.config)
    device = device_there(pair.device)

    def paths_of(batch: Batch) -> set[str]:
        names = [(tensors[each.row].base_name, tensors[each.row].tuned_name) for each in batch]
        return set().union(*(base.paths_of(one) | tuned.paths_of(other) for one, other in names))

    there = MadeThere(partial(_of_files, base, tuned, pair.tensors, device, work))
    return RayEngine(paths_of, gpus=device == "cuda", together=1), there


def _of_files(
    base: FileRanges,
    tuned: FileRanges,
    tensors: Sequence[TensorPair],
    device: str | None,
    work: MatrixWork[RowT],
) -> _Measuring[RowT]:
    """The work on what is in files, made where it is done."""
    return _Measuring(ModelPair(base, tuned, tensors=tensors, device=device), work)


@dataclass(frozen=True)
class _Measuring(Generic[RowT]):
    """`Work` that measures matrices of a pair: those of a batch are of one shape."""

    pair: ModelPair
    work: MatrixWork[RowT]

    @contextmanager
    def open(self) -> Iterator[Callable[[Batch], Sequence[RowT]]]:
        """As `Work.open`."""
        yield self._measure

    @plain_arithmetic()
    def _measure(self, batch: Batch) -> Sequence[RowT]:
        import torch

        if len(batch) > 1 and isinstance(self.work, MeasuresAlike):
            try:
                return self.work.measure_alike(self.pair, batch)
            except torch.cuda.OutOfMemoryError:
                pass  # no room for all of them: one after the other
        rows = [self.work.measure(self.pair, each) for each in batch]
        if any(each.numel > _LITTLE for each in batch):
            _give_back()
        return rows


def _give_back() -> None:
    """Return the memory that matrices left to the system, where the C library is glibc.

    It keeps what was freed in pieces of up to 32 MB, and the next matrix does not fit between what
    stays: without this a process that measures 156 matrices comes to hold half as much again.
    """
    import ctypes

    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
